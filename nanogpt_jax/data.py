"""The batch of (seed, split, step) as a pure function, and its way to the devices.

A batch is where its windows begin: offsets into one long array of token ids. Nothing is shuffled or
carried from step to step, so a resumed run reads exactly what an uninterrupted one would have read.
A split that fits is stored on every device, and its windows are gathered there; of a larger one the
windows themselves are read in the background and sent. Either way the batch of a step is the same.

Array names end in their shape; the letters are explained in model.py.
"""

import itertools
from collections.abc import Generator, Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from nanogpt_jax.config import SPLITS
from nanogpt_jax.errors import InputError
from nanogpt_jax.files import read_ahead
from nanogpt_jax.sharding import by_rows, put, replicated

RESIDENT_BYTES = 256 * 2**20  # a larger split is not stored on the devices
READ_AHEAD = 4
MAX_EVAL_TOKENS = 2**30


class Tokens(Protocol):
    """The token ids of a split: a numpy array of shape (n_tokens,), or files that read like one."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> np.ndarray: ...


class Batch(NamedTuple):
    """What the host sends for a batch; `gather` makes windows of it, inside the compiled step."""

    corpus: jax.Array | None  # all ids of the split; None: it is not stored on the devices
    windows: jax.Array  # where the windows begin; without a corpus, the windows themselves


def gather(batch: Batch, length: int) -> jax.Array:
    """Return the windows of a batch, int32 of shape (..., length)."""
    corpus, windows = batch
    if corpus is None:
        return windows.astype(jnp.int32)
    read = jax.vmap(lambda offset: lax.dynamic_slice(corpus, (offset,), (length,)))
    return read(windows.reshape(-1)).astype(jnp.int32).reshape(*windows.shape, length)


def batch_offsets(
    seed: int, split: str, step: int, n_tokens: int, block_size: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return where each window of a step's batch begins, int64 of the given shape.

    Uniform over every window of block_size + 1 tokens, drawn with replacement, as in nanoGPT.
    Philox is a counter-based generator: (seed, split) is its key and the step its counter, so any
    step's batch can be computed directly; and its raw words, unlike `Generator.integers`, never
    change between versions of NumPy. Source: Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011.
    """
    n_windows = n_tokens - block_size
    # 2**64 counters apart: no two steps can overlap
    philox = np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, step, 0, 0])
    words = philox.random_raw(int(np.prod(shape)))
    return (words % np.uint64(n_windows)).astype(np.int64).reshape(shape)


def read_windows(tokens: Tokens, offsets: np.ndarray, length: int) -> np.ndarray:
    """Return the windows that begin at offsets of shape (...): ids of shape (..., length)."""
    windows = np.empty((offsets.size, length), tokens.dtype)
    for row, offset in enumerate(offsets.ravel().tolist()):
        windows[row] = tokens[offset : offset + length]
    return windows.reshape(*offsets.shape, length)


def is_resident(tokens: Tokens) -> bool:
    """Return whether a split is stored on the devices as a whole."""
    return tokens.nbytes <= RESIDENT_BYTES


def put_corpus(tokens: Tokens, mesh: Mesh) -> jax.Array | None:
    """Put a split that fits onto every device; return None for a larger one."""
    return put(np.asarray(tokens[:]), replicated(mesh)) if is_resident(tokens) else None


def put_batch(
    tokens: Tokens, corpus: jax.Array | None, offsets: np.ndarray, length: int, rows: NamedSharding
) -> Batch:
    """Put the batch that begins at some offsets onto the devices, each process onto its own.

    Args:
        corpus: what `put_corpus` returned.
        rows: the sharding of an array of offsets.
    """
    if corpus is not None:
        return Batch(corpus, put(offsets.astype(np.int32), rows))

    def read(index):  # the rows of one device
        return read_windows(tokens, offsets[index[:-1]], length)

    return Batch(None, jax.make_array_from_callback((*offsets.shape, length), rows, read))


