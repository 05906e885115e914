import json
import string

import numpy as np
import pytest

from nanogpt_jax import tokenizer as tokenizers
from nanogpt_jax.errors import InputError
from nanogpt_jax.tokenizer import CharTokenizer

TEXT = "Grüße, 世界! 🎭🙂 naïve e\u0301\r\n\ttwo\u2028lines \U0010ffff\x00"


def test_any_text_comes_back_as_it_was():
    tokenizer = CharTokenizer.from_text(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT[::-1])) == TEXT[::-1]


def test_a_character_beyond_the_basic_plane_is_one_token():
    tokenizer = CharTokenizer.from_text("a🎭b")
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("🎭a").tolist() == [2, 0]


def test_ids_are_those_of_nanogpts_prepare():
    """There: stoi = {ch: i for i, ch in enumerate(sorted(list(set(data))))}."""
    tokenizer = CharTokenizer.from_text(TEXT)
    ids = {char: i for i, char in enumerate(sorted(set(TEXT)))}
    assert tokenizer.vocab_size == len(ids)
    assert tokenizer.encode(TEXT).tolist() == [ids[char] for char in TEXT]


def test_the_sixty_five_characters_of_shakespeare_have_nanogpts_ids():
    tokenizer = CharTokenizer.from_text("\n !$&',-.3:;?" + string.ascii_letters)
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]


def test_no_text_has_no_tokens():
    ids = CharTokenizer.from_text("ab").encode("")
    assert ids.shape == (0,)
    assert CharTokenizer.from_text("ab").decode(ids) == ""


def test_ids_may_come_as_any_integers():
    tokenizer = CharTokenizer.from_text("abc")
    for ids in ([2, 0], np.array([2, 0], np.uint16), np.array([2, 0], np.int32)):
        assert tokenizer.decode(ids) == "ca"


@pytest.mark.parametrize("unknown", ["Z", "!", "世", "🎭", "\n"])
def test_an_unknown_character_is_listed_wherever_it_sorts(unknown):
    with pytest.raises(InputError) as error:
        CharTokenizer.from_text("abc").encode(f"ab{unknown}c{unknown}")
    assert f"it has {unknown!r}:" in str(error.value)
    assert "only the 3 characters" in str(error.value)


def test_of_many_unknown_characters_the_first_ten_are_listed():
    with pytest.raises(InputError, match=r"it has 'A', 'B', .*'J', \.\.\.: ") as error:
        CharTokenizer.from_text("abc").encode(string.ascii_uppercase + "A")
    assert "'K'" not in str(error.value)


def test_a_tokenizer_is_saved_as_json_and_comes_back(tmp_path):
    tokenizer = CharTokenizer.from_text(TEXT)
    tokenizers.save(tokenizer, tmp_path)
    loaded = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert loaded == {"type": "char", "chars": "".join(sorted(set(TEXT)))}
    assert tokenizers.load(tmp_path) == tokenizer


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert tokenizers.load(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}}}',
        b'{"type": "gpt2"}',
        b'{"type": "char", "chars": ["a", "b"]}',
        b'{"type": "char"}',
        b"[]",
        b"3",
        b"null",
        b"",
        b'{"type": "char", "chars": "ab',
        b"\xff\xfe\x00",
    ],
)
def test_a_tokenizer_json_made_by_something_else_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: must be like"):
        tokenizers.load(tmp_path)
