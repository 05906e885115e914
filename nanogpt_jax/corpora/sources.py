"""What a corpus is read from: text, JSONL and Parquet files, corpora of the Hugging Face hub.

A source is scanned once, and then read as a stream of pieces. Reading can resume after a piece.
"""

import gzip
import hashlib
import importlib
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nanogpt_jax.corpora import text as texts
from nanogpt_jax.corpora.text import cut_text, read_pieces
from nanogpt_jax.errors import InputError, first_line, reading

TIMEOUT_S = 10
TRAIN_FRACTION = 0.9
MAX_VAL_CHARS = 10_000_000  # enough to know a loss to 0.001, and evaluated in a minute


@dataclass(frozen=True)
class Piece:
    """A piece of text, or the separator between two documents."""

    split: str  # "train" or "val"
    text: str | None  # None: the tokenizer's separator
    done: int  # how much of the source's `size` has been read, this piece included
    position: tuple | None = None  # where the next piece begins; None: reading cannot resume here


def train_characters(n_chars: int) -> int:
    """Return how many characters of a text are for training: nanoGPT's nine tenths, or more."""
    return max(int(n_chars * TRAIN_FRACTION), n_chars - MAX_VAL_CHARS)


class _Files:
    """Files, which are read in their order; or, without any, the content of one."""

    unit = "B"
    growth = 1  # bytes of text per byte of file, about
    requirement = "a text file"

    def __init__(self, name: str, files: list[Path], content: bytes = b""):
        self.name, self._files, self._content = name, files, content
        sizes = [stat.st_size for stat in self._stats()] or [len(content)]
        self._begins = [0, *itertools.accumulate(sizes)]
        self.size = self._begins[-1]
        self.text_bytes = self.size * self.growth

    def _stats(self) -> Iterator[os.stat_result]:
        for file in self._files:
            with reading(file, "a file"):
                yield file.stat()

    def stat(self) -> str | None:
        """Return a hash of the files' names, sizes and times: if it is unchanged, so are they."""
        if not self._files:
            return None
        digest = hashlib.sha256()
        for file, stat in zip(self._files, self._stats(), strict=True):
            digest.update(os.fsencode(file.name))
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _info(self, sha256: str, chars: set[str] | None) -> dict:
        """Return what identifies a text. Positions depend on the files' sizes too."""
        info = {"sha256": sha256, "sizes": hashlib.sha256(repr(self._begins).encode()).hexdigest()}
        return info | ({"chars": "".join(sorted(chars))} if chars else {})


class Texts(_Files):
    """One text: files joined by the tokenizer's separator, which counts as one character."""

    split_in_words = "the last tenth of the characters, at most 10 million, is for validation"

    def scan(self, wants_chars: bool, advance: Callable[[int], object]) -> dict:
        """Read everything once; return its `sha256`, number of `characters` and distinct `chars`.

        `advance` is called with how much of `size` has been read.
        """
        digest, n_chars, chars, is_empty = hashlib.sha256(), 0, set(), True
        for text, done, _ in self._read(0, 0):
            text = text or "\n"
            digest.update(text.encode())
            n_chars += len(text)
            is_empty = is_empty and not text.strip()
            if wants_chars:
                chars |= set(text)
            advance(done)
        if is_empty:
            raise InputError(f"{self.name}: must contain text, but is empty: pass another file")
        return self._info(digest.hexdigest(), chars) | {"characters": n_chars}

    def pieces(self, info: dict, position: Any = None) -> Iterator[Piece]:
        """Yield the pieces after a position, given what `scan` returned."""
        cut = train_characters(info["characters"])
        first, begin, at = position or (0, 0, 0)
        for text, done, where in self._read(first, begin):
            length = len(text or "\n")
            n_train = max(0, min(length, cut - at))
            at += length
            if text and 0 < n_train < length:
                yield Piece("train", text[:n_train], done)
                text, n_train = text[n_train:], 0
            here = (*where, at) if text else None
            yield Piece("train" if n_train else "val", text, done, here)

    def _read(self, first: int, begin: int) -> Iterator[tuple[str | None, int, tuple[int, int]]]:
        """Yield each piece, or None between two files, how much is read, and where that is."""
        for i in range(first, len(self._begins) - 1):
            if i and not begin:
                yield None, self._begins[i], (i, 0)
            for text, offset in self._read_file(i, begin):
                yield text, self._begins[i] + offset, (i, offset)
            begin = 0

    def _read_file(self, i: int, begin: int) -> Iterator[tuple[str, int]]:
        if not self._files:
            yield from read_pieces(io.BytesIO(self._content), self.name, begin)
            return
        with reading(self._files[i], self.requirement), self._files[i].open("rb") as file:
            yield from read_pieces(file, str(self._files[i]), begin)


