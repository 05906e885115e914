"""Files of every format give the same documents, and what is damaged is one line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from formats import jsonl_of, parquet_of
from hostile import answer
from make_text import make_text

from nanogpt_jax.corpora import readers
from nanogpt_jax.corpora import text as texts
from nanogpt_jax.corpora.readers import read_items
from nanogpt_jax.errors import InputError

DOCUMENTS = [f"Document {i}: naïve, 世界, \r\n" * (i % 9) for i in range(200)]
COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def zstd():
    return pytest.importorskip("backports.zstd")


def contents() -> dict:
    """Functions that write DOCUMENTS, by the name of the file."""
    array = [{"text": text} for text in DOCUMENTS]
    lines = jsonl_of(DOCUMENTS)
    return {
        "a.jsonl": lambda: lines,
        "A.JSONL": lambda: b"\xef\xbb\xbf" + lines.replace(b"\n", b"\n\n"),
        "lines.json": lambda: lines,
        "array.json": lambda: json.dumps(array, indent=1).encode(),
        "a.jsonl.gz": lambda: gzip.compress(lines),
        "two.jsonl.gz": lambda: gzip.compress(lines[:4000]) + gzip.compress(lines[4000:]),
        "a.json.bz2": lambda: bz2.compress(lines),
        "a.jsonl.xz": lambda: lzma.compress(lines),
        "a.jsonl.zst": lambda: zstd().compress(lines[:900]) + zstd().compress(lines[900:]),
        "gzipped, by its content.jsonl": lambda: gzip.compress(lines),
        "a.parquet": lambda: parquet_of(DOCUMENTS),
        "by its content.jsonl": lambda: parquet_of(DOCUMENTS),
        **{
            f"{kind}.parquet": lambda kind=kind: parquet_of(DOCUMENTS, kind)
            for kind in ("dictionary", "large_string", "string_view")
        },
    }


def read(path: Path, after=(0, 0), text_key="text") -> list:
    return list(read_items(path, lambda left, right: True, after, text_key))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", contents())
def test_a_file_is_what_its_content_says(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "ITEM_BYTES", 500)
    monkeypatch.setattr(readers.grouped, "__defaults__", (500,))
    path = write(tmp_path / name, contents()[name]())
    items = read(path)
    assert [text for item in items for text in item.texts] == DOCUMENTS
    assert len(items) > 10
    assert items[-1].done == pytest.approx(1, abs=0.01)
    for i, item in enumerate(items):
        rest = read(path, item.key)
        assert [(each.key, each.texts) for each in rest] == [
            (each.key, each.texts) for each in items[i + 1 :]
        ]


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "md"])
def test_a_text_is_read_in_items_of_which_any_can_be_skipped(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 64)
    text = "".join(make_text(3000, n_words=500)) + "🎭\r\n" * 99
    content = text.encode()
    path = write(tmp_path / f"a.{ending}", gzip.compress(content) if "gz" in ending else content)
    items = read(path)
    assert "".join(item.texts[0] for item in items) == text.replace("\r\n", "\n")
    assert [item.is_end for item in items] == [False] * (len(items) - 1) + [True]
    assert len(items) > 40
    for i, item in enumerate(items):
        assert read(path, item.key) == items[i + 1 :]


def test_an_item_ends_at_a_good_place_if_there_is_one_far_before(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 1000)
    items = read(write(tmp_path / "a.txt", b"word " * 140 + b"x" * 350 + b" y" * 300))
    assert items[0].texts[0] == "word " * 139 + "word"


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet"])
def test_a_text_that_is_null_or_empty_is_no_text(tmp_path, name):
    documents = ["first", None, "", "last"]
    content = {
        "a.jsonl": lambda: jsonl_of(documents),
        "array.json": lambda: json.dumps([{"text": text} for text in documents]).encode(),
        "a.parquet": lambda: parquet_of(documents),
    }
    (item,) = read(write(tmp_path / name, content[name]()))
    assert item.texts == documents


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.parquet"])
def test_another_key_can_be_named_and_a_missing_one_lists_those_that_exist(tmp_path, name):
    if name == "a.parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": [1], "story": ["Once"]}), tmp_path / name)
    else:
        document = {"id": 1, "story": "Once"}
        content = json.dumps([document] if name == "array.json" else document)
        (tmp_path / name).write_text(content)
    (item,) = read(tmp_path / name, text_key="story")
    assert item.texts == ["Once"]
    with pytest.raises(InputError, match=rf"{name}.*--text_key") as error:
        read(tmp_path / name)
    assert "story" in str(error.value)


@pytest.mark.parametrize("name", [name for name in contents() if name != "lines.json"])
def test_a_damaged_or_cut_off_file_is_one_line(tmp_path, name):
    whole = contents()[name]()
    middle = len(whole) // 2
    wrong = whole[:middle] + b"\0\xff" * 30 + whole[middle + 60 :]
    for content in (wrong, whole[:-9], whole[:middle]):
        path = write(tmp_path / name, content)
        if content == wrong or ".jsonl" not in name.lower() or whole[:1] != b"{":
            with pytest.raises(InputError, match=f"{name}(:|, (line|element) )") as error:
                read(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", COMPRESS)
def test_damage_anywhere_in_a_compressed_file_is_one_line_or_harmless(tmp_path, ending):
    whole = bytearray(COMPRESS[ending](jsonl_of(DOCUMENTS[:60])))
    for at in range(0, len(whole), 7):
        damaged = whole.copy()
        damaged[at] ^= 0xFF
        path = write(tmp_path / f"a.jsonl.{ending}", bytes(damaged))
        line = answer(lambda path=path: read(path))
        assert line is None or line.startswith(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r'must be like {"text": "\.\.\."}, but is {'),
        ('{"text": 3}', 'but is {"text"'),
        ("[3]", "but is"),
        ('"text"', "but is"),
        ('{"text": "half \\ud83c"}', "lone surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", jsonl_of(["fine"] * 12) + line.encode() + b"\n")
    with pytest.raises(InputError, match=rf"a\.jsonl, line 13: .*{message}"):
        read(path)


def test_a_huge_line_or_array_is_refused_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 2**20)
    path = write(tmp_path / "a.jsonl", jsonl_of(["fine", "x" * 2**20]))
    with pytest.raises(InputError, match="line 2: must have at most 1 MiB: split this document"):
        read(path)
    path = write(tmp_path / "a.json", json.dumps([{"text": "x" * 2**20}]).encode())
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 2**20)
    with pytest.raises(InputError, match="more than 1 MiB: convert it to lines"):
        read(path)


@pytest.mark.parametrize("texts", [[["a"], ["b"]], [{"a": "b"}], [3]])
def test_a_column_that_is_not_text_is_refused(tmp_path, texts):
    path = write(tmp_path / "a.parquet", parquet_of(texts))
    with pytest.raises(InputError, match=r"a\.parquet: must have a column text of strings, but"):
        read(path)


def test_jsonl_in_utf16_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "words"}\n'.encode("utf-16"))
    with pytest.raises(InputError, match="looks like UTF-16"):
        read(path)
