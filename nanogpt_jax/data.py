"""Open token files, and the batch of (seed, split, step) as a pure function. No JAX.

A batch is where its windows begin: B offsets into one long array of token ids. Nothing is shuffled
or carried from step to step, so a resumed run reads exactly what an uninterrupted one would have.
"""

import bisect
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nanogpt_jax.errors import InputError

SPLITS = ("train", "val")
# A split of at most this many bytes lies on the device; of a larger one only its next windows do.
RESIDENT_BYTES = 256 * 2**20
MOST_STEPS_PER_DISPATCH = 1024
MOST_OFFSETS = 2**21  # of a dispatch
MOST_EVAL_TOKENS = 2**30


def check_whole(path: Path, dtype: str) -> int:
    """Return the size in bytes of a `.bin` file.

    Raises:
        InputError: there is none, or it does not hold whole ids.
    """
    if not path.is_file():
        raise InputError(f"{path}: must exist, but there is no such file")
    n_bytes, width = path.stat().st_size, np.dtype(dtype).itemsize
    if n_bytes % width:
        raise InputError(
            f"{path}: must hold whole {dtype} ids, {width} bytes each, but has {n_bytes} bytes: "
            "it is cut off, make it anew"
        )
    return n_bytes


class Shards:
    """Many files of tokens as one array of shape (n_tokens,), read only and never in memory.

    What `read_windows` reads of it is checked, since all of it is too much to check at each start.

    Args:
        paths: of the files, in their order.
        vocab_size: what ids must be below.
    """

    def __init__(self, paths: Sequence[Path], parts: Sequence[np.ndarray], vocab_size: int):
        self.paths, self.vocab_size = paths, vocab_size
        self._parts = [np.asarray(part) for part in parts]  # slices of a memmap cost more
        self._begins = [0, *itertools.accumulate(len(part) for part in parts)]
        self.dtype = parts[0].dtype
        self.itemsize = self.dtype.itemsize
        self.shape = (self._begins[-1],)
        self.nbytes = len(self) * self.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | int) -> np.ndarray:
        if not isinstance(index, slice):
            at = range(len(self))[index]
            return self[at : at + 1][0]
        begin, end, step = index.indices(len(self))
        if step != 1:
            raise ValueError("shards are read in steps of 1")
        first = bisect.bisect_right(self._begins, begin) - 1
        part, start = self._parts[min(first, len(self._parts) - 1)], self._begins[first]
        if end - start <= len(part):  # as nearly always
            return part[begin - start : max(begin, end) - start]
        last = bisect.bisect_left(self._begins, end) - 1
        return np.concatenate(
            [
                self._parts[i][max(0, begin - self._begins[i]) : end - self._begins[i]]
                for i in range(first, last + 1)
            ]
        )

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("many files cannot be one array without a copy")
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)

    def check(self, windows: np.ndarray, offsets: np.ndarray) -> None:
        """Refuse windows of shape (n, length), which begin at offsets, with an id past the end.

        Raises:
            InputError: naming the file and the place in it.
        """
        if windows.size and int(windows.max()) >= self.vocab_size:
            row, column = np.unravel_index(windows.argmax(), windows.shape)
            at = int(offsets[row] + column)
            i = bisect.bisect_right(self._begins, at) - 1
            raise _past_vocabulary(
                self.paths[i], self.vocab_size, at - self._begins[i], windows[row, column]
            )


Tokens: TypeAlias = np.ndarray | Shards


def _past_vocabulary(path: Path, vocab_size: int, at: int, found: int) -> InputError:
    return InputError(
        f"{path}: ids must be below the vocabulary's size {vocab_size}, but token {at} is "
        f"{found}: is this the right tokenizer or --vocab_size?"
    )


