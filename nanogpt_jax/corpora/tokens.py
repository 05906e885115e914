"""Token files: open, check and read them as one array. No JAX."""

import bisect
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nanogpt_jax.data import is_resident
from nanogpt_jax.errors import InputError


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