# A document's text, how much of the source's `size` is read with it, and the position after it.
Document: TypeAlias = tuple[str | None, int, Callable[[], Any]]


class _Documents:
    """Documents in a fixed order, each `every`-th for validation; an empty one is skipped."""

    every, max_val_chars = 10, MAX_VAL_CHARS
    split_in_words = "every 10th document, until they have 10 million characters, is for validation"

    def read(self, info: dict, where: Any) -> Iterator[Document]:
        """Yield the documents after a position."""
        raise NotImplementedError

    def pieces(self, info: dict, position: Any = None) -> Iterator[Piece]:
        """Yield the pieces after a position, given what `scan` returned."""
        n, n_val, val_chars, where = position or (0, 0, 0, None)
        since = 0
        for text, done, at in self.read(info, where):
            if not text:
                continue
            n += 1
            is_val = n % self.every == 0 and val_chars < self.max_val_chars
            split = "val" if is_val else "train"
            if (n_val if is_val else n - 1 - n_val) > 0:
                yield Piece(split, None, done)
            if is_val:
                n_val, val_chars = n_val + 1, val_chars + len(text)
            *parts, last = cut_text(text)
            for part in parts:
                yield Piece(split, part, done)
            here, since = None, since + len(text)
            if since >= texts.PIECE_BYTES:  # not after each of many short documents
                here, since = (n, n_val, val_chars, at()), 0
            yield Piece(split, last, done, here)


class _DocumentFiles(_Documents, _Files):
    def scan(self, wants_chars: bool, advance: Callable[[int], object]) -> dict:
        """Read everything once; return its `sha256`, and distinct `chars` if they are wanted."""
        digest, done, chars = hashlib.sha256(), 0, set()
        for path in self._files:
            with reading(path, self.requirement), path.open("rb") as file:
                while content := file.read(2**20):
                    digest.update(content)
                    done += len(content)
                    advance(done)
        if wants_chars:
            chars = {"\n"}  # the separator
            for text, done, _ in self.read({}, None):
                chars |= set(text or "")
                advance(done)
        return self._info(digest.hexdigest(), chars)

    def read(self, info: dict, where: Any) -> Iterator[Document]:
        first, n_read = where or (0, 0)
        for i in range(first, len(self._files)):
            path = self._files[i]
            with reading(path, self.requirement):
                for n, (item, done) in enumerate(self._items(path), 1):
                    if n > n_read:
                        text = self._text(item, f"{path}, line {n}")
                        yield text, self._begins[i] + done, lambda i=i, n=n: (i, n)
            n_read = 0

    def _items(self, path: Path) -> Iterator[tuple[Any, int]]:
        """Yield what each line or row of a file has, and how many bytes have been read then."""
        raise NotImplementedError

    def _text(self, item: Any, place: str) -> str | None:
        """Return the text in a line or row."""
        return item


class JsonLines(_DocumentFiles):
    """JSONL files, gzipped or not: an object with a `text` on each line."""

    requirement = "JSON lines, as .gz complete (if a download was cut off, repeat it)"

    def __init__(self, name: str, files: list[Path]):
        self.growth = 3 if files[0].suffix == ".gz" else 1
        super().__init__(name, files)

    def _items(self, path: Path) -> Iterator[tuple[bytes, int]]:
        with path.open("rb") as stored:
            for line in gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored:
                yield line, stored.tell()

    def _text(self, item: bytes, place: str) -> str | None:
        if not item.strip():
            return None
        try:
            text = json.loads(item)["text"]
            if not isinstance(text, str):
                raise TypeError
            text.encode()  # fails for a lone surrogate, one half of a character
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = " without lone surrogates" if isinstance(error, UnicodeEncodeError) else ""
            shown = item[:60].decode("utf-8", "replace").strip()
            raise InputError(
                f'{place}: must be like {{"text": "..."}}{what}, but is {shown}: correct or remove '
                "it"
            ) from None
        return text


