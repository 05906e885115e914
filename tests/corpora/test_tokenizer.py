import dataclasses
import json
import string
import threading

import numpy as np
import pytest
from formats import chars_of

from nanogpt_jax import corpora
from nanogpt_jax.corpora import END_OF_TEXT, BPETokenizer, CharTokenizer, Corpus
from nanogpt_jax.corpora.tokenizer import token_lengths
from nanogpt_jax.corpora.tokenizer_files import tokenizer_from_json
from nanogpt_jax.corpora.tokenizer_spec import tokenizer_hash
from nanogpt_jax.errors import InputError

TEXT = "Grüße, 世界! 🎭🙂 naïve e\u0301\r\n\ttwo\u2028lines \U0010ffff\x00"


def test_any_text_decodes_to_itself():
    tokenizer = chars_of(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT[::-1])) == TEXT[::-1]


def test_a_character_beyond_the_basic_plane_is_one_token():
    tokenizer = chars_of("a🎭b")
    assert tokenizer.vocab_size == 3
    assert tokenizer.encode("🎭a").tolist() == [2, 0]


def test_ids_equal_those_of_nanogpts_prepare():
    """nanoGPT: stoi = {ch: i for i, ch in enumerate(sorted(list(set(data))))}."""
    tokenizer = chars_of(TEXT)
    ids = {char: i for i, char in enumerate(sorted(set(TEXT)))}
    assert tokenizer.vocab_size == len(ids)
    assert tokenizer.encode(TEXT).tolist() == [ids[char] for char in TEXT]


def test_the_sixty_five_characters_of_shakespeare_have_nanogpts_ids():
    tokenizer = chars_of("\n !$&',-.3:;?" + string.ascii_letters)
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("hii there").tolist() == [46, 47, 47, 1, 58, 46, 43, 56, 43]


def test_no_text_has_no_tokens():
    ids = chars_of("ab").encode("")
    assert ids.shape == (0,)
    assert chars_of("ab").decode(ids) == ""


def test_ids_may_have_any_integer_type():
    tokenizer = chars_of("abc")
    for ids in ([2, 0], np.array([2, 0], np.uint16), np.array([2, 0], np.int32)):
        assert tokenizer.decode(ids) == "ca"


@pytest.mark.parametrize("unknown", ["Z", "!", "世", "🎭", "\n"])
def test_an_unknown_character_is_listed_wherever_it_sorts(unknown):
    with pytest.raises(InputError) as error:
        chars_of("abc").encode(f"ab{unknown}c{unknown}")
    assert str(error.value) == (
        f"this model knows only its 3 training characters; remove or replace {unknown!r}"
    )


def test_the_first_ten_of_many_unknown_characters_are_listed():
    with pytest.raises(InputError, match=r"replace 'A', 'B', .*'J', \.\.\.$") as error:
        chars_of("abc").encode(string.ascii_uppercase + "A")
    assert "'K'" not in str(error.value)


def test_a_tokenizer_is_saved_as_json_and_loaded(tmp_path):
    tokenizer = chars_of(TEXT)
    corpora.save_tokenizer(tokenizer, tmp_path)
    loaded = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert loaded == {"type": "char", "chars": "".join(sorted(set(TEXT)))}
    assert corpora.load_tokenizer(tmp_path) == tokenizer


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert corpora.load_tokenizer(tmp_path) is None


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
        corpora.load_tokenizer(tmp_path)


# Byte pairs


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(
        ["the cat sat on the mat, and then the rat ate that cat.\n" * 20], 300
    )


def test_bpe_encodes_any_text_and_decodes_it(bpe):
    for text in (TEXT, "the cat", "", " ", "\n\n\n", "".join(map(chr, range(0x300)))):
        ids = bpe.encode(text)
        assert ids.dtype == np.int64
        assert bpe.decode(ids) == text
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < bpe.vocab_size


def test_bpe_learns_what_is_frequent(bpe):
    assert bpe.vocab_size <= 300
    assert len(bpe.encode(" the cat")) == 2
    assert len(bpe.encode("xyzzy")) == 5


def test_a_text_with_few_pairs_has_a_smaller_vocabulary():
    assert BPETokenizer.train(["ab"], 5000).vocab_size == 256 + 1 + 1  # bytes, the end, "ab"


