"""nanoGPT in JAX: train, resume, evaluate and sample a GPT. In Python:

    import nanogpt_jax
    run = nanogpt_jax.load("out/small")
    print(nanogpt_jax.generate(run, "ROMEO:", max_new_tokens=200))

Importing the package imports neither JAX nor any of its own modules.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

if TYPE_CHECKING:
    import numpy as np

    from nanogpt_jax.config import ModelConfig, SampleConfig
    from nanogpt_jax.corpora import Tokenizer
    from nanogpt_jax.model import Model

__version__ = "0.1.0"


class Settings(TypedDict, total=False):
    """How to sample: fields of `SampleConfig`, which has their meaning, ranges and defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: str | None
    exact_window: bool


def settings_of(config: "SampleConfig") -> Settings:
    return Settings(**{name: getattr(config, name) for name in Settings.__annotations__})


@dataclass(frozen=True, eq=False)
class Source:
    """What is known of a trained model without its parameters."""

    name: str  # a run's folder, or the name or folder of a GPT-2
    folder: Path | None  # of a run; None for a GPT-2
    config: "ModelConfig"
    tokenizer: "Tokenizer | None" = field(repr=False)  # None: there is no tokenizer.json

    @property
    def tokenizer_path(self) -> str | None:
        """The path of the tokenizer's file."""
        from nanogpt_jax import gpt2

        path = gpt2.find_tokenizer(self.name)
        return path and str(path)

    def encode(self, prompt: str | None) -> "tuple[Tokenizer, np.ndarray]":
        """Return the tokenizer and the token ids of a prompt; None: the tokenizer's default."""
        from nanogpt_jax.errors import InputError

        if self.tokenizer is None:
            raise InputError(
                f"{self.name} has no tokenizer.json to turn text into tokens: its .bin files came "
                "without their text; put the tokenizer that made them there"
            )
        if prompt == "":
            raise InputError("start must have at least one character, but is empty: leave it out")
        return self.tokenizer, self.tokenizer.encode_prompt(prompt or self.tokenizer.default_start)


@dataclass(frozen=True, eq=False)
class TrainedModel(Source):
    """A model with its parameters: `model.apply({"params": params}, tokens_BT)` gives logits."""

    model: "Model"
    params: dict = field(repr=False)  # float32, by GPT-2's names
    step: int | None  # of the checkpoint; None for a GPT-2


def find(source: str | os.PathLike | None = None) -> Source:
    """Return a model's shape and tokenizer without importing JAX; see `load`."""
    from nanogpt_jax import gpt2
    from nanogpt_jax.config import GPT2_SHAPES
    from nanogpt_jax.corpora import read_tokenizer
    from nanogpt_jax.errors import InputError, did_you_mean
    from nanogpt_jax.run import newest, read_model_config

    if source is not None and gpt2.is_gpt2(source):
        name, folder = str(source), None
        config = gpt2.read_config(name)
    else:
        folder = newest() if source is None else Path(source)
        name, config_path = str(folder), folder / "config.json"
        if not os.path.isfile(config_path):
            hint = "" if os.path.isdir(folder) else did_you_mean(folder.name, GPT2_SHAPES)
            for outer in folder.parents:
                if os.path.isfile(outer / "config.json"):
                    hint = f" Did you mean {outer}?"
            raise InputError(
                "a model must be a run's folder, like out/small, a folder with a Hugging Face "
                f"GPT-2, or {', '.join(GPT2_SHAPES)}, but there is no {config_path}.{hint}"
            )
        config = read_model_config(folder)
    path = gpt2.find_tokenizer(name)
    tokenizer = path and read_tokenizer(path)
    n_tokens, n_known = tokenizer.vocab_size if tokenizer else 0, config.vocab_size or 0
    if n_tokens > n_known:
        resize = f"make room for them with transformers' resize_token_embeddings({n_tokens})"
        raise InputError(
            f"{path}: must have at most the {n_known} tokens of the model's embedding, but has "
            f"{n_tokens}: {'put its own back' if folder else resize}"
        )
    if tokenizer and folder is None:  # the embedding may be padded
        config = replace(config, known_tokens=n_tokens)
    return Source(name, folder, config, tokenizer)