class Parquet(_DocumentFiles):
    """Parquet files with a column `text`."""

    growth = 2
    requirement = "a complete Parquet file (if a download was cut off, repeat it)"

    def _items(self, path: Path) -> Iterator[tuple[str | None, int]]:
        parquet = import_extra("pyarrow.parquet")
        with parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if "string" not in columns.get("text", ""):
                had = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                raise InputError(
                    f"{path}: must have a column text, of strings, but has {had}: rename a column"
                )
            for group in range(file.num_row_groups):
                done = path.stat().st_size * (group + 1) // file.num_row_groups
                for batch in file.iter_batches(64, row_groups=[group], columns=["text"]):
                    yield from ((text, done) for text in batch.column(0).to_pylist())


@dataclass(frozen=True)
class Hub(_Documents):
    """A corpus of the Hugging Face hub, streamed. Sizes are approximate."""

    name: str
    repository: str
    settings: dict  # of load_dataset
    page: str
    size: int  # documents
    gpt2_tokens: int
    text_bytes: int
    download_bytes: int

    unit = " documents"
    every, max_val_chars = 2000, float("inf")
    split_in_words = "every 2000th document is for validation"  # nanoGPT's 0.0005

    def stat(self) -> str:
        """Return a hash of its name; the hub is not asked for a newer revision."""
        return json.dumps([self.repository, self.settings])

    def scan(self, wants_chars: bool, advance: Callable[[int], object]) -> dict:
        """Return the newest `revision`: all documents come from it, even after a restart."""
        del advance
        if wants_chars:
            raise InputError(
                f"{self.name} must have a byte-pair tokenizer, but char was requested: pass "
                "--tokenizer gpt2, bpe or a tokenizer.json"
            )
        _silence(import_extra("datasets"))
        import huggingface_hub

        branch = self.settings.get("revision")
        try:
            found = huggingface_hub.HfApi().dataset_info(
                self.repository, revision=branch, timeout=TIMEOUT_S
            )
        except Exception as error:  # its classes differ between versions
            raise self._unreadable(error, 0) from None
        return {"revision": found.sha}

    def read(self, info: dict, where: Any) -> Iterator[Document]:
        datasets = import_extra("datasets")
        _silence(datasets)
        n_before, state = where or (0, None)
        n = n_before
        try:
            rows = datasets.load_dataset(
                self.repository, **self.settings | info, split="train", streaming=True
            ).select_columns(["text"])
            if state:
                rows.load_state_dict(state)
            for n, row in enumerate(rows, n_before + 1):
                yield row["text"], n, lambda n=n: (n, rows.state_dict())
        except Exception as error:  # its classes differ between versions
            raise self._unreadable(error, n) from None

    def _unreadable(self, error: Exception, n: int) -> InputError:
        return InputError(
            f"{self.name} could not be read from the hub after {n:,} documents "
            f"({first_line(error)}): run the same command again to continue; without a network, "
            f"save the parquet files of {self.page} in a folder and pass that folder instead"
        )


def _silence(datasets) -> None:
    """Hide progress bars and retries of `datasets`: if it fails, the error is one line."""
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "fsspec", "httpx"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


OPENWEBTEXT = Hub(
    "openwebtext",
    "Skylion007/openwebtext",
    {"revision": "refs/convert/parquet"},  # the main branch is a script, which datasets 4 refuses
    "https://huggingface.co/datasets/Skylion007/openwebtext/tree/refs%2Fconvert%2Fparquet",
    size=8_013_769,
    gpt2_tokens=9_040_000_000,
    text_bytes=38_000_000_000,
    download_bytes=24_000_000_000,
)
FINEWEB_EDU = Hub(
    "fineweb-edu",
    "HuggingFaceFW/fineweb-edu",
    {"name": "sample-10BT"},
    "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu/tree/main/sample/10BT",
    size=9_672_101,
    gpt2_tokens=10_000_000_000,
    text_bytes=45_000_000_000,
    download_bytes=27_000_000_000,
)
HUB = {corpus.name: corpus for corpus in (OPENWEBTEXT, FINEWEB_EDU)}
Source: TypeAlias = Texts | JsonLines | Parquet | Hub


def import_extra(module: str) -> Any:
    """Import a module of the extra `corpora`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise InputError(
            f"{name} must be installed to read this corpus: pip install -e '.[corpora]'"
        ) from None
