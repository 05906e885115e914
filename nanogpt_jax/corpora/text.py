"""Text files as a stream of pieces, each small, each tokenised as a whole. No JAX.

A piece knows its split and where the next one begins, so a stream can be gone on with anywhere;
and what a piece is depends on where it begins alone.
"""

import codecs
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nanogpt_jax.errors import InputError

BATCH_PIECES = 2**15
PIECE_BYTES = 2**16  # a tokenizer wants a hundred times the memory of what it is given
LONGEST_BYTES = 2**18  # of a text in which no place to cut is found: then it is cut anywhere
TRAIN_FRACTION = 0.9
MOST_VAL_CHARS = 10_000_000  # enough to tell a loss to 0.001, and evaluated in a minute
SPLIT_IN_WORDS = "the last tenth of the characters validates, at most 10 million"


@dataclass(frozen=True)
class Piece:
    """A piece of text, or what stands between two documents."""

    split: str  # "train" or "val"
    text: str | None  # None: the tokenizer's separator
    done: int  # how much of the source's `size` is read with it
    position: dict | None  # where the next piece begins; None: no place to go on from


def last_cut(text: str) -> int:
    """Return the last place to cut a text where its tokens stay the same; 0 where there is none.

    It is before a single space between two characters that are none; where there is no such space,
    before a line break like that. GPT-2's pattern begins a new word there, whatever stands before.
    """
    for mark in " \n":
        at = len(text) - 1  # something must follow
        while (at := text.rfind(mark, 1, max(1, at))) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at
    return 0


def cut_text(text: str) -> Iterator[str]:
    """Yield a text in pieces that have the same tokens."""
    begin, length = 0, PIECE_BYTES
    while len(text) - begin > length:
        cut = last_cut(text[begin : begin + length])
        if not cut and length < LONGEST_BYTES:
            length *= 2
            continue
        cut = cut or length
        yield text[begin : begin + cut]
        begin, length = begin + cut, PIECE_BYTES
    if begin < len(text):
        yield text[begin:]


def read_pieces(file: BinaryIO, name: str, offset: int = 0) -> Iterator[tuple[str, int]]:
    """Yield (text, offset of the byte after it) of UTF-8 text, from a byte on.

    A byte order mark is left out and Windows' line ends become "\\n".

    Raises:
        InputError: it is no UTF-8 text, with the byte where that shows.
    """
    if offset == 0:
        file.seek(0)
        offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    length, is_last = PIECE_BYTES, False
    while not is_last:
        file.seek(offset)
        content = file.read(length)
        is_last = len(content) < length
        if (at := content.find(b"\0")) >= 0:
            raise InputError(
                f"{name}: must be UTF-8 text, but is binary (a 0 at byte {offset + at})"
            )
        try:
            text, n_bytes = codecs.utf_8_decode(content, "strict", is_last)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: must be UTF-8 text, but byte {offset + error.start} is "
                f"0x{content[error.start]:02x}: save it as UTF-8"
            ) from None
        if not is_last:
            cut = last_cut(text)
            if not cut and length < LONGEST_BYTES:
                length *= 2
                continue
            text = text[:cut] if cut else text.removesuffix("\r")  # it may be half a line end
            n_bytes = len(text.encode())
        offset, length = offset + n_bytes, PIECE_BYTES
        if text:
            yield text.replace("\r\n", "\n"), offset


