"""Open a prepared folder, made here, by nanoGPT or by anything else, and check it."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanogpt_jax.config import SPLITS
from nanogpt_jax.corpora import shards, tokens
from nanogpt_jax.corpora.text import read_blocks
from nanogpt_jax.corpora.tokenizer import CharTokenizer, Tokenizer, token_lengths
from nanogpt_jax.corpora.tokenizer_files import load_tokenizer
from nanogpt_jax.errors import InputError

NANOGPT_VOCAB_SIZE = 50304  # GPT-2's, padded


@dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, checked, and what is needed to decode them."""

    name: str
    splits: dict[str, tokens.Tokens]  # "train" and "val", each of shape (n_tokens,)
    vocab_size: int  # rows that a model needs, padding included
    tokenizer: Tokenizer | None  # None: `.bin` files without one; training needs none
    fingerprint: str  # of all token ids: a run never resumes on a different text
    known_tokens: int | None = None  # ids that exist; None: unknown

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text per token of the validation split; separators count none."""
        if self.tokenizer is None:
            return None
        lengths, val = token_lengths(self.tokenizer), self.splits["val"]
        return sum(int(lengths[piece].sum()) for piece in tokens.pieces_of(val)) / len(val)

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert nats per token to bits per byte of text, comparable across tokenizers."""
        return loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None


def open_corpus(
    folder: Path, min_tokens: int, vocab_size: int | None = None, known_tokens: int | None = None
) -> Corpus:
    """Open and check both splits of a prepared folder.

    Args:
        min_tokens: what each split must have, block_size + 1.
        vocab_size: of the model; None: as the folder says.
        known_tokens: ids that exist, if the folder does not say.

    Raises:
        InputError: a file is missing, cut off, too short, or has ids past the vocabulary.
    """
    folder = Path(folder)
    shards.check_finished(folder)
    meta = shards.read_meta(folder)
    dtype = meta.get("dtype", "uint16")
    paths = {split: _check_sizes(folder, split, meta, dtype) for split in SPLITS}
    tokenizer = load_tokenizer(folder) or tokenizer_of_nanogpt(folder, dtype)
    known = tokenizer.vocab_size if tokenizer else meta.get("vocab_size", known_tokens)
    counted = None
    if known is None and (folder / "meta.pkl").exists() and vocab_size is None:
        parts = tokens.map_files(paths["train"] + paths["val"], dtype)
        ids = (piece for part in parts for piece in tokens.pieces_of(part))
        counted = 1 + max((int(piece.max()) for piece in ids), default=0)
        print(
            f"{folder}: meta.pkl is not read, since a pickle can run any code. The vocabulary "
            f"size is taken to be {counted}, the largest id + 1; to sample text, put the "
            "input.txt that train.bin was made from next to it."
        )
    size = vocab_size or known or counted or NANOGPT_VOCAB_SIZE
    if known and size < known:
        raise InputError(
            f"vocab_size must be at least {known} for {folder}, got {size}: drop --vocab_size"
        )
    splits, fingerprint = {}, ""
    for split in SPLITS:
        expected = meta["splits"][split]["crc32"] if "splits" in meta else None
        splits[split], crc32 = tokens.open_tokens(
            paths[split], dtype, known or size, min_tokens, expected
        )
        fingerprint += f"{crc32:08x}"
    return Corpus(folder.name, splits, size, tokenizer, fingerprint, known)


def _check_sizes(folder: Path, split: str, meta: dict, dtype: str) -> list[Path]:
    """Return a split's files; refuse missing, cut off or differing ones."""
    files = shards.files_of(folder, split, meta)
    for path, expected in files.items():
        n_tokens = tokens.check_size(path, dtype)
        if expected not in (None, n_tokens):
            raise InputError(
                f"{path}: must have {expected} tokens, as meta.json says, but has {n_tokens}: "
                "delete the folder and prepare it again"
            )
    return [*files]


def tokenizer_of_nanogpt(folder: Path, dtype: str) -> CharTokenizer | None:
    """Rebuild the tokenizer of a character dataset of nanoGPT's from the input.txt next to it."""
    source = folder / "input.txt"
    if not source.exists():
        return None
    with source.open("rb") as file:
        chars = {char for text in read_blocks(file, str(source)) for char in set(text)}
        tokenizer = CharTokenizer("".join(sorted(chars)))
        paths = [path for split in SPLITS for path in shards.files_of(folder, split, {})]
        parts = tokens.map_files(paths, dtype)
        file.seek(0)
        texts = read_blocks(file, str(source))
        if chars and parts and _is_encoded(parts, texts, tokenizer):
            return tokenizer
    print(f"{folder}: train.bin was not made from input.txt's characters", file=sys.stderr)
    return None


def _is_encoded(parts: list[np.ndarray], texts: Iterable[str], tokenizer: CharTokenizer) -> bool:
    ids, at = tokens.TokenFiles([], parts, 0, is_checked=True), 0
    for text in texts:
        if not np.array_equal(ids[at : at + len(text)], tokenizer.encode(text)):
            return False
        at += len(text)
    return at == len(ids)
