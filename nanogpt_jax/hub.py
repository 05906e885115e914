"""Files of the Hugging Face hub. No JAX."""

from pathlib import Path

from nanogpt_jax.errors import InputError


def gpt2_tokenizer() -> Path:
    """Return GPT-2's tokenizer.json, downloaded once.

    Raises:
        InputError: it lies in no cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("openai-community/gpt2", "tokenizer.json"))
    except Exception as error:  # its classes differ between versions
        raise InputError(
            f"GPT-2's tokenizer could not be downloaded ({str(error).splitlines()[0]}): save "
            "https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json and name it "
            "with --tokenizer"
        ) from None
