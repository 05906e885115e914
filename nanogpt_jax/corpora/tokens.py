"""Open token files, check them, and read them as one array."""

import bisect
import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nanogpt_jax.errors import InputError

CHECKED_BYTES = 256 * 2**20  # a larger split is not checked at each start, but when it is read
PIECE_TOKENS = 2**24  # read at a time, since a split may be larger than memory


class TokenFiles:
    """Files of token ids as one array of shape (n_tokens,), never loaded: slices are read.

    Args:
        parts: the ids of each file, mapped.
        vocab_size: what ids must be below.
        is_checked: whether all ids are known to be; otherwise each slice is checked.
    """

    def __init__(
        self, paths: list[Path], parts: list[np.ndarray], vocab_size: int, is_checked: bool
    ):
        self._paths, self._vocab_size, self._is_checked = paths, vocab_size, is_checked
        self._parts = [np.asarray(part) for part in parts]  # slicing a memmap is slower
        self._begins = [0, *itertools.accumulate(map(len, parts))]
        self.dtype = parts[0].dtype
        self.nbytes = len(self) * self.dtype.itemsize

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: slice) -> np.ndarray:
        """Return a slice of the ids, or raise InputError if one is past the vocabulary."""
        begin, end, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"token files are read in steps of 1, not {step}")
        first = max(0, min(bisect.bisect_right(self._begins, begin), len(self._parts)) - 1)
        last = max(first + 1, bisect.bisect_left(self._begins, end))
        pieces = []
        for i in range(first, last):
            offset = max(0, begin - self._begins[i])
            piece = self._parts[i][offset : max(0, end - self._begins[i])]
            if not self._is_checked:
                check_ids(piece, self._vocab_size, self._paths[i], offset)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


Tokens: TypeAlias = np.ndarray | TokenFiles


def check_ids(ids: np.ndarray, vocab_size: int, path: Path, offset: int = 0) -> None:
    """Refuse ids past the vocabulary, which a gather on the device would silently clamp."""
    if ids.size and (largest := int(ids.max())) >= vocab_size:
        raise InputError(
            f"{path}: ids must be below the vocabulary's size {vocab_size}, but token "
            f"{offset + int(ids.argmax())} is {largest}: pass the tokenizer that made the file "
            "with --tokenizer, or a larger --vocab_size"
        )


def pieces_of(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yield all ids, some at a time."""
    for begin in range(0, len(tokens), PIECE_TOKENS):
        yield tokens[begin : begin + PIECE_TOKENS]


def check_size(path: Path, dtype: str) -> int:
    """Return the number of ids in a `.bin` file; refuse a missing or cut off one."""
    if not path.is_file():
        raise InputError(f"{path}: must exist, but there is no such file: prepare the corpus again")
    n_bytes, width = path.stat().st_size, np.dtype(dtype).itemsize
    if n_bytes % width:
        raise InputError(
            f"{path}: must hold whole {dtype} ids, {width} bytes each, but has {n_bytes} bytes: "
            "it was cut off; copy or prepare it again"
        )
    return n_bytes // width


def map_files(paths: list[Path], dtype: str) -> list[np.ndarray]:
    """Map `.bin` files of little-endian ids, read-only; an empty one cannot be mapped."""
    paths = [path for path in paths if path.exists() and path.stat().st_size]
    return [np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r") for path in paths]


def open_tokens(
    paths: list[Path], dtype: str, vocab_size: int, min_tokens: int, crc32: int | None = None
) -> tuple[Tokens, int]:
    """Open and check the `.bin` files of a split.

    Args:
        paths: in their order.
        crc32: of the split when it was made. If the split is too large to check at each start,
            its checksum is trusted and its ids are checked when they are read.

    Returns:
        The ids, read-only, of shape (n,), and the CRC32 of the files' bytes.

    Raises:
        InputError: a file is missing, cut off, too short, damaged, or has an id >= vocab_size.
    """
    n_tokens = sum(check_size(path, dtype) for path in paths)
    if n_tokens < min_tokens:
        raise InputError(
            f"{paths[0]}: must hold at least block_size + 1 = {min_tokens} tokens, "
            f"but has {n_tokens}: use more text or a smaller --block_size"
        )
    paths = [path for path in paths if path.stat().st_size]
    parts = map_files(paths, dtype)
    is_small = n_tokens * parts[0].itemsize <= CHECKED_BYTES
    if crc32 is not None and not is_small:
        return TokenFiles(paths, parts, vocab_size, is_checked=False), crc32
    found = 0
    for path, part in zip(paths, parts, strict=True):
        for i, piece in enumerate(pieces_of(part)):
            check_ids(piece, vocab_size, path, i * PIECE_TOKENS)
            found = zlib.crc32(piece.data, found)
    if crc32 not in (None, found):
        names = ", ".join(path.name for path in paths)
        raise InputError(
            f"{paths[0].parent}: the token files must have the checksum in meta.json, but {names} "
            "changed: delete the folder and prepare it again"
        )
    if is_small:
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)), found
    return TokenFiles(paths, parts, vocab_size, is_checked=True), found