def test_training_bpe_twice_gives_the_same(bpe, book):
    text = book.read_text()
    first, again = (BPETokenizer.train([text[:3000], text[3000:]], 280) for _ in range(2))
    assert first.to_json() == again.to_json() != bpe.to_json()


def test_token_bytes_are_what_tokens_decode_to(bpe):
    assert len(bpe.token_bytes) == bpe.vocab_size
    single = {token for token in bpe.token_bytes if len(token) == 1}
    assert single == {bytes([byte]) for byte in range(256)}
    ids = bpe.encode(TEXT + "the cat sat")
    assert b"".join(bpe.token_bytes[i] for i in ids).decode() == TEXT + "the cat sat"


def test_the_end_of_text_is_a_token_in_a_prompt_but_not_in_a_text(bpe):
    """Otherwise a web page about GPT-2 would end its document."""
    text = f"the cat{END_OF_TEXT}the mat"
    (end,) = bpe.encode_prompt(END_OF_TEXT)
    assert end not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text
    assert (bpe.encode_prompt(text) == end).sum() == 1
    assert bpe.decode(bpe.encode_prompt(text)) == text
    assert end not in bpe.encode(text), "encoding a prompt changed how a text is encoded"
    assert bpe.separator == END_OF_TEXT


def test_a_batch_is_encoded_like_single_texts(bpe):
    texts = ["the cat", "", TEXT, "sat on\n"]
    for ids, text in zip(bpe.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))


@pytest.mark.parametrize("text", ["naïve 🎭🎭 Grüße", "世界"])
def test_a_character_of_several_tokens_is_streamed_whole(bpe, text):
    ids, decode = bpe.encode(text), bpe.stream_decoder()
    pieces = [decode([i], final=n == len(ids) - 1) for n, i in enumerate(ids)]
    assert len(ids) > len(text)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_half_a_character_at_the_end_is_streamed_as_decoded(bpe):
    ids = bpe.encode("a🎭")[:-1]
    decode = bpe.stream_decoder()
    assert "".join([decode(ids[:2]), decode(ids[2:], final=True)]) == bpe.decode(ids) == "a\ufffd"


def test_an_id_of_the_padding_decodes_to_a_replacement_character(bpe):
    assert bpe.decode([*bpe.encode("the"), bpe.vocab_size]) == "the\ufffd"


def test_a_lone_surrogate_is_an_input_error(bpe):
    with pytest.raises(InputError, match="lone surrogate"):
        bpe.encode("a\ud800")


def test_bpe_is_saved_and_loaded(bpe, tmp_path):
    corpora.save_tokenizer(bpe, tmp_path)
    loaded = corpora.load_tokenizer(tmp_path)
    assert loaded.to_json() == bpe.to_json()
    np.testing.assert_array_equal(loaded.encode(TEXT), bpe.encode(TEXT))
    assert loaded.vocab_size == bpe.vocab_size


def test_the_hash_depends_on_what_a_tokenizer_does_not_on_its_file(bpe):
    """Some versions of the library write a merge as one string, some as two."""
    content = json.loads(bpe.to_json())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["post_processor"] = None
    rewritten = tokenizer_from_json(json.dumps(content, indent=3))
    assert tokenizer_hash(rewritten) == tokenizer_hash(bpe)
    others = (CharTokenizer("ab"), CharTokenizer("abc"), BPETokenizer.train(["the cat"], 260))
    assert len({tokenizer_hash(tokenizer) for tokenizer in (bpe, *others)}) == 4


def test_tokenizers_with_different_pre_tokenizers_have_different_hashes():
    """They have the same tokens and merges, but encode a text differently."""
    bpe = BPETokenizer.train(["in 1999 the cat, in 2024 the mat " * 20], 300)
    content = json.loads(bpe.to_json())
    digits = {"type": "Digits", "individual_digits": True}
    parts = [digits, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    assert tokenizer_hash(tokenizer_from_json(json.dumps(content))) != tokenizer_hash(bpe)


def test_threads_do_not_disturb_each_other(bpe):
    """The page may encode for several visitors at once."""
    text = f"the cat{END_OF_TEXT}sat"
    n_text, n_prompt = len(bpe.encode(text)), len(bpe.encode_prompt(text))
    assert n_text > n_prompt
    wrong = []

    def many(encode, n):
        try:
            wrong.extend(1 for _ in range(300) if len(encode(text)) != n)
        except Exception as error:  # "Already borrowed", of older versions
            wrong.append(error)

    threads = [
        threading.Thread(target=many, args=args)
        for args in [(bpe.encode, n_text), (bpe.encode_prompt, n_prompt)] * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_deeply_nested_file_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="must be like"):
        corpora.load_tokenizer(tmp_path)


@pytest.mark.parametrize("chars", ["ba", "aab", ""])
def test_unsorted_or_repeated_characters_are_refused(tmp_path, chars):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"type": "char", "chars": chars}))
    with pytest.raises(InputError, match="not text, sorted, each once"):
        corpora.load_tokenizer(tmp_path)


