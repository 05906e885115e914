"""Prepare a dataset ahead of training: python data/prepare.py shakespeare_char|pydocs|PATH

train.py does this by itself; run it alone to look at the numbers, or to prepare on a machine that
has a network for one that has none.
"""

from pathlib import Path

from nanogpt_jax import corpora
from nanogpt_jax.errors import InputError, run_command


def main(argv: list[str]) -> None:
    """Prepare the one dataset that is named, beside this file."""
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(argv) != 1 or argv[0].startswith("-"):
        raise InputError(f"one dataset must be named: {', '.join(corpora.NAMES)} or a path")
    folder = corpora.prepare(argv[0], Path(__file__).parent)
    corpus = corpora.open_corpus(folder, min_tokens=1)
    sizes = ", ".join(f"{len(ids):,} {split} tokens" for split, ids in corpus.splits.items())
    print(f"{folder}: {sizes}, vocabulary of {corpus.vocab_size}")


if __name__ == "__main__":
    run_command(main)