def open_tokens(
    paths: Path | Sequence[Path],
    dtype: str,
    vocab_size: int,
    min_tokens: int,
    crc32: int | None = None,
) -> tuple[Tokens, int]:
    """Map the `.bin` files of a split, of little-endian ids, and check all of them.

    A gather on the device clamps an id past the vocabulary, or reads NaN, without a word; so
    whatever is wrong with a file must be found here.

    Args:
        paths: one file or several, in their order.
        crc32: what the split had when it was made. It is trusted where the split is not resident,
            and then its ids are checked as they are read.

    Returns:
        The ids, read-only, of shape (n,), and the CRC32 of the files' bytes.

    Raises:
        InputError: a file is missing, cut off, too short, damaged, or holds an id >= vocab_size.
    """
    paths = [paths] if isinstance(paths, Path) else paths
    n_bytes, width = sum(check_whole(path, dtype) for path in paths), np.dtype(dtype).itemsize
    if n_bytes // width < min_tokens:
        raise InputError(
            f"{paths[0]}: must hold at least block_size + 1 = {min_tokens} tokens, "
            f"but has {n_bytes // width}: use more text or a smaller --block_size"
        )
    paths = [path for path in paths if path.stat().st_size]
    parts = [np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r") for path in paths]
    tokens = parts[0] if len(parts) == 1 else Shards(paths, parts, vocab_size)
    if crc32 is not None and not is_resident(tokens):
        return Shards(paths, parts, vocab_size), crc32
    found = 0
    for path, part in zip(paths, parts, strict=True):
        for begin in range(0, len(part), 2**24):  # piece by piece: a corpus may exceed the memory
            piece = np.asarray(part[begin : begin + 2**24])
            if (largest := int(piece.max())) >= vocab_size:
                raise _past_vocabulary(path, vocab_size, begin + int(piece.argmax()), largest)
            found = zlib.crc32(piece, found)
    if crc32 not in (None, found):
        raise InputError(
            f"{paths[0].parent}: its token files must have the checksum that meta.json says, but "
            f"{', '.join(path.name for path in paths)} changed: delete the folder and make it anew"
        )
    return np.asarray(tokens) if len(parts) > 1 and is_resident(tokens) else tokens, found


def batch_offsets(
    seed: int, split: str, step: int, n_tokens: int, block_size: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return where each window of a step's batch begins, int64 of the given shape.

    Uniform over every window of block_size + 1 tokens, drawn with replacement, as in nanoGPT.
    Philox is a counter-based generator: (seed, split) is its key and the step its counter, so any
    step's batch is had at once, and raw words, unlike `Generator.integers`, never change between
    versions of NumPy. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    n_windows = n_tokens - block_size
    # 2**64 counters apart: no two steps can overlap
    philox = np.random.Philox(key=[seed, SPLITS.index(split)], counter=[0, step, 0, 0])
    words = philox.random_raw(int(np.prod(shape)))
    return (words % np.uint64(n_windows)).astype(np.int64).reshape(shape)


def is_resident(tokens: Tokens) -> bool:
    """Return whether a split lies on the device as a whole."""
    return tokens.nbytes <= RESIDENT_BYTES


def read_windows(tokens: Tokens, offsets: np.ndarray, length: int) -> np.ndarray:
    """Return the windows that begin at offsets of shape (...): ids of shape (..., length).

    Raises:
        InputError: an id past the vocabulary, in shards that were not checked at the start.
    """
    source = tokens if isinstance(tokens, Shards) else np.asarray(tokens)
    flat = offsets.ravel()
    windows = np.empty((len(flat), length), tokens.dtype)
    for row, offset in enumerate(flat.tolist()):  # a window is one stretch of a file
        windows[row] = source[offset : offset + length]
    if isinstance(tokens, Shards):
        tokens.check(windows, flat)
    return windows.reshape(*offsets.shape, length)


class TrainBatches:
    """Where the batches of a run begin, some steps at a time.

    Args:
        tokens: ids of the train split, of shape (n_tokens,).
        shape: (A, B): micro-batches of an update, sequences in each.
        most_steps: N, steps that one call of `offsets` can hold; fewer where the windows
            themselves go to the device, and are large.
    """

    def __init__(self, tokens, seed: int, block_size: int, shape: tuple[int, int], most_steps: int):
        self.n_tokens, self.seed, self.block_size, self.shape = (
            len(tokens), seed, block_size, shape
        )  # fmt: skip
        step_bytes = int(np.prod(shape)) * (block_size + 1) * tokens.itemsize
        within = MOST_OFFSETS // int(np.prod(shape))
        if not is_resident(tokens):
            within = min(within, RESIDENT_BYTES // 8 // step_bytes)
        self.most_steps = max(1, min(most_steps, within))

    def offsets(self, step: int, n_steps: int) -> np.ndarray:
        """Return offsets_NAB of the n_steps <= N steps from `step` on, the rest zeros."""
        offsets_NAB = np.zeros((self.most_steps, *self.shape), np.int64)
        for i in range(n_steps):
            offsets_NAB[i] = batch_offsets(
                self.seed, "train", step + i, self.n_tokens, self.block_size, self.shape
            )
        return offsets_NAB


def eval_batches(
    tokens, block_size: int, batch_size: int, n_batches: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return (offsets_NB, counts_NB): the fixed windows of every evaluation.

    With n_batches = 0 each token but the first is predicted exactly once: windows lie end to end,
    and the last one, where the rest is shorter, reaches back so that it is whole but counts only
    its last targets. Otherwise that many batches of windows, evenly spread over the split. What is
    missing to a whole last batch are windows that count nothing.

    Raises:
        InputError: more of a split than can be evaluated at once.
    """
    n_windows = -(-(len(tokens) - 1) // block_size)
    n_chosen = min(n_windows, n_batches * batch_size or n_windows)
    if n_chosen * block_size >= MOST_EVAL_TOKENS:
        raise InputError(
            f"eval_iters must be given for a validation split of {len(tokens):,} tokens, which is "
            f"too large to be evaluated in whole: like --eval_iters 200, got {n_batches}"
        )
    chosen = np.linspace(0, n_windows - 1, n_chosen).round().astype(np.int64)
    starts = chosen * block_size
    offsets = np.minimum(starts, len(tokens) - 1 - block_size)
    counts = np.minimum(block_size, len(tokens) - 1 - starts)
    fill = (0, -len(offsets) % batch_size)
    offsets_NB = np.pad(offsets, fill).reshape(-1, batch_size)
    counts_NB = np.pad(counts, fill).reshape(-1, batch_size).astype(np.int32)
    return offsets_NB, counts_NB
