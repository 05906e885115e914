"""Configuration: frozen dataclasses, validated once, and their flat form. No JAX.

Fields live in the part of the program that uses them (`config.model.n_layer`); flags and JSON are
flat and carry nanoGPT's names (`n_layer`).
"""

import dataclasses
import os
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from nanogpt_jax.errors import InputError


def _require(ok: bool, config: Any, name: str, requirement: str) -> None:
    if not ok:
        raise InputError(f"{name} must be {requirement}, got {getattr(config, name)!r}")


MOST = 2**30  # what counts steps and tokens on the device is an int32, and sums of two are too
MOST_FLOAT = 3e38  # more is infinite in float32
MOST_BYTES = 255, 4000  # of a part of a path, and of all of it
# The whole numbers that a field can be, where they are not from 1 to MOST. Those of a shape are
# beyond any GPT: a stranger's file shall not keep the machine busy.
RANGES = {
    "n_layer": (1, 2**10),
    "n_head": (1, 2**10),
    "n_embd": (1, 2**16),
    "block_size": (1, 2**20),
    "vocab_size": (1, 2**24),
    "seed": (0, 2**32 - 1),
    "port": (0, 2**16 - 1),
    "process_id": (-1, MOST),
    "max_new_tokens": (-1, MOST),
    **dict.fromkeys(("warmup_iters", "eval_iters", "num_processes", "top_k"), (0, MOST)),
}
TEXTS = {"start", "stop"}  # all other fields of text name something, a file as a rule
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_fields(config: Any) -> None:
    """Check each field of a configuration as `check_value` does."""
    for name, hint in typing.get_type_hints(type(config)).items():
        check_value(name, hint, getattr(config, name))


def check_value(name: str, hint: Any, value: Any) -> None:
    """Check a field by its type alone, whatever else it must be.

    A whole number lies in its range, a number is at least 0 and finite in float32, and a text is
    one that the system can take for a name.

    Raises:
        InputError: naming the field.
    """

    def require(ok: bool, requirement: str) -> None:
        if not ok:
            raise InputError(f"{name} must be {requirement}, got {value!r}")

    kinds = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is Literal:
        require(isinstance(value, str) and value in kinds, f"one of {', '.join(kinds)}")
        return
    if value is None and type(None) in kinds:
        return
    kind = kinds[0]
    accepted = (int, float) if kind is float else kind
    is_of_kind = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    require(is_of_kind, IN_WORDS.get(kind, f"a {kind.__name__}"))
    if kind is int:
        least, most = RANGES.get(name, (1, MOST))
        require(value >= least, f"at least {least}")
        require(value <= most, f"at most {most}")
    elif kind is float:
        require(0 <= value <= MOST_FLOAT, "finite and at least 0")
    elif kind is str and name not in TEXTS:
        require(_is_name(value), "a name that a file can have")


def _is_name(text: str) -> bool:
    try:
        name = os.fsencode(text.replace(os.sep, "/"))
    except UnicodeEncodeError:  # half a character
        return False
    longest, total = MOST_BYTES
    return b"\0" not in name and len(name) <= total and max(map(len, name.split(b"/"))) <= longest


SCRATCH = "scratch"  # in place of the name of weights: random ones

MAX_PAGE_TOKENS = 5000  # that the page of --web writes at once: nobody shall hold it for long

