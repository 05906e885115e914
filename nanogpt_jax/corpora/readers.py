"""Read a file in items, whatever its format: text, JSON lines, a JSON array, or Parquet.

An item is about a megabyte of text. What it contains depends only on the file and on where the
tokenizer can be cut, so an item that has been done before can be skipped.
"""

import codecs
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar

from nanogpt_jax import files
from nanogpt_jax.corpora.text import CanCut, check_encoding, last_cut, read_blocks
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.files import MAX_JSON_BYTES

ITEM_BYTES, MAX_ROWS = 2**20, 2**14
MAX_DOCUMENT_BYTES = 2**26  # of a line of JSON, to bound the memory
TEXT, JSON, PARQUET = "text", "JSON", "Parquet"
ENDINGS = {
    **dict.fromkeys((".txt", ".md", ".rst"), TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JSON),
    ".parquet": PARQUET,
}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
# The modules that open compressed files, by the first bytes of those: the endings of files mislead.
COMPRESSIONS = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9]1AY&SY": "bz2",
    rb"\xfd7zXZ\0": "lzma",
    rb"\x28\xb5\x2f\xfd": "backports.zstd",
}

# Of an item: its row group (0 if the file has none) and its number there; of a source's item, the
# number of the file first.
Key: TypeAlias = tuple[int, ...]
Row = TypeVar("Row")


class Item(NamedTuple):
    """Some consecutive texts of a file."""

    key: Key
    texts: list[str | None]  # None: a document without text
    is_end: bool = True  # False: the next item continues the last text
    split: str | None = None  # "train" or "val" if the file says so
    done: float = 0.0  # share of the file that has been read


def import_extra(module: str) -> Any:
    """Import a module of the extra `corpora`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.removesuffix(".parquet")
        raise InputError(
            f"{name} must be installed to read this corpus: pip install -e '.[corpora]'"
        ) from None


def kind_of(path: Path) -> str | None:
    """Return the kind of file that a name promises, or None."""
    endings = [end for end in map(str.lower, path.suffixes) if end not in COMPRESSED]
    return ENDINGS.get(endings[-1]) if endings else None


def content_kind(path: Path) -> str:
    """Return the kind of an existing file: by its content and, if that says nothing, its name."""
    with reading(path, "a file"), path.open("rb") as file:
        return PARQUET if file.read(4) == b"PAR1" else kind_of(path) or TEXT


def read_items(path: Path, can_cut: CanCut, after: Key, text_key: str) -> Iterator[Item]:
    """Yield the items of a local file that follow the one with the key `after`.

    Raises:
        InputError: the file or a document in it cannot be read.
    """
    kind = content_kind(path)
    requirement = f"a complete {kind} file (if a download was cut off, repeat it)"
    with reading(path, requirement), path.open("rb") as file:
        head = file.read(16)
        n_bytes = max(1, file.seek(0, io.SEEK_END))
        file.seek(0)
        if kind == PARQUET:
            yield from parquet_items(file, str(path), after, text_key)
            return
        opener = next((name for magic, name in COMPRESSIONS.items() if re.match(magic, head)), None)
        raw: Any = import_extra(opener).open(file) if opener else file
        stream = io.BufferedReader(raw)
        if kind == TEXT:
            items = _text_items(stream, str(path), can_cut)
        else:
            items = _json_items(stream, str(path), text_key, after)
        for item in items:
            if item.key > after:
                yield item._replace(done=file.tell() / n_bytes)


def _text_items(stream: BinaryIO, name: str, can_cut: CanCut) -> Iterator[Item]:
    rest, number = "", 0
    for number, block in enumerate(read_blocks(stream, name), 1):
        text = rest + block
        # Without a good place one character stays, so that the last item has the end of the text.
        end = last_cut(text, can_cut) or len(text) - 1
        yield Item((0, number), [text[:end]], is_end=False)
        rest = text[end:]
    yield Item((0, number + 1), [rest])


def _json_items(stream: io.BufferedReader, name: str, text_key: str, after: Key) -> Iterator[Item]:
    head = stream.peek(64)
    check_encoding(head, name)
    is_array = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    rows = _elements(stream) if is_array else _lines(stream, name)
    place = f"{name}, {'element' if is_array else 'line'}"
    for number, group in enumerate(grouped(rows, lambda row: row[2]), 1):
        if (0, number) > after:
            texts = [_text_of(row, f"{place} {n}", text_key) for n, row, _ in group]
            yield Item((0, number), texts)


def grouped(
    rows: Iterable[Row], size_of: Callable[[Row], int], size: int = ITEM_BYTES
) -> Iterator[list[Row]]:
    """Yield consecutive rows in lists, each with at least some size in all, or many rows."""
    group, left = [], size
    for row in rows:
        group.append(row)
        left -= size_of(row)
        if left <= 0 or len(group) >= MAX_ROWS:
            yield group
            group, left = [], size
    if group:
        yield group


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes, int]]:
    """Yield the number, content and size of each line that is not blank."""
    number = 0
    while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{name}, line {number}: must have at most {MAX_DOCUMENT_BYTES >> 20} MiB: split "
                "this document"
            )
        if line.strip():
            yield number, line, len(line)


def _elements(stream: BinaryIO) -> Iterator[tuple[int, Any, int]]:
    """Yield the number, value and an estimate of the size of each element of a JSON array."""
    content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"an array of more than {MAX_JSON_BYTES >> 20} MiB: convert it to lines")
    elements = files.loads(content.decode("utf-8-sig"))
    for number, element in enumerate(elements, 1):
        yield number, element, len(content) // len(elements)


def _text_of(document: Any, place: str, text_key: str) -> str | None:
    """Return the text of a line or element of JSON; None if it is null."""
    shown = str(document[:60], "utf-8", "replace") if isinstance(document, bytes) else document
    required = f'must be like {{"{text_key}": "..."}}'
    try:
        if isinstance(document, bytes):
            document = json.loads(document)
        if (text := document[text_key]) is not None:
            text.encode()  # fails for what is no text, and for a lone surrogate, half a character
        return text
    except UnicodeEncodeError:
        required += " without lone surrogates"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if isinstance(document, dict) and text_key not in document:
            keys = ", ".join(document) or "none"
            required += f": name the right key with --text_key, it has {keys}"
    raise InputError(f"{place}: {required}, but is {str(shown).strip():.60}: correct it")


def parquet_items(file: BinaryIO, name: str, after: Key, text_key: str) -> Iterator[Item]:
    """Yield the items after a key of a Parquet file, which may be remote; see `read_items`."""
    parquet = import_extra("pyarrow.parquet")
    with parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as table:
        _check_column(table.schema_arrow, name, text_key)
        for group in range(after[0], table.num_row_groups):
            batches = table.iter_batches(16, row_groups=[group], columns=[text_key])
            rows = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, texts in enumerate(grouped(rows, lambda text: len(text or "")), 1):
                if (group, number) > after:
                    yield Item((group, number), texts, done=(group + 1) / table.num_row_groups)


def _check_column(schema, name: str, text_key: str) -> None:
    types = import_extra("pyarrow").types
    kinds = {field.name: field.type for field in schema}
    kind = kinds.get(text_key)
    if kind is not None and types.is_dictionary(kind):
        kind = kind.value_type
    tests = types.is_string, types.is_large_string, types.is_string_view
    if kind is None or not any(test(kind) for test in tests):
        had = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise InputError(
            f"{name}: must have a column {text_key} of strings, but has {had}: name it with "
            "--text_key"
        )
