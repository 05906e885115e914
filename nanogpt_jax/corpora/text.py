"""Read text files as a stream of pieces, each small enough to be tokenized as a whole.

A piece knows its split and the position after it, so reading can resume there; where a piece ends
depends only on where it begins.
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

from nanogpt_jax.errors import InputError, reading

BATCH_PIECES = 2**15
PIECE_BYTES = 2**16  # a tokenizer needs a hundred times the memory of its input
LONGEST_BYTES = 2**18  # of a text without a good place to cut; then it is cut anywhere
TRAIN_FRACTION = 0.9
MAX_VAL_CHARS = 10_000_000  # enough to know a loss to 0.001, and evaluated in a minute


@dataclass(frozen=True)
class Piece:
    """A piece of text, or the separator between two documents."""

    split: str  # "train" or "val"
    text: str | None  # None: the tokenizer's separator
    done: int  # how much of the source's `size` has been read, this piece included
    position: dict | None  # where the next piece begins; None: reading cannot resume here


def last_cut(text: str) -> int:
    """Return the last place where cutting a text leaves its tokens unchanged; 0 if there is none.

    That is before a single space between two non-space characters or, without one, before such a
    line break: GPT-2's pattern begins a new word there, whatever comes before.
    """
    for mark in " \n":
        at = len(text) - 1  # something must follow
        while (at := text.rfind(mark, 1, max(1, at))) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at
    return 0


def cut_text(text: str) -> Iterator[str]:
    """Yield a text in pieces that have the tokens of the whole."""
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
    """Yield (text, offset of the byte after it) of a UTF-8 file, starting at a byte offset.

    A byte order mark is skipped, and Windows line ends become line feeds.
    """
    if offset == 0:
        file.seek(0)
        offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    length, is_last = PIECE_BYTES, False
    while not is_last:
        file.seek(offset)
        content = file.read(length)
        is_last = len(content) < length
        text, n_bytes = "", 0
        try:
            text, n_bytes = codecs.utf_8_decode(content, "strict", is_last)
            bad = content.find(b"\0")  # is UTF-8, but only in binary files
        except UnicodeDecodeError as error:
            bad = error.start
        if bad >= 0:
            raise InputError(
                f"{name}: must be UTF-8 text, but byte {offset + bad} is 0x{content[bad]:02x}: "
                "save it as UTF-8"
            )
        if not is_last:
            cut = last_cut(text)
            if not cut and length < LONGEST_BYTES:
                length *= 2
                continue
            text = text[:cut] if cut else text.removesuffix("\r")  # perhaps half a line end
            n_bytes = len(text.encode())
        offset, length = offset + n_bytes, PIECE_BYTES
        if text:
            yield text.replace("\r\n", "\n"), offset


def _stat(file: Path) -> os.stat_result:
    with reading(file, "a file"):
        return file.stat()


def sizes_of(files: list[Path]) -> list[int]:
    """Return files' sizes in bytes."""
    return [_stat(file).st_size for file in files]


def stat_of(files: list[Path]) -> str:
    """Return a hash of files' names, sizes and times: if it is unchanged, so are the files."""
    digest = hashlib.sha256()
    for file in files:
        found = _stat(file)
        digest.update(os.fsencode(file.name))
        digest.update(f"\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def hash_of(sizes: list[int]) -> str:
    """Return a hash of the sizes of files."""
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


class Texts:
    """One text: files, in their order, joined by the tokenizer's separator; or the text itself."""

    unit = "B"
    split_in_words = "the last tenth of the characters, at most 10 million, is for validation"

    def __init__(self, name: str, files: list[Path] | str):
        self.name = name
        self._files = [] if isinstance(files, str) else files
        self._content = files.encode() if isinstance(files, str) else None
        self._sizes = sizes_of(self._files) or [len(self._content or b"")]
        self._begins = [0, *itertools.accumulate(self._sizes)]
        self.size = self.text_bytes = self._begins[-1]

    def stat(self) -> str | None:
        """Return a hash that changes with the files; None for a text without files."""
        return stat_of(self._files) if self._files else None

    def scan(self, wants_chars: bool, advance: Callable[[int], object]) -> dict:
        """Read everything once; return its `sha256`, number of `characters` and distinct `chars`.

        The `sizes` of the files are added since line ends, which the hash ignores, move positions.
        `advance` is called with how much of `size` has been read.
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
            raise InputError(f"{self.name}: must contain text, but is empty: pass another file")
        found = {"sha256": digest.hexdigest(), "characters": n_chars, "sizes": hash_of(self._sizes)}
        return found | ({"chars": "".join(sorted(chars))} if wants_chars else {})

    def pieces(self, source_info: dict, position: dict | None = None) -> Iterator[Piece]:
        """Yield the pieces after a position, given what `scan` returned.

        A separator counts as one character.
        """
        first, begin, at = (position or {"at": (0, 0, 0)})["at"]
        cut = train_characters(source_info["characters"])
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
        with reading(path, "a text file"), path.open("rb") as file:
            yield from read_pieces(file, str(path), offset)


def train_characters(n_chars: int) -> int:
    """Return how many characters of a text are for training: nanoGPT's nine tenths, or more."""
    return max(int(n_chars * TRAIN_FRACTION), n_chars - MAX_VAL_CHARS)


def first_texts(pieces: Iterable[Piece], max_chars: int) -> Iterator[str]:
    """Yield the texts of pieces until they have max_chars characters."""
    left = max_chars
    for piece in pieces:
        if piece.text is not None:
            yield piece.text
            left -= len(piece.text)
        if left <= 0:
            return


def in_batches(pieces: Iterable[Piece], max_bytes: int) -> Iterator[list[Piece]]:
    """Yield pieces in batches, each of which ends where reading can resume, if possible."""
    batch, n_bytes = [], 0
    for piece in pieces:
        batch.append(piece)
        n_bytes += len((piece.text or "").encode())
        is_full = n_bytes >= max_bytes or len(batch) >= BATCH_PIECES
        if (is_full and piece.position is not None) or n_bytes >= max_bytes + 4 * PIECE_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def read_ahead(batches: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
    """Yield batches; read the next one in a thread meanwhile."""
    pool = ThreadPoolExecutor(1)
    try:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
