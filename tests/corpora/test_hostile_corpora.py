"""Damaged and hostile files of a corpus: one line that names the file, and nothing is written."""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from formats import prepare
from hostile import (
    BAD_JSON,
    DAMAGES,
    HOSTILE_TEXTS,
    another,
    answer,
    content_of,
    copied,
    damage,
    damaged_contents,
)
from hypothesis import example, given
from hypothesis import strategies as st

from nanogpt_jax.corpora import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    Request,
    known_val_tokens,
    open_corpus,
)
from nanogpt_jax.corpora.tokenizer_spec import tokenizer_hash

FILES = ("meta.json", "tokenizer.json", "train.bin", "val.bin", "lines.jsonl")
BPE = BPETokenizer.train(["the cat sat on the mat " * 50], 300)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A prepared corpus, and a JSONL file of the user's. Not to be changed."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "book.txt").write_text("the cat sat on the mat\n" * 9)
    prepared = prepare(str(folder / "book.txt"), folder / "data", 9)
    for path in prepared.iterdir():
        path.rename(folder / path.name)
    (folder / "lines.jsonl").write_text(99 * '{"text": "the cat sat"}\n')
    return folder


def read(folder: Path, name: str) -> None:
    """Use a file as training, sampling and preparation do."""
    if name == "lines.jsonl":
        with tempfile.TemporaryDirectory() as data:
            prepare(str(folder / name), Path(data), 1, "char")
            assert len([*Path(data).glob("[!.]*")]) == 1
        return
    known_val_tokens(Request(str(folder), folder))
    corpus = open_corpus(folder, 9)
    for ids in corpus.splits.values():
        assert int(np.asarray(ids).max()) < corpus.vocab_size
    if tokenizer := corpus.tokenizer:
        for text in (tokenizer.default_start, "the cat", END_OF_TEXT):
            answer(lambda text=text: tokenizer.encode_prompt(text))
        tokenizer.decode(range(tokenizer.vocab_size + 1))
        tokenizer_hash(tokenizer)


def answer_to(folder: Path, name: str) -> str | None:
    """Return the line that refuses a file, None if it is accepted; nothing is written."""
    before = content_of(folder)
    line = answer(lambda: read(folder, name))
    assert content_of(folder) == before
    return line


@pytest.mark.parametrize("name", FILES)
def test_a_missing_unreadable_or_empty_file_is_named(good, name):
    assert answer_to(good, name) is None
    for kind_of_damage in DAMAGES:
        with copied(good) as folder:
            damage(folder / name, kind_of_damage)
            line = answer_to(folder, name)
        is_optional = kind_of_damage == "missing" and name in ("meta.json", "tokenizer.json")
        assert line is not None or is_optional, kind_of_damage
        assert line is None or name.split(".")[0] in line


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_a_cut_off_or_random_file_is_refused_in_one_line(good, name, data):
    whole = (good / name).read_bytes()
    content, is_random = data.draw(damaged_contents(whole))
    with copied(good) as folder:
        (folder / name).write_bytes(content)
        line = answer_to(folder, name)
    if is_random and not name.endswith(".bin"):  # any bytes may be ids
        with contextlib.suppress(ValueError):
            json.loads(content)
            return
        assert line is not None


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".bin")])
@given(data=st.data())
def test_json_with_any_value_changed_is_accepted_or_refused_in_one_line(good, name, data):
    text = (good / name).read_text(encoding="utf-8")
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(another(json.loads(lines[at]), data))
    with copied(good) as folder:
        (folder / name).write_text("\n".join(lines) + "\n")
        answer_to(folder, name)


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".bin")])
def test_json_that_breaks_parsers_is_one_line(good, name):
    for content in BAD_JSON:
        with copied(good) as folder:
            (folder / name).write_bytes(content + b"\n")
            line = answer_to(folder, name)
        assert line is not None or (name, content) == ("meta.json", b"{}"), content[:12]


def test_a_meta_json_cannot_name_files_elsewhere(good):
    for name in ("../../x", "/etc/passwd", "train.bin/../x", "val_00000.bin", "x"):
        with copied(good) as folder:
            meta = json.loads((folder / "meta.json").read_text())
            meta["splits"]["train"]["files"][0]["name"] = name
            (folder / "meta.json").write_text(json.dumps(meta))
            assert "splits must list the files of train and val" in answer_to(folder, "meta.json")


@pytest.mark.parametrize("tokenizer", [BPE, CharTokenizer("\n\x1bath🎭")], ids=["bpe", "char"])
@given(text=HOSTILE_TEXTS)
@example(text="\ufeff\r\n\0🎭")
def test_any_text_is_decoded_to_itself_or_refused_in_one_line(tokenizer, text):
    def there_and_back():
        assert tokenizer.decode(tokenizer.encode(text)) == text
        tokenizer.encode_prompt(text)

    line = answer(there_and_back)
    if isinstance(tokenizer, BPETokenizer):
        has_surrogate = any("\ud800" <= char <= "\udfff" for char in text)
        assert (line is not None) == has_surrogate
    else:
        assert (line is None) == (set(text) <= set(tokenizer.chars))
