"""Prepare a dataset: python data/prepare.py DATASET [--flag value ...]

DATASET is shakespeare_char, shakespeare (GPT-2 tokens), pydocs, tinystories, openwebtext,
fineweb-edu, or the path of a text file, a JSON or Parquet file with documents, or a folder of them.

train.py prepares small datasets by itself. Prepare large ones first, or on a machine with a network
for one without. If it is interrupted, run the same command again to continue.
"""

import shlex
from dataclasses import dataclass

from nanogpt_jax import corpora
from nanogpt_jax.config import Checked, parse_args, split_words
from nanogpt_jax.errors import InputError, run_command


@dataclass(frozen=True)
class Flags(Checked):
    """How to prepare it."""

    #: char, gpt2, bpe (trained on your text), a tokenizer.json or the folder of one; None: char for
    #: text, gpt2 for shakespeare, the large corpora, JSON and Parquet
    tokenizer: str | None = None
    vocab_size: int | None = None  # with bpe, the number of tokens; None: 4096
    text_key: str = "text"  # the key or column of the text in JSON and Parquet files
    shard_tokens: int = corpora.SHARD_TOKENS  # tokens in one file, at most
    data_dir: str = "data"  # folder of prepared datasets, as train.py's

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise InputError(
                f"vocab_size must be left out without --tokenizer bpe, got {self.vocab_size}"
            )


def main(argv: list[str]) -> None:
    """Prepare one dataset."""
    datasets, argv = split_words(argv, "the dataset")
    flags = parse_args(Flags, argv, __doc__)
    if len(datasets) != 1:
        raise InputError(
            f"exactly one dataset must be named, before any flag, got {len(datasets)}: name one of "
            f"{', '.join(corpora.NAMES)}, or a path"
        )
    folder = corpora.prepare(corpora.Request(datasets[0], **vars(flags)))
    corpus = corpora.open_corpus(folder, min_tokens=1)
    sizes = ", ".join(f"{len(ids):,} {split} tokens" for split, ids in corpus.splits.items())
    print(
        f"{folder.resolve()}: {sizes}, vocabulary of {corpus.vocab_size}. To train on it:\n"
        f"  python train.py --dataset {shlex.quote(str(folder.resolve()))}"
    )


if __name__ == "__main__":
    run_command(main)
