"""Locate the files of a GPT-2: four models on the Hugging Face Hub, or a local folder. No JAX."""

import os
from pathlib import Path

from nanogpt_jax import corpora
from nanogpt_jax.config import GPT2_REVISIONS, GPT2_SHAPES
from nanogpt_jax.errors import InputError
from nanogpt_jax.files import download_from_hub

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FILES = f"{CONFIG}, {WEIGHTS} and {TOKENIZER}"
BLOCK_SIZE, VOCAB_SIZE = 1024, 50257  # of all four


def is_name(source: str) -> bool:
    """Return whether a source is one of the four names and not a local folder with a model."""
    return source in GPT2_SHAPES and not os.path.isfile(os.path.join(source, CONFIG))


def find(source: str, file: str) -> Path:
    """Return the local path of a GPT-2's file, downloaded if the source is one of the four."""
    if is_name(source):
        repository = f"openai-community/{source}"
        revision, remedy = GPT2_REVISIONS[source], f"save {FILES}"
        return download_from_hub(repository, revision, file, remedy, "--init_from FOLDER")
    path = Path(source, file)
    if not path.is_file():
        raise InputError(f"{source} must have {FILES} of a GPT-2, but there is no {path}")
    return path


def find_tokenizer(source: str) -> Path | None:
    """Return the local path of a GPT-2's tokenizer as `find` does; None if a folder has none."""
    return find(source, TOKENIZER) if is_name(source) else corpora.find_tokenizer(Path(source))
