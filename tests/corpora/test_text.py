"""Pieces of a text have the tokens of the whole, and reading resumes after each."""

import gzip
import io
import json

import numpy as np
import pytest
from make_text import make_text

from nanogpt_jax.corpora import sources
from nanogpt_jax.corpora import text as texts
from nanogpt_jax.corpora.sources import MAX_VAL_CHARS, JsonLines, Parquet, Texts, train_characters
from nanogpt_jax.corpora.text import cut_text, read_pieces
from nanogpt_jax.corpora.tokenizer import BPETokenizer
from nanogpt_jax.errors import InputError

AWKWARD = (
    "We'll  cut   this\n\nwhere\n it\tdoes \u00a0not matter: 1 000 000, don't!\r\n  «Été» 世界 "
    "\u2003wide\u3000spaces \u0085 and <|endoftext|> e\u0301 🎭 x\n\n\n y \n z   \n\n  a     \tb"
)


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    """A small one with GPT-2's pattern of words."""
    return BPETokenizer.train(["".join(make_text(200_000, n_words=500)), AWKWARD * 50], 600)


def texts_of(pieces) -> str:
    return "".join(piece.text for piece in pieces if piece.text is not None)


@pytest.mark.parametrize("length", [8, 16, 50, 1000])
def test_pieces_have_the_tokens_of_the_whole(tokenizer, monkeypatch, length):
    monkeypatch.setattr(texts, "PIECE_BYTES", length)
    text = "".join(make_text(3000, n_words=500)) + AWKWARD * 20
    pieces = list(cut_text(text))
    assert len(pieces) > 10 or length == 1000
    assert "".join(pieces) == text
    ids = np.concatenate(tokenizer.encode_batch(pieces))
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("length", [8, 16, 50, 1000])
def test_pieces_of_a_file_have_the_tokens_of_the_whole(tokenizer, monkeypatch, length):
    """Wherever a character of several bytes, or a line end of Windows, meets the end of a read."""
    monkeypatch.setattr(texts, "PIECE_BYTES", length)
    text = AWKWARD * 20 + "".join(make_text(3000, n_words=500))
    content = b"\xef\xbb\xbf" + text.encode()
    pieces = list(read_pieces(io.BytesIO(content), "text.txt"))
    text = text.replace("\r\n", "\n")
    assert "".join(piece for piece, _ in pieces) == text
    ids = np.concatenate(tokenizer.encode_batch([piece for piece, _ in pieces]))
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    for i in (0, len(pieces) // 2, len(pieces) - 1):
        rest = list(read_pieces(io.BytesIO(content), "text.txt", pieces[i][1]))
        assert rest == pieces[i + 1 :]


def test_a_text_without_spaces_is_cut_anywhere(monkeypatch):
    """Otherwise a file without any would be in memory as a whole. A line end is not cut in two."""
    text = ("世界" * 7 + "\r\n") * 9
    for longest in range(64, 84):
        monkeypatch.setattr(texts, "PIECE_BYTES", longest)
        monkeypatch.setattr(texts, "LONGEST_BYTES", longest)
        pieces = list(cut_text(text))
        assert "".join(pieces) == text
        of_file = [piece for piece, _ in read_pieces(io.BytesIO(text.encode()), "text.txt")]
        assert "".join(of_file) == text.replace("\r\n", "\n")
        assert max(map(len, pieces + of_file)) <= 2 * longest


def test_the_last_tenth_of_a_text_is_for_validation():
    for n in (10, 99, 1000, 10 * MAX_VAL_CHARS):
        assert train_characters(n) == int(n * 0.9)


def test_ten_million_characters_of_a_huge_text_are_for_validation():
    assert train_characters(10**9) == 10**9 - 10_000_000


def test_a_separator_counts_as_a_character_of_its_split(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text(name * 5)
    source = Texts("all", [tmp_path / name for name in "abc"])
    source_info = source.scan(True, lambda done: None)
    assert source_info["characters"] == 17
    for n_train in (1, 5, 6, 7, 11, 12, 17):
        monkeypatch.setattr(sources, "train_characters", lambda n, n_train=n_train: n_train)
        found = {"train": "", "val": ""}
        for piece in source.pieces(source_info):
            found[piece.split] += "\n" if piece.text is None else piece.text
        whole = "aaaaa\nbbbbb\nccccc"
        assert found == {"train": whole[:n_train], "val": whole[n_train:]}


def test_reading_resumes_at_any_position(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 64)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(
            "".join(make_text(500, seed=i, n_words=500)) if i != 2 else ""
        )
    source = Texts("all", sorted(tmp_path.iterdir()))
    source_info = source.scan(False, lambda done: None)
    pieces = list(source.pieces(source_info))
    resumable = [i for i, piece in enumerate(pieces) if piece.position]
    assert len(resumable) > 20
    for i in resumable:
        position = json.loads(json.dumps(pieces[i].position))
        assert list(source.pieces(source_info, position)) == pieces[i + 1 :]
    assert pieces[-1].done == source.size


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_reading_documents_resumes_at_any_position(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("nanogpt_jax.corpora.text.PIECE_BYTES", 64)
    texts = [f"document {i} " * (i % 7) for i in range(60)]
    for name, part in (("a", texts[:25]), ("b", texts[25:])):
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet")
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), path, row_group_size=11)
        else:
            content = "".join(json.dumps({"text": text}) + "\n\n" for text in part).encode()
            path.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
    source = (Parquet if kind == "parquet" else JsonLines)("all", sorted(tmp_path.iterdir()))
    pieces = list(source.pieces({}))
    resumable = [i for i, piece in enumerate(pieces) if piece.position]
    assert len(resumable) > 20
    for i in resumable:
        position = json.loads(json.dumps(pieces[i].position))
        rest = list(source.pieces({}, position))
        assert [(p.split, p.text, p.position) for p in rest] == [
            (p.split, p.text, p.position) for p in pieces[i + 1 :]
        ]


def test_a_bad_byte_far_into_a_file_is_named_with_its_position(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"words and words\n" * 10_000 + b"\xff")
    with pytest.raises(InputError, match=r"text\.txt: .* byte 160000 is 0xff"):
        Texts(str(path), [path]).scan(False, lambda done: None)
