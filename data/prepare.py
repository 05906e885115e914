"""Prepare a dataset ahead of training: python data/prepare.py DATASET [--flag value ...]

DATASET is shakespeare_char, shakespeare (with GPT-2's tokens), pydocs, openwebtext, fineweb-edu,
or a path: a text file, a JSONL or parquet file with a text in each line or row, a folder of them.

train.py does this by itself where it takes no hours; run it alone to look at the numbers, or to
prepare on a machine that has a network for one that has none. It can be stopped at any moment,
and goes on where it was.
"""

from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import corpora
from nanogpt_jax.config import check_fields, check_value
from nanogpt_jax.config import cli as command_line
from nanogpt_jax.errors import InputError, run_command


@dataclass(frozen=True)
class Flags:
    """How it is prepared."""

    tokenizer: str | None = None
    """char, gpt2, bpe (trained on the text) or a tokenizer.json; None: char for texts, gpt2 for
    shakespeare, the large corpora, JSONL and parquet."""
    vocab_size: int | None = None
    """Tokens of bpe; None: 4096."""
    shard_tokens: int = corpora.SHARD_TOKENS
    """Most tokens of a file."""
    data_dir: str = str(Path(__file__).parent)
    """Where it will lie, each dataset in a folder of its own."""

    def __post_init__(self):
        check_fields(self)
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise InputError("vocab_size is that of --tokenizer bpe: give both, or leave it out")


def main(argv: list[str]) -> None:
    """Prepare the one dataset that is named."""
    datasets = [argv.pop(0)] if argv and not argv[0].startswith("-") else []
    if not datasets and not {"-h", "--help"} & {*argv}:
        raise InputError(
            f"one dataset must be named, first of all: {', '.join(corpora.NAMES)} or a path"
        )
    flags = command_line.parse_args(
        Flags, command_line.split_settings(argv, Flags), Flags(), __doc__
    )
    check_value("the dataset", str, datasets[0])
    folder = corpora.prepare(
        datasets[0],
        Path(flags.data_dir),
        1,
        flags.tokenizer,
        flags.vocab_size,
        flags.shard_tokens,
    )
    corpus = corpora.open_corpus(folder, min_tokens=1)
    sizes = ", ".join(f"{len(ids):,} {split} tokens" for split, ids in corpus.splits.items())
    print(f"{folder}: {sizes}, vocabulary of {corpus.vocab_size}")


if __name__ == "__main__":
    run_command(main)
