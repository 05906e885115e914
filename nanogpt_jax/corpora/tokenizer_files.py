"""The file of a tokenizer, of which each prepared corpus and each run has a copy.

That is `tokenizer.json`: `{"type": "char", "chars": "..."}` for characters, the file of Hugging
Face's `tokenizers` for byte-pair encoding. GPT-2's two older files are read too.
"""

from pathlib import Path

from nanogpt_jax import files
from nanogpt_jax.corpora.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    byte_level,
)
from nanogpt_jax.errors import reading

TOKENIZER_FILE = "tokenizer.json"
OLD_FILES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}  # of GPT-2
MAX_FILE_BYTES = 2**26  # GPT-2's has 1.4 MB
REQUIREMENT = 'like {"type": "char", "chars": "..."} or byte-level BPE of Hugging Face tokenizers'


def tokenizer_from_json(content: str) -> Tokenizer:
    """Return the tokenizer that a `tokenizer.json` describes; raise ValueError for any other."""
    try:
        loaded = files.loads(content)
        if loaded.get("type") == "char":
            chars = loaded["chars"]
            if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
                raise ValueError("its chars are not text, sorted, each once")
            return CharTokenizer(chars)
        if loaded["model"]["type"] == "WordLevel":  # what an export of a character model has
            chars = sorted(loaded["model"]["vocab"], key=loaded["model"]["vocab"].get)
            if chars != sorted(chars) or any(len(char) != 1 for char in chars):
                raise ValueError("its words are not characters")
            return CharTokenizer("".join(chars))
        return BPETokenizer(content)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("it is neither characters nor byte-level BPE") from None


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer.json into a folder."""
    files.write_atomically(Path(folder, TOKENIZER_FILE), (tokenizer.to_json() + "\n").encode())


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Read a folder's tokenizer; return None if there is none."""
    path = find_tokenizer(folder)
    return path and read_tokenizer(path)


def find_tokenizer(folder: Path) -> Path | None:
    """Return a folder's tokenizer.json, or its vocabulary if it has GPT-2's older files."""
    for pair in ((TOKENIZER_FILE, TOKENIZER_FILE), *OLD_FILES.items()):
        path, merges = (Path(folder, name) for name in pair)
        if path.exists() and merges.exists():
            return path
    return None


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer's file, or a vocabulary with the merges next to it, or raise InputError."""
    with reading(path, REQUIREMENT):
        content = files.read_text(path, MAX_FILE_BYTES)
        if path.name in OLD_FILES:
            merges = files.read_text(path.with_name(OLD_FILES[path.name]), MAX_FILE_BYTES)
            content = _from_old_files(files.loads(content), merges)
        return tokenizer_from_json(content)


def _from_old_files(vocab: dict[str, int], merges: str) -> str:
    """Return the tokenizer.json of GPT-2's vocab.json and merges.txt."""
    from tokenizers import models

    lines = (line for line in merges.splitlines() if not line.startswith("#version"))
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if left]
    tokenizer = byte_level(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer.to_str()
