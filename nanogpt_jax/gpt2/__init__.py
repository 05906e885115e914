"""GPT-2: OpenAI's weights in, and a run's weights out. JAX is imported only to load or export."""

# ruff: noqa: F401 (what other packages import from here)
from nanogpt_jax.gpt2.config import (
    adopt_shape,
    check_tokenizer,
    check_weights,
    is_gpt2,
    read_config,
    read_tokenizer,
    tokenizer_of,
)
from nanogpt_jax.gpt2.convert import load_params