def train_batches(
    tokens: Tokens, seed: int, block_size: int, shape: tuple[int, int], mesh: Mesh,
    start_step: int = 0, n_steps: int = 1,
) -> Generator[Batch]:  # fmt: skip
    """Yield the batches of a run from a step on, n_steps of them at a time: shape (N, A, B).

    Raises InputError if ids are past the vocabulary.

    Args:
        tokens: ids of the train split.
        shape: (A, B): micro-batches in an update, sequences in each.
        start_step: the step of the first batch.
    """
    corpus, rows = put_corpus(tokens, mesh), by_rows(mesh, axis=2)

    def load(first: int) -> Batch:
        of_split = len(tokens), block_size, shape
        steps = range(first, first + n_steps)
        offsets_NAB = np.stack([batch_offsets(seed, "train", s, *of_split) for s in steps])
        return put_batch(tokens, corpus, offsets_NAB, block_size + 1, rows)

    batches = map(load, itertools.count(start_step, n_steps))
    yield from batches if corpus is not None else read_ahead(batches, READ_AHEAD)


def eval_offsets(
    tokens: Tokens, block_size: int, batch_size: int, n_batches: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (offsets_NB, counts_NB): the fixed windows of every evaluation.

    With n_batches = 0 every token but the first is predicted exactly once: the windows are
    adjacent, and the last one, if fewer tokens remain, reaches back so that it is full but counts
    only its last targets. Otherwise it is that many batches of windows, evenly spread over the
    split. Windows that fill up the last batch count nothing. Raises InputError if the split is too
    large to be evaluated whole.
    """
    n_windows = -(-(len(tokens) - 1) // block_size)
    n_chosen = min(n_windows, n_batches * batch_size or n_windows)
    if n_chosen * block_size >= MAX_EVAL_TOKENS:
        raise InputError(
            f"eval_iters must be set for a validation split of {len(tokens):,} tokens, too large "
            f"to evaluate whole; try --eval_iters 200, got {n_batches}"
        )
    chosen = np.linspace(0, n_windows - 1, n_chosen).round().astype(np.int64)
    starts = chosen * block_size
    offsets = np.minimum(starts, len(tokens) - 1 - block_size)
    counts = np.minimum(block_size, len(tokens) - 1 - starts)
    padding = (0, -len(offsets) % batch_size)
    offsets_NB = np.pad(offsets, padding).reshape(-1, batch_size)
    counts_NB = np.pad(counts, padding).reshape(-1, batch_size).astype(np.int32)
    return offsets_NB, counts_NB


class EvalLoader:
    """The fixed batches of every evaluation of a split: iterates over (Batch, counts_B).

    Args:
        tokens: ids of the split.
        n_batches: 0 for the whole split, see `eval_offsets`.
    """

    def __init__(
        self, tokens: Tokens, block_size: int, batch_size: int, mesh: Mesh, n_batches: int = 0
    ):
        self._offsets_NB, self._counts_NB = eval_offsets(tokens, block_size, batch_size, n_batches)
        self._tokens, self._length, self._rows = tokens, block_size + 1, by_rows(mesh, axis=0)
        self._corpus = put_corpus(tokens, mesh)
        self.n_targets = int(self._counts_NB.sum())
        self._placed = list(self._place()) if self._corpus is not None else None  # only offsets

    def __len__(self) -> int:
        return len(self._counts_NB)

    def __iter__(self) -> Iterator[tuple[Batch, jax.Array]]:
        return self._place() if self._placed is None else iter(self._placed)

    def _place(self) -> Iterator[tuple[Batch, jax.Array]]:
        for offsets_B, counts_B in zip(self._offsets_NB, self._counts_NB, strict=True):
            batch = put_batch(self._tokens, self._corpus, offsets_B, self._length, self._rows)
            yield batch, put(counts_B, self._rows)
