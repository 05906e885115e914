"""Documents as a stream of pieces: of JSONL and parquet files, and of the Hugging Face hub. No JAX.

What a document needs is its text. One that is empty, or missing in a table, is left out.
"""

import contextlib
import gzip
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from nanogpt_jax.corpora.text import (
    MOST_VAL_CHARS,
    PIECE_BYTES,
    Piece,
    cut_text,
    hash_of,
    size_of,
    stat_of,
)
from nanogpt_jax.errors import InputError

TIMEOUT_S = 10
# A document's text, how much of the source's `size` is read with it, and where the next one is.
Document: TypeAlias = tuple[str, int, Callable[[], dict]]


class Documents:
    """Documents in an order that never changes; each `every`-th one validates."""

    every, most_val_chars = 10, MOST_VAL_CHARS
    split_in_words = "every 10th document validates, until these have 10 million characters"
    unit = "B"

    def pieces(self, facts: dict, position: dict | None = None) -> Iterator[Piece]:
        """Yield the pieces from a position on."""
        position = position or {"documents": 0, "val_documents": 0, "val_chars": 0, "where": None}
        n, n_val, val_chars = (position[k] for k in ("documents", "val_documents", "val_chars"))
        since = 0
        for text, done, where in self.read(facts, position["where"]):
            if not text:
                continue
            n += 1
            is_val = n % self.every == 0 and val_chars < self.most_val_chars
            split = "val" if is_val else "train"
            if (n_val if is_val else n - 1 - n_val) > 0:
                yield Piece(split, None, done, None)
            if is_val:
                n_val, val_chars = n_val + 1, val_chars + len(text)
            since += len(text)
            parts = list(cut_text(text))
            for part in parts[:-1]:
                yield Piece(split, part, done, None)
            here = None
            if since >= PIECE_BYTES:  # a place after each of many short documents would be too much
                counts = {"documents": n, "val_documents": n_val, "val_chars": val_chars}
                here, since = counts | {"where": where()}, 0
            yield Piece(split, parts[-1], done, here)

    def read(self, facts: dict, where: dict | None) -> Iterator[Document]:
        """Yield the documents from a place on.

        Args:
            facts: what `scan` returned.
        """
        raise NotImplementedError


class _Files(Documents):
    """Documents of one or several files.

    Args:
        name: what messages call it.
        files: in their order.
    """

    growth = 1  # bytes of text in one byte of file, about

    def __init__(self, name: str, files: list[Path]):
        self.name, self._files = name, files
        self._sizes = [size_of(file) for file in files]
        self.size = sum(self._sizes)
        self.text_bytes = self.size * self.growth

    def stat(self) -> str:
        """Return what changes with the files."""
        return stat_of(self._files)

    def scan(self, wants_chars: bool, advance: Callable[[int], None]) -> dict:
        """Read all of it once; return its `sha256`, `sizes` of files and distinct `chars`."""
        digest, done = hashlib.sha256(), 0
        for path in self._files:
            with _named(path), path.open("rb") as file:
                while content := file.read(2**20):
                    digest.update(content)
                    done += len(content)
                    advance(done)
        facts = {"sha256": digest.hexdigest(), "sizes": hash_of(self._sizes)}
        if wants_chars:
            chars = {"\n"}  # the separator
            for text, done, _ in self.read(facts, None):
                chars |= set(text or "")
                advance(done)
            facts["chars"] = "".join(sorted(chars))
        return facts

    def read(self, facts: dict, where: dict | None) -> Iterator[Document]:
        del facts
        where = where or {"file": 0, "at": None}
        done = sum(self._sizes[: where["file"]])
        for i in range(where["file"], len(self._files)):
            with _named(self._files[i]):
                begin = where["at"] if i == where["file"] else None
                for text, read, at in self._read_file(self._files[i], begin):
                    yield text, done + read, lambda i=i, at=at: {"file": i, "at": at}
            done += self._sizes[i]


class JsonLines(_Files):
    """JSONL files, gzipped or not: each line an object with a `text`."""

    def __init__(self, name: str, files: list[Path]):
        self.growth = 3 if files[0].suffix == ".gz" else 1
        super().__init__(name, files)

    def _read_file(self, path: Path, at: list[int] | None):
        offset, number = at or (0, 0)
        with path.open("rb") as stored, _unpacked(stored, path) as lines:
            lines.seek(offset)  # of a .gz: all before it is unpacked again, some 200 MB/s
            for line in lines:
                offset, number = offset + len(line), number + 1
                if line.strip():
                    yield _text_of(line, f"{path}, line {number}"), stored.tell(), (offset, number)