def size_of(file: Path) -> int:
    """Return a file's size in bytes.

    Raises:
        InputError: it cannot be read, as a link to nowhere.
    """
    return _stat(file).st_size


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def stat_of(files: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and times of files: where it is the same, so are they."""
    digest = hashlib.sha256()
    for file in files:
        found = _stat(file)
        facts = f"\0{found.st_size}\0{found.st_mtime_ns}\n".encode()
        digest.update(os.fsencode(file.name) + facts)
    return digest.hexdigest()[:16]


def hash_of(sizes: list[int]) -> str:
    """Return a hash of the sizes of files."""
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


class Texts:
    """One text: a file, or several with a separator between them.

    Args:
        name: what messages call it.
        files: in their order, or the text itself.
    """

    unit = "B"
    split_in_words = SPLIT_IN_WORDS

    def __init__(self, name: str, files: list[Path] | str):
        self.name = name
        self._files = [] if isinstance(files, str) else files
        self._content = files.encode() if isinstance(files, str) else None
        self._sizes = [size_of(file) for file in self._files] or [len(self._content or b"")]
        self._begins = [0, *itertools.accumulate(self._sizes)]
        self.size = self.text_bytes = self._begins[-1]

    def stat(self) -> str | None:
        """Return what changes with the files; None of a text that lies in none."""
        return stat_of(self._files) if self._files else None

    def scan(self, wants_chars: bool, advance: Callable[[int], None]) -> dict:
        """Read all of it once; return its `sha256`, number of `characters` and distinct `chars`.

        With the `sizes` of the files, since line ends, which tell nothing, move positions.

        Args:
            advance: is told how much of `size` is read.

        Raises:
            InputError: it is no text, or an empty one.
        """
        digest, n_chars, chars, is_empty = hashlib.sha256(), 0, set(), True
        for i in range(len(self._sizes)):
            if i:
                digest.update(b"\n")
                n_chars += 1
                chars.add("\n")
            for text, offset in self._read(i, 0):
                digest.update(text.encode())
                n_chars += len(text)
                is_empty = is_empty and not text.strip()
                if wants_chars:
                    chars |= set(text)
                advance(self._begins[i] + offset)
        if is_empty:
            raise InputError(f"{self.name}: must hold text, but is empty")
        facts = {"sha256": digest.hexdigest(), "characters": n_chars, "sizes": hash_of(self._sizes)}
        return facts | ({"chars": "".join(sorted(chars))} if wants_chars else {})

    def pieces(self, facts: dict, position: dict | None = None) -> Iterator[Piece]:
        """Yield the pieces from a position on. The separator counts as one character.

        Args:
            facts: what `scan` returned.
        """
        first, begin, at = (position or {"at": (0, 0, 0)})["at"]
        cut = train_characters(facts["characters"])
        for i in range(first, len(self._sizes)):
            begin = begin if i == first else 0
            if i and not begin:
                yield Piece("train" if at < cut else "val", None, self._begins[i], None)
                at += 1
            for text, offset in self._read(i, begin):
                n_train = max(0, min(len(text), cut - at))
                at += len(text)
                here, done = {"at": (i, offset, at)}, self._begins[i] + offset
                if 0 < n_train < len(text):
                    yield Piece("train", text[:n_train], done, None)
                    text = text[n_train:]
                yield Piece("train" if at <= cut else "val", text, done, here)

    def _read(self, i: int, offset: int) -> Iterator[tuple[str, int]]:
        if self._content is not None:
            yield from read_pieces(io.BytesIO(self._content), self.name, offset)
            return
        path = self._files[i]
        try:
            with path.open("rb") as file:
                yield from read_pieces(file, str(path), offset)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def train_characters(n_chars: int) -> int:
    """Return how many characters of a text are trained on: nanoGPT's nine tenths, or more."""
    return max(int(n_chars * TRAIN_FRACTION), n_chars - MOST_VAL_CHARS)


def in_batches(pieces: Iterable[Piece], most_bytes: int) -> Iterator[list[Piece]]:
    """Yield pieces in batches, which end where the source can be gone on with, if at all."""
    batch, n_bytes = [], 0
    for piece in pieces:
        batch.append(piece)
        n_bytes += len((piece.text or "").encode())
        is_full = n_bytes >= most_bytes or len(batch) >= BATCH_PIECES
        if (is_full and piece.position is not None) or n_bytes >= most_bytes + 4 * PIECE_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def read_ahead(batches: Iterator[list]) -> Iterator[list]:
    """Yield batches, and read each in a thread while the one before is worked on."""
    pool = ThreadPoolExecutor(1)
    try:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
