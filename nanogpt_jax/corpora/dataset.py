"""Open a prepared folder, made here, by nanoGPT or by anything else, and check it. No JAX."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanogpt_jax.corpora import shards
from nanogpt_jax.corpora import tokenizer as tokenizers
from nanogpt_jax.corpora.text import read_pieces
from nanogpt_jax.corpora.tokenizer import CharTokenizer, Tokenizer
from nanogpt_jax.corpora.tokens import Shards, Tokens, check_whole, open_tokens
from nanogpt_jax.data import SPLITS
from nanogpt_jax.errors import InputError

PIECE_TOKENS = 2**24  # read at once: a corpus may exceed the memory


@dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, checked, with what is needed to read them."""

    name: str
    splits: dict[str, Tokens]  # "train" and "val", each of shape (n_tokens,)
    vocab_size: int  # rows that a model needs, padding among them
    tokenizer: Tokenizer | None  # None: `.bin` files without one; training needs none
    fingerprint: str  # of all token ids: a run is only resumed on the text it began with
    known_tokens: int | None = None  # ids that exist; None: unknown

    @cached_property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token of the validation split stands for, in the mean."""
        if self.tokenizer is None:
            return None
        val = self.splits["val"]
        if isinstance(val, Shards):  # trusted so far
            for begin in range(0, len(val), PIECE_TOKENS):
                val.check(val[begin : begin + PIECE_TOKENS][None], np.array([begin]))
        return tokenizers.bytes_per_token(self.tokenizer, val)


def open_corpus(folder: Path, min_tokens: int, vocab_size: int | None = None) -> Corpus:
    """Open and check both splits of a prepared folder.

    Args:
        min_tokens: what each split must have, block_size + 1.
        vocab_size: what the model shall have; None: what the folder says.

    Raises:
        InputError: a file is missing, cut off, too short, or has ids past the vocabulary.
    """
    folder = Path(folder)
    shards.check_finished(folder)
    meta = shards.read_meta(folder)
    dtype = meta.get("dtype", "uint16")
    files = {split: shards.files_of(folder, split, meta) for split in SPLITS}
    _check_sizes(folder, files, dtype)
    tokenizer = tokenizers.load(folder) or tokenizer_of_nanogpt(folder, dtype)
    known = tokenizer.vocab_size if tokenizer else meta.get("vocab_size")
    counted = None
    if known is None and (folder / "meta.pkl").exists() and vocab_size is None:
        counted = _largest_id(folder, files, dtype) + 1
        print(
            f"{folder}: meta.pkl is not read, since a pickle can run any code. The vocabulary is "
            f"taken as {counted}, the largest id + 1; to sample text, put the input.txt that "
            "train.bin was made from beside it."
        )
    # The last is nanoGPT's: GPT-2's vocabulary, padded.
    size = vocab_size or known or counted or 50304
    if known and size < known:
        raise InputError(f"vocab_size must be at least {known} for {folder}, got {size}")
    splits, crcs = {}, []
    for split in SPLITS:
        paths = [folder / file["name"] for file in files[split]]
        trusted = meta["splits"][split]["crc32"] if "splits" in meta else None
        splits[split], crc = open_tokens(paths, dtype, known or size, min_tokens, trusted)
        crcs.append(crc)
    fingerprint = "".join(f"{crc:08x}" for crc in crcs)
    return Corpus(folder.name, splits, size, tokenizer, fingerprint, known)


def _check_sizes(folder: Path, files: dict[str, list[dict]], dtype: str) -> None:
    """Refuse token files that are missing, cut off, or of another size than meta.json says."""
    for file in (file for split in SPLITS for file in files[split]):
        path = folder / file["name"]
        n_tokens = check_whole(path, dtype) // np.dtype(dtype).itemsize
        expected = file.get("tokens", n_tokens)
        if n_tokens != expected:
            raise InputError(
                f"{path}: must have {expected} tokens, as meta.json says, but has {n_tokens}: "
                "delete the folder and make it anew"
            )


def _largest_id(folder: Path, files: dict[str, list[dict]], dtype: str) -> int:
    paths = [folder / file["name"] for split in SPLITS for file in files[split]]
    pieces = (
        part[begin : begin + PIECE_TOKENS]
        for part in _mapped(paths, dtype)
        for begin in range(0, len(part), PIECE_TOKENS)
    )
    return max((int(piece.max()) for piece in pieces), default=0)


def _mapped(paths: list[Path], dtype: str) -> list[np.ndarray]:
    paths = [path for path in paths if path.exists() and path.stat().st_size]
    return [np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r") for path in paths]


def tokenizer_of_nanogpt(folder: Path, dtype: str) -> CharTokenizer | None:
    """Rebuild the tokenizer of nanoGPT's character datasets, which keep input.txt beside it."""
    source = folder / "input.txt"
    if not source.exists():
        return None
    with source.open("rb") as file:
        chars = {char for text, _ in read_pieces(file, str(source)) for char in set(text)}
        tokenizer = CharTokenizer("".join(sorted(chars)))
        files = [file for split in SPLITS for file in shards.files_of(folder, split, {})]
        parts = _mapped([folder / file["name"] for file in files], dtype)
        same = bool(chars and parts) and _is_encoded(
            Shards([], parts, tokenizer.vocab_size),
            (tokenizer.encode(text) for text, _ in read_pieces(file, str(source))),
        )
    if not same:
        print(f"{folder}: train.bin was not made from input.txt's characters", file=sys.stderr)
    return tokenizer if same else None


def _is_encoded(tokens: Shards, ids_of_pieces: Iterable[np.ndarray]) -> bool:
    at = 0
    for ids in ids_of_pieces:
        if not np.array_equal(tokens[at : at + len(ids)], ids):
            return False
        at += len(ids)
    return at == len(tokens)
