"""GPT-2: OpenAI's weights in, and a run's weights out. JAX is imported only to load or export."""

from nanogpt_jax.gpt2.config import (
    adopt_shape,
    check_tokenizer,
    is_gpt2,
    read_config,
    tokenizer_of,
)
from nanogpt_jax.gpt2.convert import export, load_params
from nanogpt_jax.gpt2.weights import open_tensors

__all__ = [
    "adopt_shape",
    "check_tokenizer",
    "export",
    "is_gpt2",
    "load_params",
    "open_tensors",
    "read_config",
    "tokenizer_of",
]
