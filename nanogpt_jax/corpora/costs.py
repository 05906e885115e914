"""What the preparation of a large corpus needs: disk, memory, hours. No JAX."""

import os
import shutil
import sys
import time
from pathlib import Path

from nanogpt_jax.errors import InputError

LARGE_BYTES = 10**9  # of a source whose costs are said beforehand
GPT2_VOCAB_SIZE = 50257
CHARS_PER_S = 20e6


def say(source, folder: Path, tokenizer, id_bytes: int, freed: int = 0) -> None:
    """Say of a large source what it needs.

    Args:
        source: of sources.py or documents.py.
        folder: where the tokens will lie.
        id_bytes: of a token there.
        freed: bytes there that the tokens take the place of.

    Raises:
        InputError: the disk cannot hold the tokens.
    """
    free = shutil.disk_usage(folder).free + freed
    if source.text_bytes <= LARGE_BYTES and source.text_bytes * id_bytes < free:
        return  # a byte is a token at most
    tokens_per_s, bytes_per_token = speed(tokenizer)
    n_tokens = source.text_bytes / bytes_per_token
    if tokenizer.vocab_size == GPT2_VOCAB_SIZE:
        n_tokens = getattr(source, "gpt2_tokens", n_tokens)
    disk_bytes = n_tokens * id_bytes
    if disk_bytes > free:
        raise InputError(
            f"{folder}: about {disk_bytes / 1e9:,.1f} GB must be free there for the tokens of "
            f"{source.name}, but {free / 1e9:,.1f} GB are: free some, or name another place with "
            "--data_dir"
        )
    downloaded = getattr(source, "download_bytes", 0)
    download = f", {downloaded / 1e9:,.0f} GB of download (not stored)" if downloaded else ""
    print(
        f"{source.name} needs about, in {folder}: {n_tokens / 1e9:,.2f}B tokens = "
        f"{disk_bytes / 1e9:,.1f} GB of {free / 1e9:,.0f} GB free{download}, less than 1 GB of "
        f"memory, and {n_tokens / tokens_per_s / 3600:,.1f} hours on this machine's "
        f"{os.cpu_count()} cores. It can be stopped and gone on with at any time",
        file=sys.stderr,
    )


def speed(tokenizer) -> tuple[float, float]:
    """Return tokens/s and bytes a token, tried on Python's manual.

    Of characters, which may not be the manual's, they are what they usually are.
    """
    if not hasattr(tokenizer, "train"):
        return CHARS_PER_S, 1.0
    from pydoc_data.topics import topics

    texts = [*topics.values()]
    begun_s = time.perf_counter()
    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return n_tokens / (time.perf_counter() - begun_s), sum(map(len, texts)) / n_tokens
