"""Text to token ids and back. No JAX.

A tokenizer is what `tokenizer.json` says: `{"type": "char", "chars": "..."}`. It travels with the
dataset and with every run, so a run can be sampled anywhere.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanogpt_jax.errors import InputError

FILE_NAME = "tokenizer.json"


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

    def decode(self, ids) -> str:
        """Return the text of token ids; one past the vocabulary shows as U+FFFD."""
        return "".join(self.chars[i] if i < self.vocab_size else "\ufffd" for i in ids)

    def to_json(self) -> dict:
        """Return what `from_json` reads."""
        return {"type": "char", "chars": self.chars}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def save(tokenizer: CharTokenizer, folder: Path) -> None:
    """Write tokenizer.json into a folder."""
    Path(folder, FILE_NAME).write_text(json.dumps(tokenizer.to_json()) + "\n", encoding="utf-8")


def load(folder: Path) -> CharTokenizer | None:
    """Read a folder's tokenizer.json; None where it has none (`.bin` files made elsewhere).

    Raises:
        InputError: the file is not a tokenizer this version knows.
    """
    path = Path(folder, FILE_NAME)
    if not path.exists():
        return None
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if loaded["type"] == "char" and isinstance(loaded["chars"], str):
            return CharTokenizer(loaded["chars"])
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f'{path}: must be like {{"type": "char", "chars": "..."}}, but is not')
