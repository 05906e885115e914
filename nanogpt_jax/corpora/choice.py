"""Which tokenizer a corpus shall have: char, gpt2, bpe or a file. No JAX."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax.corpora import tokenizer as tokenizers
from nanogpt_jax.corpora.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from nanogpt_jax.errors import InputError, did_you_mean
from nanogpt_jax.files import download_from_hub

GPT2_HASH = "6f8dee62"  # of GPT-2's tokenizer, by `tokenizer.hash_of`
BPE_VOCAB_SIZE = 4096
BPE_CHARS = 100_000_000  # that BPE is trained on


@dataclass(frozen=True)
class Choice:
    """The tokenizer that was asked for."""

    label: str  # in the folder's name and meta.json: char, gpt2, bpe4096 or a hash
    path: Path | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, asked: str, vocab_size: int | None = None) -> "Choice":
        """Return what char, gpt2, bpe or a path means.

        Args:
            vocab_size: of bpe; the others bring theirs.

        Raises:
            InputError: none of them, a file that is no tokenizer, too small a vocabulary.
        """
        if asked in ("char", "gpt2"):
            return cls(asked)
        if asked == "bpe":
            size = vocab_size or BPE_VOCAB_SIZE
            if size < 257:
                raise InputError(
                    "vocab_size must be at least 257 for bpe, of 256 bytes and what separates "
                    f"documents, got {size}"
                )
            return cls(f"bpe{size}", vocab_size=size)
        path = Path(asked)
        path = path / tokenizers.FILE_NAME if path.is_dir() else path
        if not path.exists():
            raise InputError(
                f"tokenizer must be char, gpt2, bpe or a {tokenizers.FILE_NAME}, but there is no "
                f"{asked!r}.{did_you_mean(asked, ('char', 'gpt2', 'bpe'))}"
            )
        found = tokenizers.hash_of(tokenizers.read(path))
        return cls("gpt2" if found == GPT2_HASH else found, path)  # in the same folder

    def make(self, source, facts: dict) -> Tokenizer:
        """Return the tokenizer; bpe is trained on the source's first 100 million characters."""
        if self.label == "char":
            return CharTokenizer(facts["chars"])
        if self.vocab_size is None:
            return tokenizers.read(self.path or _gpt2_tokenizer())
        print(
            f"training a tokenizer of {self.vocab_size:,} tokens on {source.name}, at most its "
            f"first {BPE_CHARS:,} characters",
            file=sys.stderr,
        )
        trained = BPETokenizer.train(_first_texts(source, facts), self.vocab_size)
        if trained.vocab_size < self.vocab_size:
            print(f"no more than {trained.vocab_size:,} could be learnt from it", file=sys.stderr)
        return trained

    def made(self, tokenizer: Tokenizer, label: str | None) -> bool:
        """Return whether a folder's tokenizer is the one that was asked for.

        Args:
            label: what the folder's meta.json says.
        """
        found = tokenizers.hash_of(tokenizer)
        if self.label in (label, found, "gpt2" if found == GPT2_HASH else None):
            return True
        if self.label == "char":
            return isinstance(tokenizer, CharTokenizer)
        # Of what is prepared already, bpe means its own.
        return self.vocab_size is not None and isinstance(tokenizer, BPETokenizer)


def _gpt2_tokenizer() -> Path:
    name = tokenizers.FILE_NAME
    flag = f"--tokenizer FOLDER/{name}; for your own text, --tokenizer bpe needs no download"
    return download_from_hub("openai-community/gpt2", name, f"save {name}", flag)


def _first_texts(source, facts: dict) -> Iterator[str]:
    left = BPE_CHARS
    for piece in source.pieces(facts):
        if piece.text is not None:
            yield piece.text
            left -= len(piece.text)
        if left <= 0:
            return
