"""GPT-2: OpenAI's weights in, and a run's weights out. JAX is imported only to load or export."""

# ruff: noqa: F401 (what other packages import from here)
from nanogpt_jax.gpt2.config import is_gpt2, read_config
from nanogpt_jax.gpt2.convert import load_params
from nanogpt_jax.gpt2.hub import find_tokenizer
from nanogpt_jax.gpt2.weights import open_tensors