# The steps of the lecture "Let's build GPT", each a model of its own in rungs.py.
RUNGS = ("bigram", "head", "multihead", "feedforward", "deep", "residual", "layernorm")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the GPT: GPT-2's, and of what is newer a choice of each part."""

    architecture: Literal["gpt", *RUNGS] = "gpt"
    """GPT-2's, or a step of "Let's build GPT": see rungs.py."""
    block_size: int = 1024
    """Context length in tokens."""
    vocab_size: int | None = None
    """Rows of the token embedding; None: as many as there are tokens. More are padding: a multiple
    of 64 is faster on GPU and TPU."""
    known_tokens: int | None = None
    """Tokens that exist, where vocab_size is padded: the rest is never predicted, whatever its
    weights; None: what the dataset says, else all."""
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
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    """Of the MLP: exact GELU (nanoGPT), its tanh approximation (OpenAI's GPT-2 weights), ReLU
    squared, or SwiGLU, whose hidden layer is 8/3 n_embd wide for as many weights."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned embedding of each position, or queries and keys turned by theirs."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm, or RMSNorm without parameters."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, so that no score runs away."""
    tied_head: bool = True
    """The head's weights are the token embedding's; False: it has its own."""
    zero_init: bool = False
    """What adds to the stream, and a head of its own, begins at 0, not at random."""
    logit_cap: float = 0.0
    """Largest logit, approached by a tanh; 0: no cap."""

    def __post_init__(self):
        check_fields(self)
        if self.known_tokens is not None:
            most = self.vocab_size or self.known_tokens
            within = f"from 1 to vocab_size={self.vocab_size}"
            _require(self.known_tokens <= most, self, "known_tokens", within)
        _require(self.dropout < 1, self, "dropout", "at least 0 and below 1")
        divides = f"a multiple of n_head={self.n_head}"
        _require(self.n_embd % self.n_head == 0, self, "n_embd", divides)
        if self.positions == "rotary":  # features of a head turn in pairs
            divides = f"a multiple of 2 n_head={2 * self.n_head}"
            _require(self.n_embd % (2 * self.n_head) == 0, self, "n_embd", divides)
        if self.architecture != "gpt":
            self._check_rung()

    def _check_rung(self) -> None:
        """Refuse what a step of the lecture does not have, rather than ignore it."""
        rung = self.architecture
        # Its activation is in truth ReLU, always; and its head knows no padding.
        only = {"bias": True, "known_tokens": None, **GPT2}
        only |= {} if rung == "layernorm" else {"dropout": 0.0}
        only |= {} if rung in ("deep", "residual", "layernorm") else {"n_layer": 1}
        only |= {"n_head": 1} if rung in ("bigram", "head") else {}
        for name, value in only.items():
            ok = getattr(self, name) == value
            preset = f"as --config lecture-{rung} has it"
            _require(ok, self, name, f"{value} in the lecture's {rung}, {preset}")


# What a GPT-2 is beside its size: the defaults above.
_PARTS = "activation", "positions", "norm", "qk_norm", "tied_head", "zero_init", "logit_cap"
GPT2 = {name: getattr(ModelConfig, name) for name in _PARTS}


def mlp_in_features(config: ModelConfig) -> int:
    """Return the features that the MLP's first layer makes: the hidden ones and SwiGLU's gates."""
    return hidden_size(config) * (2 if config.activation == "swiglu" else 1)


