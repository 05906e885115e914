"""A text that is cut has the tokens of the whole, and what is not UTF-8 is named."""

import codecs
import io
import json

import numpy as np
import pytest
from make_text import make_text

from nanogpt_jax.corpora import BPETokenizer, CharTokenizer
from nanogpt_jax.corpora import text as texts
from nanogpt_jax.corpora.text import cut_text, read_blocks
from nanogpt_jax.corpora.tokenizer_files import tokenizer_from_json
from nanogpt_jax.errors import InputError

AWKWARD = (
    "We'll  cut   this\n\nwhere\n it\tdoes \u00a0not matter: 1 000 000, don't!\r\n  «Été» 世界 "
    "\u2003wide\u3000spaces \u0085 and <|endoftext|> e\u0301 🎭 x\n\n\n y \n z   \n\n  a     \tb"
)
# A word takes the punctuation before it, punctuation the line ends after it: as GPT-4's tokenizer.
LIKE_GPT4 = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def gpt2_like() -> BPETokenizer:
    """A small tokenizer with GPT-2's pattern of words."""
    return BPETokenizer.train(["".join(make_text(200_000, n_words=500)), AWKWARD * 50], 600)


@pytest.fixture(scope="module")
def gpt4_like() -> BPETokenizer:
    """One whose words run over line ends, with a token for each frequent pair of those."""
    tokenizer = BPETokenizer.train([".\n the,\n" * 200, AWKWARD * 50], 600)
    content = json.loads(tokenizer.to_json())
    split = {
        "type": "Split",
        "pattern": {"Regex": LIKE_GPT4},
        "behavior": "Isolated",
        "invert": False,
    }
    parts = [split, content["pre_tokenizer"] | {"use_regex": False}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    merges, vocab = content["model"]["merges"], content["model"]["vocab"]
    for pair in ([".", "Ċ"], [",", "Ċ"]):
        merges.insert(0, pair)
        vocab.setdefault("".join(pair), len(vocab))
    return tokenizer_from_json(json.dumps(content))


@pytest.mark.parametrize("length", [8, 16, 50, 1000])
@pytest.mark.parametrize("which", ["gpt2_like", "gpt4_like"])
def test_pieces_have_the_tokens_of_the_whole(request, monkeypatch, which, length):
    tokenizer = request.getfixturevalue(which)
    monkeypatch.setattr(texts, "PIECE_CHARS", length)
    text = "".join(make_text(3000, n_words=500)) + AWKWARD * 20 + "line,\nof.\nlines\n" * 50
    text += ("if so:" + " " * 150 + "x\n" * 40) * 20
    pieces = list(cut_text(text, tokenizer.can_cut))
    assert len(pieces) > 10 or length == 1000
    assert "".join(pieces) == text
    ids = np.concatenate(tokenizer.encode_batch(pieces))
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_a_tokenizer_can_join_what_gpt2s_keeps_apart(gpt2_like, gpt4_like):
    """Otherwise the test above would try nothing new."""
    assert gpt2_like.can_cut("the end.", "\nA new")
    assert not gpt4_like.can_cut("the end.", "\nA new")


def test_a_text_without_spaces_is_cut_anywhere(monkeypatch):
    monkeypatch.setattr(texts, "PIECE_CHARS", 64)
    monkeypatch.setattr(texts, "LONGEST_CHARS", 100)
    pieces = list(cut_text("世界" * 500, CharTokenizer("世界").can_cut))
    assert "".join(pieces) == "世界" * 500
    assert max(map(len, pieces)) == 128


@pytest.mark.parametrize("size", [4, 5, 7, 1000])
def test_a_file_is_read_as_python_reads_text(tmp_path, monkeypatch, size):
    """Wherever a character, a line end of Windows or the byte order mark is cut in two."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", size)
    content = codecs.BOM_UTF8 + (AWKWARD * 3 + "old Mac\rlines\r").encode()
    (tmp_path / "text.txt").write_bytes(content)
    expected = (tmp_path / "text.txt").read_text(encoding="utf-8-sig")
    assert "".join(read_blocks(io.BytesIO(content), "text.txt")) == expected


@pytest.mark.parametrize("size", [4, 5, 1000])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"words and words\n" * 10 + b"\xff", "byte 160 is 0xff: save it as UTF-8"),
        (codecs.BOM_UTF8 + b"na\xefve", "byte 5 is 0xef"),
        (b"fine, then cut: \xf0\x9f", "byte 16 is 0xf0"),
        (b"PK\x03\x04 some\x00 archive", "byte 9 is 0x00"),
    ],
)
def test_a_byte_that_is_not_utf8_is_named_with_its_position(monkeypatch, size, content, complaint):
    monkeypatch.setattr(texts, "BLOCK_BYTES", size)
    with pytest.raises(InputError, match=f"^text.txt: must be UTF-8 text, but {complaint}"):
        list(read_blocks(io.BytesIO(content), "text.txt"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_utf16_and_utf32_are_named_and_how_to_convert_them(encoding):
    content, name = "Some text.".encode(encoding), encoding[:6].upper()
    with pytest.raises(InputError, match=f"looks like {name}: convert it.* iconv -f {name} -t"):
        list(read_blocks(io.BytesIO(content), "text.txt"))
