"""Which tokenizer a corpus should have, char, gpt2, bpe or a file, and which one it has."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import files
from nanogpt_jax.config import GPT2_REVISIONS
from nanogpt_jax.corpora.tokenizer import END_OF_TEXT, BPETokenizer, CharTokenizer, Tokenizer
from nanogpt_jax.corpora.tokenizer_files import TOKENIZER_FILE, find_tokenizer, read_tokenizer
from nanogpt_jax.errors import InputError, did_you_mean

GPT2_HASH = "5c81a021"  # `tokenizer_hash` of GPT-2's, from OpenAI's encoder.json and vocab.bpe
BPE_VOCAB_SIZE = 4096
PROBE = "It's 1234567 x=42;  They'LL\tgo\n\n\nÀ LA  café\u2019s e\u0301 ﬁn 日本語 🎭 " + END_OF_TEXT


@dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer that a corpus should have."""

    label: str  # in the folder's name and meta.json: char, gpt2, bpe4096 or a hash
    path: Path | None = None
    vocab_size: int | None = None  # of bpe
    is_char: bool = False  # of a text's own characters, or of those in a file

    @classmethod
    def parse(cls, requested: str, vocab_size: int | None = None) -> "TokenizerSpec":
        """Return what char, gpt2, bpe (with vocab_size) or a path to a file stands for."""
        if requested in ("char", "gpt2"):
            return cls(requested, is_char=requested == "char")
        if requested == "bpe":
            size = vocab_size or BPE_VOCAB_SIZE
            if size < 257:
                raise InputError(f"vocab_size must be at least 257 for bpe, got {size}")
            return cls(f"bpe{size}", vocab_size=size)
        path = Path(os.path.expanduser(requested))
        path = (find_tokenizer(path) or path / TOKENIZER_FILE) if path.is_dir() else path
        if not path.exists():
            hint = did_you_mean(requested, ("char", "gpt2", "bpe"))
            raise InputError(
                f"tokenizer must be char, gpt2, bpe, a {TOKENIZER_FILE} or the folder of one, but "
                f"there is no {requested!r}.{hint}"
            )
        found = read_tokenizer(path)
        label = tokenizer_hash(found)
        label = "gpt2" if label == GPT2_HASH else label  # in the folder of gpt2
        return cls(label, path, is_char=isinstance(found, CharTokenizer))

    def make(self, chars: str = "", texts: Iterable[str] = ()) -> Tokenizer:
        """Return the tokenizer: of `chars`, read from its file, or bpe trained on `texts`."""
        if self.label == "char":
            return CharTokenizer(chars)
        if self.vocab_size is None:
            return read_tokenizer(self.path or _gpt2_tokenizer())
        print(f"training a tokenizer of {self.vocab_size:,} tokens", file=sys.stderr)
        trained = BPETokenizer.train(texts, self.vocab_size)
        if trained.vocab_size < self.vocab_size:
            print(f"the text has pairs for only {trained.vocab_size:,} tokens", file=sys.stderr)
        return trained

    def matches(self, tokenizer: Tokenizer, label: str | None) -> bool:
        """Return whether it describes a folder's tokenizer, whose label meta.json may have."""
        found = tokenizer_hash(tokenizer)
        if self.label in (label, found, "gpt2" if found == GPT2_HASH else None):
            return True
        if self.label == "char":
            return isinstance(tokenizer, CharTokenizer)
        # For a prepared corpus bpe means its own, whatever its size.
        return self.vocab_size is not None and isinstance(tokenizer, BPETokenizer)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return eight hex digits that identify what a tokenizer does, however its file is written."""
    content = [token.hex() for token in tokenizer.token_bytes]
    if isinstance(tokenizer, BPETokenizer):
        merges = json.loads(tokenizer.to_json())["model"]["merges"]
        content += [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        # How a text is cut before merging shows in the ids of some tokens' own text.
        some = tokenizer.token_bytes[:: 1 + tokenizer.vocab_size // 8192]
        texts = [token.decode("utf-8", "ignore") for token in some]
        content += [str(ids.tolist()) for ids in tokenizer.encode_batch([PROBE, *texts])]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:8]


def _gpt2_tokenizer() -> Path:
    flag = "--tokenizer FOLDER/tokenizer.json; for your own text, --tokenizer bpe needs no download"
    return files.download_from_hub(
        "openai-community/gpt2", GPT2_REVISIONS["gpt2"], TOKENIZER_FILE, "save tokenizer.json", flag
    )