def _unpacked(stored, path: Path):
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=stored)
    return contextlib.nullcontext(stored)


def _text_of(line: bytes, place: str) -> str:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: must be of whole characters, but has a lone surrogate, a \\ud... without "
            "its other half"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        shown = line[:60].decode("utf-8", "replace").strip()
        raise InputError(f'{place}: must be like {{"text": "..."}}, but is {shown}') from None
    return text


class Parquet(_Files):
    """Parquet files with a column `text`."""

    growth = 2

    def _read_file(self, path: Path, at: list[int] | None):
        parquet = need("pyarrow.parquet")
        with parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if "string" not in columns.get("text", ""):
                had = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                raise InputError(f"{path}: must have a column text, of strings, but has {had}")
            first_group, skipped = at or (0, 0)
            for group in range(first_group, file.num_row_groups):
                row = 0
                done = path.stat().st_size * (group + 1) // file.num_row_groups
                for batch in file.iter_batches(64, row_groups=[group], columns=["text"]):
                    if group == first_group and row + len(batch) <= skipped:
                        row += len(batch)
                        continue
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if group > first_group or row > skipped:
                            yield text, done, (group, row)


@contextlib.contextmanager
def _named(path: Path):
    """Answer what goes wrong with a file in one line that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:  # pyarrow's are among them
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason})") from None


@dataclass(frozen=True)
class Hub(Documents):
    """A corpus of the Hugging Face hub, streamed. Sizes are about."""

    name: str
    repository: str
    settings: dict  # of load_dataset
    page: str
    size: int  # documents
    gpt2_tokens: int
    text_bytes: int
    download_bytes: int

    unit = " documents"
    every, most_val_chars = 2000, float("inf")
    split_in_words = "every 2000th document validates"  # nanoGPT's 0.0005

    def stat(self) -> str:
        """Return what it is, in whichever revision: the hub is not asked whether it changed."""
        return json.dumps([self.repository, self.settings])

    def scan(self, wants_chars: bool, advance: Callable[[int], None]) -> dict:
        """Return the `revision` that is the newest now: all is read of that, whenever it goes on.

        To read all of it once for its characters is refused.
        """
        del advance
        if wants_chars:
            raise InputError(
                f"{self.name} must have a tokenizer of byte pairs: gpt2, bpe or a file"
            )
        _quiet(need("datasets"))
        import huggingface_hub

        asked = self.settings.get("revision")
        try:
            found = huggingface_hub.HfApi().dataset_info(
                self.repository, revision=asked, timeout=TIMEOUT_S
            )
        except Exception as error:  # its classes differ between versions
            raise self._unreadable(error, 0) from None
        return {"revision": found.sha}

    def read(self, facts: dict, where: dict | None) -> Iterator[Document]:
        datasets = need("datasets")
        _quiet(datasets)
        begun = where or {"documents": 0, "state": None}
        n = begun["documents"]
        try:
            rows = datasets.load_dataset(
                self.repository, **self.settings | facts, split="train", streaming=True
            ).select_columns(["text"])
            if begun["state"]:
                rows.load_state_dict(begun["state"])
            for n, row in enumerate(rows, begun["documents"] + 1):
                yield row["text"], n, lambda n=n: {"documents": n, "state": rows.state_dict()}
        except Exception as error:  # its classes differ between versions
            raise self._unreadable(error, n) from None

    def _unreadable(self, error: Exception, n: int) -> InputError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return InputError(
            f"{self.name} could not be read from the hub after {n:,} documents ({reason}): the "
            f"same command goes on from there; without a network put the parquet files of "
            f"{self.page} into a folder, and name that folder in its place"
        )


def _quiet(datasets) -> None:
    """What it says and retries is its own affair: here it is one line in the end."""
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "fsspec", "httpx"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


OPENWEBTEXT = Hub(
    "openwebtext",
    "Skylion007/openwebtext",
    {"revision": "refs/convert/parquet"},  # datasets 4 runs no scripts, and the rest is one
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


def need(module: str):
    """Import a module of the extra `corpora`.

    Raises:
        InputError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise InputError(
            f"{name} must be installed to read this corpus: pip install -e '.[corpora]'"
        ) from None
