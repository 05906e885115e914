"""A text of any size for trials: `python tests/make_text.py 200_000_000 > text.txt`. Seeded."""

import sys
from collections.abc import Iterator

import numpy as np

LETTERS = "etaoinshrdlcumwfgypbvk"


def make_text(n_chars: int, seed: int = 0, n_words: int = 50_000) -> Iterator[str]:
    """Yield pieces of a text of n_chars ASCII characters: words as frequent as Zipf's law has it.

    Sentences, line breaks and empty lines come as in prose, so that a tokenizer meets all of them.
    """
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 11, n_words)
    words = ["".join(random.choice(list(LETTERS), length)) for length in lengths]
    chances = 1 / np.arange(1, n_words + 1)
    left = n_chars
    while left > 0:
        chosen = random.choice(n_words, 20_000, p=chances / chances.sum())
        ends = random.choice(
            [" ", ", ", ". ", "\n", ".\n\n"], 20_000, p=[0.8, 0.08, 0.07, 0.03, 0.02]
        )
        piece = "".join(words[i] + end for i, end in zip(chosen, ends, strict=True))[:left]
        left -= len(piece)
        yield piece


if __name__ == "__main__":
    for piece in make_text(int(sys.argv[1])):
        sys.stdout.write(piece)