def test_a_file_with_padding_and_truncation_encodes_whole_texts(bpe, tmp_path):
    """As some models on the hub have it."""
    content = json.loads(bpe.to_json())
    content["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert corpora.load_tokenizer(tmp_path).decode(bpe.encode(TEXT)) == TEXT
    assert len(corpora.load_tokenizer(tmp_path).encode(TEXT)) > 3


def in_a_sequence(part: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": [part, BYTE_LEVEL]}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "must be like"),
        ({"model": {"type": "BPE"}}, "must be like"),
        ({"model": 3}, "neither characters nor"),
        (
            {"model": {"type": "BPE", "vocab": {"日": 0}, "merges": []}, "added_tokens": []},
            "the character '日' in its tokens stands for no byte",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []},
            "not have all 256 bytes",
        ),
        ({"model": {"type": "WordLevel", "vocab": {"ab": 0}, "unk_token": "a"}}, "not characters"),
        # A panic of the library is an answer too.
        ({"pre_tokenizer": in_a_sequence({"type": "FixedLength", "length": 0})}, "must be like"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "must be like"),
        *(
            (change, "it turns .* into ")
            for change in (
                {"pre_tokenizer": None},
                {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
                {"pre_tokenizer": in_a_sequence({"type": "Punctuation", "behavior": "Removed"})},
                {"normalizer": {"type": "Lowercase"}},
                {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
                {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}},
            )
        ),
    ],
)
def test_a_tokenizer_that_changes_a_text_or_is_of_another_kind_is_refused(
    bpe, tmp_path, change, complaint
):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(bpe.to_json()) | change))
    with pytest.raises(InputError, match=complaint) as error:
        corpora.load_tokenizer(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("dropout", 0.5, "its dropout is 0.5"),
        ("continuing_subword_prefix", "##", "must be like"),
        ("end_of_word_suffix", "</w>", "it turns"),
    ],
)
def test_fields_of_other_models_are_refused(bpe, tmp_path, field, value, complaint):
    content = json.loads(bpe.to_json())
    content["model"][field] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=complaint):
        corpora.load_tokenizer(tmp_path)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2s_older_files_are_a_tokenizer_too(bpe, tmp_path, names):
    model = json.loads(bpe.to_json())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / names[0]).write_text(json.dumps(model["vocab"]))
    (tmp_path / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]))
    loaded = corpora.load_tokenizer(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(bpe)
    assert loaded.separator == END_OF_TEXT
    (tmp_path / names[1]).unlink()
    assert corpora.load_tokenizer(tmp_path) is None


def test_a_vocabulary_with_gaps_is_refused(bpe, tmp_path):
    content = json.loads(bpe.to_json())
    vocab = content["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="its ids are not 0, 1, 2"):
        corpora.load_tokenizer(tmp_path)


# Bits per byte


def test_token_lengths_count_text_and_not_separators(bpe):
    texts = ["the cat sat on the mat", "Grüße"]
    chars = chars_of("".join(texts))
    n_bytes = len("".join(texts).encode())
    ids = np.concatenate([chars.encode(text) for text in texts])
    assert token_lengths(chars)[ids].sum() == n_bytes
    end = bpe.encode_prompt(END_OF_TEXT)
    ids = np.concatenate([bpe.encode(texts[0]), end, bpe.encode(texts[1])])
    assert token_lengths(bpe)[ids].sum() == n_bytes


def test_a_uniform_guess_of_a_byte_is_eight_bits():
    for chars, n_bytes in ("ab", 1), ("éß", 2):
        ids = np.array([0, 1, 0], np.uint16)
        corpus = Corpus("it", {"val": ids}, 2, CharTokenizer(chars), "")
        assert corpus.bits_per_byte(n_bytes * np.log(256)) == pytest.approx(8)
    assert dataclasses.replace(corpus, tokenizer=None).bits_per_byte(1.0) is None
