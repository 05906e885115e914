"""The weights that a run starts from: a GPT-2's or another run's, as `nanogpt_jax.find` found them.

A source of None is a start from scratch. JAX is imported only to load weights.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanogpt_jax import gpt2
from nanogpt_jax.config import REGULARIZATION, SCRATCH, ModelConfig, TrainConfig
from nanogpt_jax.corpora import TOKENIZER_FILE, Corpus
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import ALONE, Processes
from nanogpt_jax.run.folder import CHECKPOINTS, named_folder, saved_steps

if TYPE_CHECKING:
    from nanogpt_jax import Source

Checkpoint = Literal["best", "latest"]


def adopt(config: TrainConfig) -> "tuple[TrainConfig, Source | None]":
    """Find the weights that a run starts from; return a configuration of their shape, and them."""
    if config.init_from == SCRATCH:
        return config, None
    import nanogpt_jax

    folder = named_folder(config)
    # A run that resumes has all it needs: what it once started from may be gone.
    is_resuming = folder and not config.overwrite and saved_steps(folder / CHECKPOINTS)
    source = nanogpt_jax.find(folder if is_resuming else config.init_from)
    return adopt_shape(config, source), source


def adopt_shape(config: TrainConfig, source: "Source") -> TrainConfig:
    """Return a configuration whose model has the shape of the weights that it starts from.

    The context (which may be shorter), regularization and padding of the vocabulary stay as they
    were requested.
    """
    ours, theirs = config.model, source.config
    if ours.block_size > theirs.block_size and theirs.positions == "learned":
        raise InputError(
            f"block_size must be at most {theirs.block_size} with the weights of {source.name}, "
            f"got {ours.block_size}: add --block_size {theirs.block_size}"
        )
    n_tokens = theirs.known_tokens or theirs.vocab_size or 0
    if ours.vocab_size is not None and ours.vocab_size < n_tokens:
        raise InputError(
            f"vocab_size must be at least {n_tokens} with the weights of {source.name}, "
            f"got {ours.vocab_size}: leave it out"
        )
    kept = {name: getattr(ours, name) for name in ("block_size", *REGULARIZATION)}
    kept["vocab_size"] = ours.vocab_size or theirs.vocab_size
    if theirs.architecture == "gpt":
        kept["known_tokens"] = n_tokens
    return replace(config, model=replace(theirs, **kept))


def adopt_tokenizer(config: TrainConfig, source: "Source | None", corpus: Corpus) -> Corpus:
    """Return a corpus of the tokens that the weights know.

    One without a tokenizer gets theirs, and cannot be checked; for weights without one, --tokenizer
    is trusted. Raises InputError if the tokens are others, or unknown.
    """
    if source is None or (corpus.tokenizer is None and source.tokenizer is None):
        return corpus
    if corpus.tokenizer is None:
        print(f"{corpus.name} has no tokenizer; its tokens should be those of {source.name}")
        return replace(corpus, tokenizer=source.tokenizer)
    if source.tokenizer is None and config.tokenizer is None:
        raise InputError(
            f"{source.name} has no {TOKENIZER_FILE}, so the tokens that its weights know are "
            "unknown: put the tokenizer they were trained with there, or name it with --tokenizer"
        )
    if source.tokenizer and corpus.tokenizer.token_bytes != source.tokenizer.token_bytes:
        raise InputError(
            f"dataset must consist of the tokens that the weights of {source.name} know, but has "
            "others: drop --tokenizer, and pass the text itself as --dataset"
        )
    return corpus


def check_weights(source: "Source") -> None:
    """Open the weights, downloaded if necessary; raise InputError if there are none."""
    if source.folder is None:
        gpt2.open_tensors(source.name)
    elif not saved_steps(source.folder / CHECKPOINTS):
        raise InputError(f"{source.name} has no checkpoint yet: train it first")


def load_params(
    source: "Source", config: ModelConfig, abstract_params,
    checkpoint: Checkpoint = "best", processes: Processes = ALONE,
) -> tuple[dict, dict | None]:  # fmt: skip
    """Return (parameters, the step and checksum of their checkpoint); None for a GPT-2's last.

    A shorter context takes the first positions. The rows of a padded vocabulary are zero, and
    `GPT.head` masks them. Raises InputError if there is no checkpoint, or all are damaged.

    Args:
        config: the source's own, or what `adopt_shape` made of it.
        abstract_params: the model's shapes with their shardings.
        checkpoint: of a run, the one with the lowest validation loss or the newest.
    """
    if source.folder is None:
        return gpt2.load_params(source.name, config, abstract_params), None
    import jax
    import numpy as np
    from jax import lax

    from nanogpt_jax import sharding, steps

    init_params = partial(steps.init_params, steps.make_model(source.config))
    mesh = jax.tree.leaves(abstract_params)[0].sharding.mesh
    stored = sharding.place(jax.eval_shape(init_params, jax.random.key(0)), mesh)
    params, origin = read_checkpoint(source.folder, stored, checkpoint, processes)

    def fit(array, abstract):  # negative padding cuts off
        padding = [(0, new - old, 0) for old, new in zip(array.shape, abstract.shape, strict=True)]
        pad = partial(lax.pad, padding_value=np.float32(0), padding_config=padding)
        is_same = array.shape == abstract.shape
        return array if is_same else jax.jit(pad, out_shardings=abstract.sharding)(array)

    return jax.tree.map(fit, params, abstract_params), origin


def read_checkpoint(
    folder: Path, abstract_params, checkpoint: Checkpoint, processes: Processes
) -> tuple[dict, dict]:
    """Return (parameters, their step and checksum) of a run's checkpoint; see `load_params`."""
    from nanogpt_jax.run.checkpoint import CheckpointReader

    checkpoints = CheckpointReader(folder / CHECKPOINTS, processes)
    prefer = checkpoints.best_step() if checkpoint == "best" else None
    restored = checkpoints.restore_params(abstract_params, prefer)
    checkpoints.close()
    if restored is None:
        raise InputError(f"{folder} has no checkpoint yet: train it first")
    params, step = restored
    return params, {"step": step, "checksum": checkpoints.checksum(step)}
