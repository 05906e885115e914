"""Text to token ids and back. No JAX.

A tokenizer is what its `tokenizer.json` says: of characters `{"type": "char", "chars": "..."}`, of
byte-pair encoding the file of Hugging Face's `tokenizers`. It travels with the dataset and with
every run, so a run can be sampled anywhere.
"""

import codecs
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nanogpt_jax import files
from nanogpt_jax.errors import InputError, reading

FILE_NAME = "tokenizer.json"
MOST_BYTES = 2**26  # GPT-2's has 1.4 MB
# What a byte-level BPE of today's can do to a text before its pairs are merged.
NORMALIZERS, CUTS = {"NFC", "NFD", "NFKC", "NFKD"}, {"ByteLevel", "Digits", "Split"}
REQUIREMENT = (
    'like {"type": "char", "chars": "..."} or a byte-level BPE of Hugging Face\'s tokenizers'
)
END_OF_TEXT = "<|endoftext|>"  # GPT-2's token between two documents
PROBE = "It's 1234567 x=42;  They'LL\tgo\n\n\nÀ LA  café\u2019s e\u0301 ﬁn 日本語 🎭 " + END_OF_TEXT


@dataclass(frozen=True)
class CharTokenizer:
    """One token for each distinct character; ids follow the characters' code points."""

    chars: str

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Return the tokenizer of all characters in `text`, as nanoGPT's prepare.py makes it."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return len(self.chars)

    @property
    def default_start(self) -> str:
        """What is read where no start text is given: as nanoGPT, a line break if there is one."""
        return "\n" if "\n" in self.chars else self.chars[0]

    @property
    def separator(self) -> str:
        """What stands between two documents."""
        return "\n" if "\n" in self.chars else ""

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token, in UTF-8."""
        return [char.encode("utf-8", "surrogatepass") for char in self.chars]

    @cached_property
    def _code_points(self) -> np.ndarray:
        return _code_points(self.chars)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int64 of shape (len(text),).

        Raises:
            InputError: the text has characters outside the vocabulary; the message lists them.
        """
        code_points = _code_points(text)
        ids = np.searchsorted(self._code_points, code_points)
        found = self._code_points[np.minimum(ids, self.vocab_size - 1)] == code_points
        if not found.all():
            unknown = sorted({text[i] for i in np.flatnonzero(~found)})
            shown = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise InputError(
                f"the text may hold only the {self.vocab_size} characters the model was trained "
                f"on, but it has {shown}: leave them out or write them otherwise"
            )
        return ids

    def encode_prompt(self, text: str) -> np.ndarray:
        """Return the ids of a start text: here the same as `encode`."""
        return self.encode(text)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Return the ids of each of many texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        """Return the text of token ids; one past the vocabulary shows as U+FFFD."""
        return "".join(self.chars[i] if i < self.vocab_size else "\ufffd" for i in ids)

    def stream_decoder(self) -> Callable[..., str]:
        """Return a function (ids, final) that decodes ids as they come."""
        return lambda ids, final=False: self.decode(ids)

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return json.dumps({"type": "char", "chars": self.chars})


class BPETokenizer:
    """Byte-level byte-pair encoding, GPT-2's or one trained on a text; any text has ids.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019; the work is
    done by Hugging Face's `tokenizers`, on all cores.
    """

    def __init__(self, content: str):
        """Take the content of a `tokenizer.json` of Hugging Face's.

        Raises:
            ValueError: it is not one, or not of byte-level BPE.
        """
        from tokenizers import Tokenizer  # only where there is one

        _check_form(json.loads(content))
        try:  # two, since how they read END_OF_TEXT is a state that threads would share
            self._of_text, self._of_prompt = (Tokenizer.from_str(content) for _ in range(2))
        except Exception as error:  # Exception itself is what it raises
            raise ValueError(str(error)) from None
        for tokenizer in (self._of_text, self._of_prompt):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._of_text.encode_special_tokens = True
        self.vocab_size = self._of_text.get_vocab_size()
        if sorted(self._of_text.get_vocab().values()) != list(range(self.vocab_size)):
            raise ValueError("its ids are not 0, 1, 2, ...")
        added = self._of_text.get_added_tokens_decoder()
        self._special = {i: token.content for i, token in added.items()}
        if len({token for token in self.token_bytes if len(token) == 1}) < 256:
            raise ValueError("it does not have all 256 bytes")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Return a tokenizer of the pairs of bytes most frequent in some texts.

        Args:
            vocab_size: with 256 bytes and END_OF_TEXT; fewer where the texts have no more pairs.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def __eq__(self, other) -> bool:
        return isinstance(other, BPETokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    default_start = "\n"  # nanoGPT's

    @property
    def merges(self) -> list:
        """Pairs of tokens that become one, in the order in which they are looked for."""
        return json.loads(self.to_json())["model"]["merges"]

    @property
    def separator(self) -> str:
        """What stands between two documents: END_OF_TEXT, where the vocabulary has it."""
        return END_OF_TEXT if END_OF_TEXT in self._special.values() else ""

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token: those that its characters stand for.

        Raises:
            ValueError: a character that stands for none.
        """
        byte_of = {char: byte for byte, char in enumerate(_byte_characters())}
        tokens = [self._of_text.id_to_token(i) for i in range(self.vocab_size)]
        try:
            return [
                self._special[i].encode()
                if i in self._special
                else bytes(byte_of[char] for char in token)
                for i, token in enumerate(tokens)
            ]
        except KeyError as error:
            raise ValueError(f"the character {error} in its tokens stands for no byte") from None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int64 of shape (n,); "<|endoftext|>" in it is mere text.

        Raises:
            InputError: the text has a lone surrogate, which is no character.
        """
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> np.ndarray:
        """Return the ids of a start text, in which "<|endoftext|>" is the one token it names."""
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
                    "the text must be of whole characters, but has a lone surrogate: write it in "
                    "UTF-8"
                ) from None
        return [np.array(encoding.ids, np.int64) for encoding in found]

    def decode(self, ids) -> str:
        """Return the text of token ids; what is no UTF-8 in it shows as U+FFFD."""
        return self._bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> Callable[..., str]:
        """Return a function (ids, final) that decodes ids as they come.

        The beginning of a character is held back until its end comes, or `final` is True.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids, final=False: decoder.decode(self._bytes(ids), final)

    def _bytes(self, ids) -> bytes:
        known = self.token_bytes
        return b"".join(known[i] if i < len(known) else b"\xef\xbf\xbd" for i in ids)

    def to_json(self) -> str:
        """Return what `from_json` reads."""
        return self._of_prompt.to_str()


Tokenizer: TypeAlias = CharTokenizer | BPETokenizer


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return a loss in nats a token as bits a byte of text, which compares tokenizers."""
    return loss / math.log(2) / bytes_per_token


