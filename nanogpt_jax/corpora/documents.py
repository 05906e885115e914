"""Read documents as a stream of pieces: JSONL and Parquet files, corpora of the Hugging Face hub.

A document is its text; an empty or missing one is skipped.
"""

import gzip
import hashlib
import importlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nanogpt_jax.corpora import text as sources
from nanogpt_jax.corpora.text import MAX_VAL_CHARS, PIECE_BYTES, Piece, Texts, cut_text
from nanogpt_jax.errors import InputError, first_line, reading

TIMEOUT_S = 10
# A document's text, how much of the source's `size` is read with it, and the position after it.
Document: TypeAlias = tuple[str, int, Callable[[], dict]]


class Documents:
    """Documents in a fixed order; each `every`-th one is for validation."""

    unit = "B"
    every, max_val_chars = 10, MAX_VAL_CHARS
    split_in_words = "every 10th document, until they have 10 million characters, is for validation"

    def read(self, source_info: dict, where: dict | None) -> Iterator[Document]:
        """Yield the documents after a position."""
        raise NotImplementedError

    def pieces(self, source_info: dict, position: dict | None = None) -> Iterator[Piece]:
        """Yield the pieces after a position."""
        position = position or {"documents": 0, "val_documents": 0, "val_chars": 0, "where": None}
        n, n_val, val_chars = (position[k] for k in ("documents", "val_documents", "val_chars"))
        since = 0
        for text, done, where in self.read(source_info, position["where"]):
            if not text:
                continue
            n += 1
            is_val = n % self.every == 0 and val_chars < self.max_val_chars
            split = "val" if is_val else "train"
            if (n_val if is_val else n - 1 - n_val) > 0:
                yield Piece(split, None, done, None)
            if is_val:
                n_val, val_chars = n_val + 1, val_chars + len(text)
            since += len(text)
            *parts, last = cut_text(text)
            for part in parts:
                yield Piece(split, part, done, None)
            here = None
            if since >= PIECE_BYTES:  # a position after each of many short documents is too much
                counts = {"documents": n, "val_documents": n_val, "val_chars": val_chars}
                here, since = counts | {"where": where()}, 0
            yield Piece(split, last, done, here)


class _Files(Documents):
    """Documents of one or several files, in their order."""

    growth = 1  # bytes of text per byte of file, about
    requirement = "a file with a text in each document"

    def __init__(self, name: str, files: list[Path]):
        self.name, self._files = name, files
        self._sizes = sources.sizes_of(files)
        self.size = sum(self._sizes)
        self.text_bytes = self.size * self.growth

    def stat(self) -> str:
        return sources.stat_of(self._files)

    def scan(self, wants_chars: bool, advance: Callable[[int], object]) -> dict:
        digest, done = hashlib.sha256(), 0
        for path in self._files:
            with reading(path, self.requirement), path.open("rb") as file:
                while content := file.read(2**20):
                    digest.update(content)
                    done += len(content)
                    advance(done)
        found = {"sha256": digest.hexdigest(), "sizes": sources.hash_of(self._sizes)}
        if wants_chars:
            chars = {"\n"}  # the separator
            for text, done, _ in self.read(found, None):
                chars |= set(text or "")
                advance(done)
            found["chars"] = "".join(sorted(chars))
        return found

    def read(self, source_info: dict, where: dict | None) -> Iterator[Document]:
        del source_info
        where = where or {"file": 0, "at": None}
        done = sum(self._sizes[: where["file"]])
        for i in range(where["file"], len(self._files)):
            with reading(self._files[i], self.requirement):
                begin = where["at"] if i == where["file"] else None
                for text, read, at in self._read_file(self._files[i], begin):
                    yield text, done + read, lambda i=i, at=at: {"file": i, "at": at}
            done += self._sizes[i]

    def _read_file(self, path: Path, at: list[int] | None) -> Iterator[tuple[str, int, Any]]:
        """Yield (text, bytes read, position) of a file's documents after a position."""
        raise NotImplementedError


class JsonLines(_Files):
    """JSONL files, gzipped or not: an object with a `text` on each line."""

    requirement = "JSON lines, as .gz complete (if a download was cut off, repeat it)"

    def __init__(self, name: str, files: list[Path]):
        self.growth = 3 if files[0].suffix == ".gz" else 1
        super().__init__(name, files)

    def _read_file(self, path: Path, at: list[int] | None):
        offset, number = at or (0, 0)
        with path.open("rb") as stored:
            lines = gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored
            lines.seek(offset)  # a .gz is unpacked again up to there, at about 200 MB/s
            for line in lines:
                offset, number = offset + len(line), number + 1
                if line.strip():
                    yield _text_of(line, f"{path}, line {number}"), stored.tell(), (offset, number)


def _text_of(line: bytes, place: str) -> str:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # fails for a lone surrogate, one half of a character
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = " without lone surrogates" if isinstance(error, UnicodeEncodeError) else ""
        shown = line[:60].decode("utf-8", "replace").strip()
        raise InputError(
            f'{place}: must be like {{"text": "..."}}{what}, but is {shown}: correct or remove it'
        ) from None
    return text


class Parquet(_Files):
    """Parquet files with a column `text`."""

    growth = 2
    requirement = "a complete Parquet file (if a download was cut off, repeat it)"

    def _read_file(self, path: Path, at: list[int] | None):
        parquet = import_extra("pyarrow.parquet")
        with parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if "string" not in columns.get("text", ""):
                had = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                raise InputError(
                    f"{path}: must have a column text, of strings, but has {had}: rename a column"
                )
            first_group, n_skipped = at or (0, 0)
            for group in range(first_group, file.num_row_groups):
                done = path.stat().st_size * (group + 1) // file.num_row_groups
                batches = file.iter_batches(64, row_groups=[group], columns=["text"])
                texts = (text for batch in batches for text in batch.column(0).to_pylist())
                for row, text in enumerate(texts, 1):
                    if group > first_group or row > n_skipped:
                        yield text, done, (group, row)


@dataclass(frozen=True)
class Hub(Documents):
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

    def read(self, source_info: dict, where: dict | None) -> Iterator[Document]:
        datasets = import_extra("datasets")
        _silence(datasets)
        where = where or {"documents": 0, "state": None}
        n = n_before = where["documents"]
        try:
            rows = datasets.load_dataset(
                self.repository, **self.settings | source_info, split="train", streaming=True
            ).select_columns(["text"])
            if where["state"]:
                rows.load_state_dict(where["state"])
            for n, row in enumerate(rows, n_before + 1):
                yield row["text"], n, lambda n=n: {"documents": n, "state": rows.state_dict()}
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
