"""Where the files of a GPT-2 are: on the Hugging Face hub under four names, or a folder. No JAX."""

import os
from pathlib import Path

from nanogpt_jax.errors import InputError, did_you_mean, first_line

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FILES = f"{CONFIG}, {WEIGHTS} and {TOKENIZER}"
# OpenAI's four, so that a shape is known without a network. Source: Radford et al., "Language
# models are unsupervised multitask learners", 2019, table 2; heads from the files themselves.
SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
BLOCK_SIZE, VOCAB_SIZE = 1024, 50257  # of all four
TOKENIZER_HASH = "6f8dee62"  # of their tokenizer, by `tokenizer.hash_of`
TIMEOUT_S = 10


def is_name(source: str) -> bool:
    """Return whether a source is one of the four names, and no folder here that has a model."""
    return source in SHAPES and not os.path.isfile(os.path.join(source, CONFIG))


def find(source: str, file: str) -> Path:
    """Return where a file of a GPT-2 lies; what is not here yet is downloaded, and kept.

    Args:
        source: one of the four names, or a folder.
        file: CONFIG, WEIGHTS or TOKENIZER.

    Raises:
        InputError: it cannot be downloaded, or the source has no such file.
    """
    if is_name(source):
        return _download(source, file, "--init_from FOLDER")
    path = os.path.join(source, file)  # os.path answers a name that no file can have with False
    if os.path.isfile(path):
        return Path(path)
    what = f"there is no {path}" if os.path.isdir(source) else f"{source!r} is neither"
    hint = "" if os.path.isdir(source) else did_you_mean(Path(source).name, SHAPES)
    raise InputError(
        f"init_from must be {', '.join(SHAPES)} or a folder with {FILES} of a "
        f"GPT-2, but {what}.{hint}"
    )


def gpt2_tokenizer() -> Path:
    """Return where GPT-2's tokenizer.json lies; all four have the same.

    Raises:
        InputError: it cannot be downloaded.
    """
    other = ". Of your own text, --tokenizer bpe needs no download"
    return _download("gpt2", TOKENIZER, f"--tokenizer FOLDER/{TOKENIZER}{other}")


def _download(name: str, file: str, flag: str) -> Path:
    import huggingface_hub  # only who needs the hub waits for it

    repository = f"openai-community/{name}"
    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
        # The download would try again and again for half a minute; this asks once.
        url = huggingface_hub.hf_hub_url(repository, file)
        huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT_S)
        huggingface_hub.utils.logging.set_verbosity_error()
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # the kinds differ between versions of the library and its clients
        reason = first_line(error).rstrip(".")
        files = TOKENIZER if flag.startswith("--tokenizer") else FILES
        raise InputError(
            f"{name}: {file} could not be downloaded ({reason}): save {files} from "
            f"https://huggingface.co/{repository} in a folder, and give that: {flag}"
        ) from None
