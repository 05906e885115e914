"""Text to token ids and back: one token per character, or byte-pair encoding."""

import codecs
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from nanogpt_jax.corpora.text import anywhere
from nanogpt_jax.errors import InputError, reading

END_OF_TEXT = "<|endoftext|>"  # GPT-2's token after each document
ROUND_TRIP = "\n The Cat's\n\n  sat \t🎭 日本. "  # what a tokenizer must decode to itself
LONG_WORD = r"\S{256}|\s{256}"  # where one is cut in training


@dataclass(frozen=True)
class CharTokenizer:
    """One token per distinct character; ids are in the order of code points."""

    chars: str

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    @property
    def default_start(self) -> str:
        """The prompt if none is given: like nanoGPT's, a line break if there is one."""
        return "\n" if "\n" in self.chars else self.chars[0]

    @property
    def separator(self) -> str:
        """The text that follows each document; "" if the vocabulary has none."""
        return "\n" if "\n" in self.chars else ""

    @cached_property
    def token_bytes(self) -> list[bytes]:
        return [char.encode("utf-8", "surrogatepass") for char in self.chars]

    @cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.chars)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int64 of shape (len(text),); refuse unknown characters."""
        code_points = _code_points(text)
        ids = np.searchsorted(self._code_points, code_points)
        is_known = self._code_points[np.minimum(ids, self.vocab_size - 1)] == code_points
        if not is_known.all():
            unknown = sorted({text[i] for i in np.flatnonzero(~is_known)})
            shown = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise InputError(
                f"this model knows only its {self.vocab_size} training characters; remove or "
                f"replace {shown}"
            )
        return ids

    encode_prompt = encode

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        """Return the text of token ids; an id past the vocabulary becomes U+FFFD."""
        return "".join(self.chars[i] if i < self.vocab_size else "\ufffd" for i in ids)

    can_cut = staticmethod(anywhere)

    def stream_decoder(self) -> Callable[..., str]:
        return lambda ids, final=False: self.decode(ids)

    def to_json(self) -> str:
        return json.dumps({"type": "char", "chars": self.chars})


class BPETokenizer:
    """Byte-level byte-pair encoding, GPT-2's or trained on a text; it can encode any text.

    Hugging Face's `tokenizers` does the work, on all cores. Source: Radford et al., "Language
    models are unsupervised multitask learners", 2019.
    """

    default_start = "\n"  # nanoGPT's

    def __init__(self, content: str):
        """Read the content of a `tokenizer.json`; raise ValueError if it is not byte-level BPE."""
        from tokenizers import Tokenizer  # slow to import

        if dropout := json.loads(content)["model"].get("dropout"):
            raise ValueError(f"its dropout is {dropout!r}: it encodes a text differently each time")
        try:  # two, since how one reads END_OF_TEXT is a state, which threads would share
            self._of_text, self._of_prompt = (Tokenizer.from_str(content) for _ in range(2))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(str(error)) from None
        for tokenizer in (self._of_text, self._of_prompt):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._of_text.encode_special_tokens = True
        self.vocab_size = self._of_text.get_vocab_size()
        if sorted(self._of_text.get_vocab().values()) != list(range(self.vocab_size)):
            raise ValueError("its ids are not 0, 1, 2, ...")
        added = self._of_text.get_added_tokens_decoder()
        self.special_tokens = {i: token.content for i, token in added.items()}
        if len({token for token in self.token_bytes if len(token) == 1}) < 256:
            raise ValueError("it does not have all 256 bytes")
        decoded = self.decode(self._of_text.encode(ROUND_TRIP, add_special_tokens=False).ids)
        if decoded != ROUND_TRIP:  # such as one with add_prefix_space
            raise ValueError(f"it turns {ROUND_TRIP!r} into {decoded!r}")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Train a tokenizer on the most frequent pairs in some texts.

        The vocabulary includes 256 bytes and END_OF_TEXT; it is smaller if the pairs are too few.
        """
        from tokenizers import Regex, models, pre_tokenizers, trainers

        tokenizer = byte_level(models.BPE())
        words = tokenizer.pre_tokenizer
        # Training merges the pairs of a word one after the other, which takes minutes for a text
        # without spaces, such as a genome.
        cut = pre_tokenizers.Split(Regex(LONG_WORD), "merged_with_previous")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, words])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=sys.stderr.isatty(),
        )
        # In a thread, so that this one can handle Ctrl-C.
        training = ThreadPoolExecutor(1).submit(tokenizer.train_from_iterator, texts, trainer)
        while not training.done():
            wait([training], timeout=0.1)
        training.result()
        tokenizer.pre_tokenizer = words
        return cls(tokenizer.to_str())

    @property
    def separator(self) -> str:
        return END_OF_TEXT if END_OF_TEXT in self.special_tokens.values() else ""

    @cached_property
    def token_bytes(self) -> list[bytes]:
        byte_of = {char: byte for byte, char in enumerate(_byte_characters())}
        vocab = self._of_text.get_vocab()
        tokens = sorted(vocab, key=vocab.__getitem__)
        try:
            return [
                self.special_tokens[i].encode()
                if i in self.special_tokens
                else bytes(byte_of[char] for char in token)
                for i, token in enumerate(tokens)
            ]
        except KeyError as error:
            raise ValueError(f"the character {error} in its tokens stands for no byte") from None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int64 of shape (n,); "<|endoftext|>" in it is ordinary text."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Return the ids of a prompt, in which "<|endoftext|>" is a single token."""
        return self._encode(self._of_prompt, [text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Return the ids of each of many texts, encoded on all cores."""
        return self._encode(self._of_text, list(texts))

    def _encode(self, tokenizer, texts: list[str]) -> list[np.ndarray]:
        with reading("the tokenizer", "able to encode the text"):
            try:
                found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            except (UnicodeEncodeError, TypeError):
                raise InputError(
                    "the text must have whole characters, but has a lone surrogate: save it as "
                    "UTF-8"
                ) from None
        return [np.array(encoding.ids, np.int64) for encoding in found]

    def decode(self, ids) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._bytes(ids).decode("utf-8", "replace")

    def can_cut(self, left: str, right: str) -> bool:
        """Return whether the tokens of left + right are those of left, then those of right."""
        whole, *halves = self.encode_batch([left + right, left, right])
        return np.array_equal(whole, np.concatenate(halves))

    def stream_decoder(self) -> Callable[..., str]:
        """Return a function (ids, final) that decodes ids as they arrive.

        An incomplete character is held back until it is complete, or `final` is True.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids, final=False: decoder.decode(self._bytes(ids), final)

    def _bytes(self, ids) -> bytes:
        known = self.token_bytes
        return b"".join(known[i] if i < len(known) else b"\xef\xbf\xbd" for i in ids)

    def to_json(self) -> str:
        return self._of_prompt.to_str()


Tokenizer: TypeAlias = CharTokenizer | BPETokenizer


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the bytes of text in each token, shape (vocab_size,); a separator's are 0."""
    lengths = np.array([len(token) for token in tokenizer.token_bytes])
    if isinstance(tokenizer, BPETokenizer):
        lengths[list(tokenizer.special_tokens)] = 0
    return lengths


def byte_level(model) -> Any:
    """Return a tokenizer of the library that cuts a text into words as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in GPT-2's vocabulary.

    Printable ones of Latin-1 stand for themselves, the others take those after 255 in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