def load(
    source: str | os.PathLike | Source | None = None,
    *,
    checkpoint: Literal["best", "latest"] = "best",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> TrainedModel:
    """Load a trained model onto the first device: model, params, tokenizer, config and step.

    Raises InputError if there is no such model, no checkpoint yet, or too little memory.

    Args:
        source: a run's folder; a folder with a Hugging Face GPT-2; gpt2, gpt2-medium, gpt2-large or
            gpt2-xl, downloaded once (a Path is always a folder); None: the newest run under out/.
            Or what `find` returned.
        checkpoint: of a run, the one with the lowest validation loss or the newest.
        dtype: of matrix products; auto: bfloat16 or float16 if the device has units for it.
    """
    import jax

    from nanogpt_jax import hardware, sharding, steps
    from nanogpt_jax.config import ComputeConfig, check_value
    from nanogpt_jax.run import load_params

    source = source if isinstance(source, Source) else find(source)
    config = source.config
    check_value("checkpoint", Literal["best", "latest"], checkpoint)
    hardware.warn_of_unused_chip()
    requested = ComputeConfig(dtype=dtype, attention="xla")  # a cached token needs no kernel
    hardware.check_sampling_memory(config, 1, "a smaller model")
    compute, _ = hardware.choose_compute(requested, config, jax.local_devices()[0])
    model = steps.make_model(config, compute)
    abstract = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    abstract = sharding.place(abstract, sharding.make_mesh())
    params, origin = load_params(source, config, abstract, checkpoint)
    step = origin["step"] if origin else None
    return TrainedModel(source.name, source.folder, config, source.tokenizer, model, params, step)


def generate(
    run: TrainedModel, prompt: str | None = None, *, num_samples: int = 1,
    **settings: Unpack[Settings],
) -> str | list[str]:  # fmt: skip
    """Return the prompt and what the model writes after it; a list of texts if num_samples > 1.

    Raises InputError for a setting out of range, an unknown character, or too little memory.

    Args:
        prompt: None: a line break, which is left out of the text.
        settings: see `Settings`; sample n of a seed is the same text however many are drawn.
    """
    from nanogpt_jax import decoding, hardware
    from nanogpt_jax.config import SampleConfig

    config = SampleConfig(num_samples=num_samples, **settings)  # refuses what is out of range
    tokenizer, tokens = run.encode(prompt)
    n_rows = 1 if config.exact_window else num_samples  # of the cache
    hardware.check_sampling_memory(run.config, n_rows, "fewer --num_samples, or a smaller model")
    tokens_BN = decoding.generate(
        run.model,
        run.params,
        tokens[None].repeat(num_samples, axis=0),
        decoding.row_keys(config.seed, range(num_samples)),
        config.max_new_tokens,
        decoding.Sampling(config.temperature, config.top_k, config.top_p),
        config.exact_window,
    )
    new_texts = map(tokenizer.decode, tokens_BN)
    texts = [(prompt or "") + "".join(until(config.stop, [text])) for text in new_texts]
    return texts if num_samples > 1 else texts[0]


def stream(
    run: TrainedModel, prompt: str | None = None, *, sample: int = 0, n_generated: int = 0,
    **settings: Unpack[Settings],
) -> Iterator[str]:  # fmt: skip
    """Yield what the model writes after the prompt, token by token; otherwise as `generate`.

    Args:
        sample: which one of `generate`'s samples.
        n_generated: how many tokens at the prompt's end were generated before: the text continues
            with the random numbers that follow theirs.
        settings: see `Settings`; with max_new_tokens=-1 the text never ends.
    """
    from nanogpt_jax import decoding
    from nanogpt_jax.config import SampleConfig

    config = SampleConfig(stream=True, **settings)
    tokenizer, tokens = run.encode(prompt)
    sampling = decoding.Sampling(config.temperature, config.top_k, config.top_p)

    def pieces() -> Iterator[str]:
        keys_B = decoding.row_keys(config.seed, range(sample, sample + 1))
        new_tokens = decoding.write(
            run.model, run.params, tokens[None], keys_B, sampling, config.exact_window, n_generated
        )
        decode, n_left = tokenizer.stream_decoder(), config.max_new_tokens
        while n_left:  # from -1 it never comes to 0
            n_left -= 1
            yield decode(next(new_tokens)[0], final=n_left == 0)

    return until(config.stop, pieces())


def until(stop: str | None, pieces: Iterable[str]) -> Iterator[str]:
    """Yield text as it comes, up to the first occurrence of `stop`, even if pieces split it."""
    held = ""  # what may turn out to be the beginning of `stop`
    for piece in pieces:
        held += piece
        if stop and stop in held:
            yield held[: held.index(stop)]
            return
        free = max(0, len(held) - len(stop) + 1) if stop else len(held)
        yield held[:free]
        held = held[free:]
    if held:
        yield held