def hidden_size(config: ModelConfig) -> int:
    """Return the features of the MLP's hidden layer; SwiGLU's has a gate for each besides."""
    D = config.n_embd
    return max(1, D // 3) * 8 if config.activation == "swiglu" else 4 * D


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning rate's schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices of the blocks and AdamW, with Nesterov's momentum, for the
    rest."""
    learning_rate: float = 6e-4
    """Highest learning rate, reached after warm-up. Muon's updates are scaled to AdamW's size, so
    one rate serves for both."""
    muon_momentum: float = 0.95
    """Muon's decay of the gradient's mean; lower for a short run."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """The way from learning_rate to min_lr: a cosine, or warm-up, stable, decay: a constant, then a
    straight line."""
    cooldown: float = 0.4
    """Share of the steps after warm-up that this line takes."""
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
        check_fields(self)
        for name in ("beta1", "beta2", "muon_momentum"):
            _require(getattr(self, name) < 1, self, name, "at least 0 and below 1")
        _require(0 < self.cooldown <= 1, self, "cooldown", "above 0 and at most 1")


def _refuse_resume(init_from: str | None) -> None:
    if init_from == "resume":  # nanoGPT's
        raise InputError("init_from=resume: leave it out, the run in out_dir is taken by itself")


SPLITS = ("train", "val")

MESH_AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # those over which a batch's rows are shared out


def mesh_sizes(text: str) -> tuple[int, int, int]:
    """Return the sizes of the axes data, fsdp and tensor of a mesh like "data=2,fsdp=4".

    An axis left out is 1; but data is -1, all devices that the others leave, where neither it nor
    another -1 is given.

    Raises:
        InputError: another axis, a size that is no whole number, or more than one -1.
    """
    sizes = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or axis in sizes or not re.fullmatch(r"-1|[1-9]\d{0,8}", size):
            raise InputError(
                f"mesh must look like data=-1,fsdp=1,tensor=1, each axis a number of devices, -1 "
                f"for all that are left, but {part!r} came"
            )
        sizes[axis] = int(size)
    rest = 1 if -1 in sizes.values() else -1
    sizes = (sizes.get("data", rest), sizes.get("fsdp", 1), sizes.get("tensor", 1))
    if sizes.count(-1) > 1:
        raise InputError(f"mesh can have one -1, for all devices that are left, but {text!r} came")
    return sizes


@dataclass(frozen=True)
class ComputeConfig:
    """How it is computed. What is computed stays the same, but for rounding."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of activations and of matrix products; auto: bfloat16 where the chip has it, else
    float32. Parameters, optimizer and loss are float32; float16 scales its loss by itself."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Kernel of attention: cuDNN's for NVIDIA, the splash kernel for TPU, plain XLA for all; auto:
    what the chip and the model allow."""
    remat: bool = False
    """Keep only each block's input and compute the rest again in the backward pass: a third more
    work, a fraction of the memory."""
    loss_chunks: int = 1
    """Pieces of the context whose logits exist at a time; more spare memory where the vocabulary
    is large. A divisor of block_size."""
    mesh: str = ""
    """Devices along each axis, like data=-1,fsdp=1,tensor=1 (-1: all that are left); empty: data
    over all devices, or as many as batch_size can be divided by."""

    def __post_init__(self):
        check_fields(self)
        mesh_sizes(self.mesh)


@dataclass(frozen=True)
class TrainConfig:
    """All that a training run is asked for."""

    config: str = "small"
    """A preset, or a JSON file of these fields; what it leaves out comes from the preset that it
    names as config, else from small."""
    out_dir: str | None = None
    """Folder of the run; None: out/CONFIG, or out/CONFIG-DATASET for your own text."""
    dataset: str | None = None
    """shakespeare_char, shakespeare (in GPT-2's tokens), pydocs, openwebtext, fineweb-edu; a text,
    JSONL or parquet file or a folder of them; a folder with train.bin and val.bin; None:
    shakespeare_char, or Python's own manual where it cannot be downloaded."""
    data_dir: str = "data"
    """Where prepared datasets lie."""
    tokenizer: str | None = None
    """How a text becomes tokens: char, gpt2, bpe (trained on the text, of vocab_size tokens), or a
    tokenizer.json; None: as the dataset has it or init_from needs it, else char of texts and gpt2
    of JSONL and parquet."""
    init_from: str = SCRATCH
    """The weights to begin with: scratch (random), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a
    folder with a GPT-2 of Hugging Face's (config.json, model.safetensors). They bring their shape;
    a smaller block_size crops them."""
    batch_size: int = 12
    """Sequences in a micro-batch; all devices share them."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an update."""
    max_iters: int = 2000
    """Updates in the whole run."""
    eval_interval: int = 250
    """Updates from one evaluation and checkpoint to the next."""
    eval_first: bool = True
    """Evaluate before the first update too."""
    eval_iters: int = 0
    """Batches of an evaluation, at fixed places; 0: the whole validation split, exactly."""
    log_interval: int = 10
    """Updates from one line of metrics.jsonl to the next."""
    eval_only: bool = False
    """Evaluate the run's newest checkpoint, or without a run what init_from names, and exit."""
    seed: int = 1337
    """Seed of weights, batches and dropout."""
    tensorboard: bool = False
    """Also log to out_dir/tensorboard; needs the extra tensorboard."""
    wandb: bool = False
    """Also log to Weights & Biases; needs the extra wandb."""
    overwrite: bool = False
    """Delete the run that lies in out_dir and start anew."""
    compile_cache: str = ""
    """Folder of compiled programs, for the next start; off: none; empty: one in your home."""
    compile_for: str = ""
    """Compile the step for TPUs that are not there, like v5e:4x4, and say whether it fits."""
    coordinator_address: str = ""
    """Of several processes: HOST:PORT of the first, the same for all, or auto on a Cloud TPU pod;
    empty: one process, or as Slurm says."""
    num_processes: int = 0
    """Of several processes: how many; 0: found by JAX."""
    process_id: int = -1
    """Of several processes: which one this is, from 0; -1: found by JAX."""
    heartbeat_timeout_s: int = 100
    """Of several processes: seconds of silence after which one counts as dead, and all stop."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self):
        check_fields(self)
        _require(self.out_dir != "", self, "out_dir", "the path of a folder")
        _require(self.data_dir != "", self, "data_dir", "the path of a folder")
        _require(self.dataset != "", self, "dataset", "a name or a path")
        _require(self.tokenizer != "", self, "tokenizer", "char, gpt2, bpe or a path")
        _require(
            self.init_from != "", self, "init_from", "scratch, the name of a GPT-2 or a folder"
        )
        _refuse_resume(self.init_from)
        if self.tokens_per_iter > MOST:
            raise InputError(
                f"batch_size x gradient_accumulation_steps x block_size must be at most {MOST} "
                f"tokens, got {self.tokens_per_iter}"
            )
        divides = self.model.block_size % self.compute.loss_chunks == 0
        block = f"a divisor of block_size={self.model.block_size}"
        _require(divides, self.compute, "loss_chunks", block)
        address = self.coordinator_address
        port = re.fullmatch(r".+:(\d{1,5})", address)
        ok = address in ("", "auto") or (port and 1 <= int(port[1]) <= 65535)
        _require(bool(ok), self, "coordinator_address", "HOST:PORT or auto")
        given = address not in ("", "auto"), self.num_processes > 0, self.process_id >= 0
        if any(given) and not all(given):
            raise InputError(
                "coordinator_address, num_processes and process_id must be given together, like "
                "--coordinator_address 10.0.0.1:8476 --num_processes 2 --process_id 0, or none of "
                "them, where JAX finds them by itself (Slurm, TPU pods)"
            )
        ok = self.optim.optimizer == "adamw" or self.model.architecture == "gpt"
        _require(ok, self.optim, "optimizer", "adamw for a step of the lecture")
        ok = self.process_id < max(1, self.num_processes)
        _require(ok, self, "process_id", f"below num_processes={self.num_processes}")

    @property
    def tokens_per_iter(self) -> int:
        """Tokens in one update."""
        return self.gradient_accumulation_steps * self.batch_size * self.model.block_size


@dataclass(frozen=True)
class SampleConfig:
    """What text to write, and how."""

    out_dir: str | None = None
    """Folder of the run; None: the newest under out/."""
    init_from: str | None = None
    """In place of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a GPT-2 of
    Hugging Face's."""
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """As in training; auto: bfloat16 where the chip has it, else float32."""
    compile_cache: str = ""
    """Folder of compiled programs, for the next start; off: none; empty: one in your home."""
    web: bool = False
    """Open a page to play on instead: text as it is made, forecasts, attention, the loss."""
    host: str = "127.0.0.1"
    """With --web: the address to listen at; 0.0.0.0: anybody who reaches this machine may play."""
    port: int = 7860
    """With --web: its port; 0: a free one."""

    def __post_init__(self):
        check_fields(self)
        _refuse_resume(self.init_from)
        _require(self.out_dir != "", self, "out_dir", "the path of a folder")
        ok = self.init_from is None or self.out_dir is None
        _require(ok, self, "init_from", "left out where out_dir names a run")
        endless = self.max_new_tokens == -1 and self.stream
        ok = self.max_new_tokens >= 1 or endless
        _require(ok, self, "max_new_tokens", "at least 1, or -1 together with --stream")
        ok = not self.web or 1 <= self.max_new_tokens <= MAX_PAGE_TOKENS
        _require(ok, self, "max_new_tokens", f"from 1 to {MAX_PAGE_TOKENS} with --web")
        _require(0 < self.top_p <= 1, self, "top_p", "above 0 and at most 1")
        _require(self.stop != "", self, "stop", "a text of at least one character")
        ok = self.stop is None or not self.web
        _require(ok, self, "stop", "left out with --web, whose page has a button for it")
        _require(self.host != "", self, "host", "an address, like 127.0.0.1")


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