def hash_of(tokenizer: Tokenizer) -> str:
    """Return eight digits that tell tokenizers apart, by what they do, however it is written."""
    content = [token.hex() for token in tokenizer.token_bytes]
    if isinstance(tokenizer, BPETokenizer):
        content += [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer.merges]
        # How a text is cut before it is merged: seen by what becomes of some tokens' own text.
        some = tokenizer.token_bytes[:: 1 + tokenizer.vocab_size // 8192]
        texts = [token.decode("utf-8", "ignore") for token in some]
        content += [str(ids.tolist()) for ids in tokenizer.encode_batch([PROBE, *texts])]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:8]


def bytes_per_token(tokenizer: Tokenizer, tokens: np.ndarray) -> float:
    """Return how many bytes of text a token of a split stands for, in the mean.

    What separates documents is no text: it counts no bytes.
    """
    lengths = np.array([len(token) for token in tokenizer.token_bytes])
    if isinstance(tokenizer, BPETokenizer):
        lengths[list(tokenizer._special)] = 0
    total = sum(
        int(lengths[tokens[begin : begin + 2**24]].sum()) for begin in range(0, len(tokens), 2**24)
    )
    return total / len(tokens)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _check_form(fields: dict) -> None:
    """Refuse what is not byte-level BPE, and parts of which some make `tokenizers` panic.

    Raises:
        ValueError: naming the part.
    """
    model = fields["model"]
    cuts = _kinds(fields.get("pre_tokenizer"), "pretokenizers")
    if model["type"] != "BPE" or "ByteLevel" not in cuts:
        raise ValueError("it is not byte-level BPE")
    for part, kinds, known in (
        ("normalizer", _kinds(fields.get("normalizer"), "normalizers"), NORMALIZERS),
        ("pre_tokenizer", cuts, CUTS),
    ):
        if kinds - known:
            others = ", ".join(sorted(map(str, kinds - known)))
            raise ValueError(
                f"its {part} has {others}, where only {', '.join(sorted(known))} is known"
            )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"its {name} is {model[name]!r}, which GPT-2 has none of")


def _kinds(part: dict | None, parts: str) -> set[str]:
    if part is None:
        return set()
    return {each["type"] for each in (part[parts] if part["type"] == "Sequence" else [part])}


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in GPT-2's vocabulary.

    A printable one of Latin-1 stands for itself, the others take what follows 255 in their order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]


def from_json(content: str) -> Tokenizer:
    """Return the tokenizer that a `tokenizer.json` describes.

    Raises:
        ValueError: it describes none that this version knows.
    """
    try:
        loaded = files.loads(content)
        if loaded.get("type") == "char":
            chars = loaded["chars"]
            if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
                raise ValueError("its chars are no text, or not sorted, each once")
            return CharTokenizer(chars)
        if loaded["model"]["type"] == "WordLevel":  # as pretrained.py writes one of characters
            chars = sorted(loaded["model"]["vocab"], key=loaded["model"]["vocab"].get)
            if chars != sorted(chars) or any(len(char) != 1 for char in chars):
                raise ValueError("its words are not characters")
            return CharTokenizer("".join(chars))
        return BPETokenizer(content)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("it is neither of characters nor of byte-level BPE") from None


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json into a folder."""
    files.write_atomically(Path(folder, FILE_NAME), (tokenizer.to_json() + "\n").encode())


def load(folder: Path) -> Tokenizer | None:
    """Read a folder's tokenizer.json; None where it has none (`.bin` files made elsewhere).

    Raises:
        InputError: the file is not a tokenizer this version knows.
    """
    path = Path(folder, FILE_NAME)
    return read(path) if path.exists() else None


def read(path: Path) -> Tokenizer:
    """Read a tokenizer's file.

    Raises:
        InputError: the file cannot be read, or is not a tokenizer this version knows.
    """
    with reading(path, REQUIREMENT):
        return from_json(files.read_text(path, MOST_BYTES))
