"""Configuration: frozen dataclasses, validated once; command line and JSON round trip. No JAX.

Flags are flat and carry nanoGPT's names (`--n_layer 6`, `--batch_size=32`), although the fields
live in the part of the program that uses them (`config.model.n_layer`).
"""

import contextlib
import dataclasses
import io
import json
import math
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from nanogpt_jax.errors import InputError, did_you_mean


def _require(ok: bool, config: Any, name: str, requirement: str) -> None:
    if not ok:
        raise InputError(f"{name} must be {requirement}, got {getattr(config, name)!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the GPT."""

    block_size: int = 1024
    """Context length in tokens."""
    vocab_size: int | None = None
    """Number of distinct tokens; None: what the dataset has."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads in each block."""
    n_embd: int = 768
    """Width of the residual stream; a multiple of n_head."""
    dropout: float = 0.0
    """Rate of dropout; 0 is good for pretraining, 0.1 and more against overfitting."""
    bias: bool = False
    """Biases in Dense and LayerNorm, as GPT-2 has; False is a little better and faster."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Exact GELU (nanoGPT) or its tanh approximation (OpenAI's GPT-2 weights)."""

    def __post_init__(self):
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(self.vocab_size is None or self.vocab_size >= 1, self, "vocab_size", "at least 1")
        _require(0 <= self.dropout < 1, self, "dropout", "at least 0 and below 1")
        divides = f"a multiple of n_head={self.n_head}"
        _require(self.n_embd % self.n_head == 0, self, "n_embd", divides)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the learning rate's schedule."""

    learning_rate: float = 6e-4
    """Highest learning rate, reached after warm-up."""
    min_lr: float = 6e-5
    """Learning rate after the decay; a tenth of learning_rate is a good choice."""
    warmup_iters: int = 2000
    """Steps of linear warm-up."""
    lr_decay_iters: int | None = None
    """Step at which min_lr is reached; None: max_iters."""
    decay_lr: bool = True
    """False: learning_rate throughout, without warm-up."""
    weight_decay: float = 0.1
    """Decay of every parameter of rank 2 and more, embeddings included; of no other."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square; higher where a batch has few tokens."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""

    def __post_init__(self):
        for name in ("learning_rate", "min_lr", "weight_decay", "grad_clip", "warmup_iters"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), self, name, "finite and at least 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, self, name, "at least 0 and below 1")
        decay = self.lr_decay_iters
        _require(decay is None or decay >= 1, self, "lr_decay_iters", "at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """All that a training run is asked for."""

    config: str = "small"
    """A preset, or a JSON file of these fields; what it leaves out comes from the preset that it
    names as config, else from small."""
    out_dir: str | None = None
    """Folder of the run; None: out/CONFIG, or out/CONFIG-DATASET for your own text."""
    dataset: str | None = None
    """shakespeare_char, a text file or folder of them, a folder with train.bin and val.bin;
    None: shakespeare_char, or Python's own manual where it cannot be downloaded."""
    data_dir: str = "data"
    """Where prepared datasets lie."""
    batch_size: int = 12
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an update."""
    max_iters: int = 2000
    """Updates in the whole run."""
    eval_interval: int = 250
    """Updates from one evaluation and checkpoint to the next."""
    eval_iters: int = 0
    """Batches of an evaluation, at fixed places; 0: the whole validation split, exactly."""
    log_interval: int = 10
    """Updates from one line of metrics.jsonl to the next."""
    eval_only: bool = False
    """Evaluate the run's newest checkpoint and exit."""
    seed: int = 1337
    """Seed of weights, batches and dropout."""
    overwrite: bool = False
    """Delete the run that lies in out_dir and start anew."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        ones = "batch_size gradient_accumulation_steps max_iters eval_interval log_interval"
        for name in ones.split():
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(self.dataset != "", self, "dataset", "a name or a path")
        _require(self.eval_iters >= 0, self, "eval_iters", "at least 0")
        _require(0 <= self.seed < 2**32, self, "seed", "from 0 to 2**32 - 1")

    @property
    def tokens_per_iter(self) -> int:
        """Tokens in one update."""
        return self.gradient_accumulation_steps * self.batch_size * self.model.block_size


@dataclass(frozen=True)
class SampleConfig:
    """What text to write, and how."""

    out_dir: str | None = None
    """Folder of the run; None: the newest under out/."""
    checkpoint: Literal["best", "latest"] = "best"
    """The checkpoint of lowest validation loss, or the newest."""
    start: str | None = None
    """Text to go on from; FILE:path reads a file, - standard input; None: a line break."""
    num_samples: int = 10
    """Samples to draw, all at once."""
    max_new_tokens: int = 500
    """Tokens in each; -1 with --stream: on without end, until Ctrl-C."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder; 0: always the likeliest token."""
    top_k: int = 200
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1: from all."""
    seed: int = 1337
    """Sample number n of a seed is the same text however many are drawn."""
    stop: str | None = None
    """End a sample before the first occurrence of this text."""
    stream: bool = False
    """Show the text as it is made, one sample after the other."""
    exact_window: bool = False
    """nanoGPT's rule past block_size: see all of the last block_size tokens again for each token
    (slow), where the default keeps the last half of the window and goes on from there."""

    def __post_init__(self):
        _require(self.num_samples >= 1, self, "num_samples", "at least 1")
        endless = self.max_new_tokens == -1 and self.stream
        ok = self.max_new_tokens >= 1 or endless
        _require(ok, self, "max_new_tokens", "at least 1, or -1 together with --stream")
        ok = self.temperature >= 0 and math.isfinite(self.temperature)
        _require(ok, self, "temperature", "finite and at least 0")
        _require(self.top_k >= 0, self, "top_k", "at least 0")
        _require(0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1")
        _require(self.stop != "", self, "stop", "a text of at least one character")
        _require(0 <= self.seed < 2**32, self, "seed", "from 0 to 2**32 - 1")


Config = TypeVar("Config")


def field_types(cls: type) -> dict[str, Any]:
    """Return every flat field name of a configuration class with its type, nested ones included."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        found |= field_types(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return found


def to_flat_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as one flat dict, nested parts merged in: what config.json holds."""
    flat = {}
    for name, value in vars(config).items():
        flat |= to_flat_dict(value) if dataclasses.is_dataclass(value) else {name: value}
    return flat


def read_settings(path: Path, cls: type) -> dict[str, str]:
    """Read a JSON file of flat fields as settings for `parse_args`.

    Raises:
        InputError: no such file, not a JSON object, or a field that `cls` does not have.
    """
    try:
        loaded = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: must be a JSON file, but {error}") from None
    if not isinstance(loaded, dict):
        raise InputError(f'{path}: must hold one JSON object, like {{"n_layer": 4}}')
    loaded.pop("made_with", None)  # a run's config.json says there what it ran on
    for name in loaded:
        if name not in field_types(cls):
            hint = did_you_mean(name, field_types(cls))
            raise InputError(f"{path}: there is no field {name!r}.{hint}")
    return {name: str(value) for name, value in loaded.items()}


# What nanoGPT's users type and what answers it here, where the answer is not the same flag.
NANOGPT_FLAGS = {
    "device": "JAX finds the GPU or TPU by itself; JAX_PLATFORMS=cpu in front forces the CPU",
    "compile": "leave it out: JAX always compiles",
    "dtype": "leave it out: arrays are float32 so far",
    "backend": "leave it out: there is no torch.distributed here",
    "init_from": "leave it out: a run in --out_dir is resumed by itself (GPT-2's weights cannot be "
    "loaded yet)",
    "always_save_checkpoint": "leave it out: the newest and the best checkpoint are always kept",
    "wandb_project": "leave it out: metrics.jsonl in the run's folder has all figures",
    "wandb_run_name": "leave it out: --out_dir names a run",
    "wandb_log": "leave it out: metrics.jsonl in the run's folder has all figures",
}


def split_settings(argv: list[str], cls: type) -> dict[str, str]:
    """Split `--key value`, `--key=value` and bare `--flag` into settings; dashes as underscores.

    Raises:
        InputError: an unknown flag (with its near matches), or one without its value.
    """
    known, settings, rest = field_types(cls), {}, list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            settings["help"] = ""
            continue
        if not word.startswith("--") or word == "--":
            hint = " Presets go behind --config: --config shakespeare." if ".py" in word else ""
            raise InputError(f"{word!r} is not a flag; flags look like --n_layer 6.{hint}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            hint = f" nanoGPT's flag: {NANOGPT_FLAGS[name]}." if name in NANOGPT_FLAGS else ""
            hint = hint or did_you_mean(name, known)
            raise InputError(f"there is no flag --{name}.{hint} (--help lists them)")
        if not equals:
            bare = not rest or rest[0].startswith("--")
            if bare and known[name] is not bool:
                raise InputError(f"--{name} needs a value, like --{name}=...")
            value = "True" if bare else rest.pop(0)
        is_bool = known[name] is bool and value.lower() in ("true", "false")
        settings[name] = value.capitalize() if is_bool else value
    return settings


def parse_args(cls: type[Config], settings: dict[str, str], default: Config, about: str) -> Config:
    """Build a configuration from settings on top of `default`; tyro parses types and prints help.

    Args:
        settings: flat field -> value as text; with "help" among them, help is printed (exit 0).
        about: what the help says above the flags.

    Raises:
        InputError: a value that is not of the field's type, or that validation refuses.
    """
    import tyro  # only a command line needs it

    argv = [f"--{name}={value}" for name, value in settings.items() if name != "help"]
    argv += ["--help"] if "help" in settings else []
    markers = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                cls,
                prog=Path(sys.argv[0]).name,
                description=about,
                args=argv,
                default=default,
                use_underscores=True,
                config=markers,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box: keep the sentence above the box's first rule.
        lines = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
        lines = ["" if set(line) <= {"-"} else line for line in lines]  # the rule, in ASCII
        sentence = " ".join(lines[1:]).strip().split("  ")[0]
        sentence = re.sub(r"^Error parsing (\w+: )?", "", sentence)  # our own classes' names
        raise InputError(sentence or "the flags cannot be understood") from None
