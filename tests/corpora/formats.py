"""Documents in the formats of files, and corpora asked for in one line."""

import json
from pathlib import Path

import pytest

from nanogpt_jax import corpora


def chars_of(text: str) -> corpora.CharTokenizer:
    return corpora.CharTokenizer("".join(sorted(set(text))))


def prepare(*wanted, **more) -> Path:
    return corpora.prepare(corpora.Request(*wanted, **more))


def resolve(*wanted, **more) -> Path:
    return corpora.resolve(corpora.Request(*wanted, **more))


def parquet_of(texts, kind: str | None = None) -> bytes:
    """Return a Parquet file with a column of texts: of strings, or of another type of pyarrow."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = pyarrow.BufferOutputStream()
    try:
        if kind == "dictionary":
            column = pyarrow.array(texts).dictionary_encode()
        else:
            column = pyarrow.array(texts, getattr(pyarrow, kind)() if kind else None)
        table = pyarrow.table({"id": [*range(len(texts))], "text": column})
        parquet.write_table(table, file, row_group_size=70)
    except pyarrow.lib.ArrowNotImplementedError:
        pytest.skip(f"this version of pyarrow cannot write {kind}")
    return file.getvalue().to_pybytes()


def jsonl_of(texts) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
