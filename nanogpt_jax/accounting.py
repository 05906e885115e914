"""Parameters and FLOPs of a GPT, counted from its configuration alone. No JAX."""

from nanogpt_jax.config import ModelConfig


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each part; the head shares the token embedding's."""
    D, V, L = config.n_embd, config.vocab_size, config.n_layer
    bias = int(config.bias)
    return {
        "token embedding": V * D,
        "position embedding": config.block_size * D,
        "attention": L * (4 * D * D + bias * 4 * D),
        "mlp": L * (8 * D * D + bias * 5 * D),
        "layer norm": (2 * L + 1) * D * (1 + bias),
    }


def forward_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of all matrix products of one forward pass, for each of block_size tokens.

    A multiply-add counts 2. Scores are counted over the whole window, as they are computed, though
    half of them are masked; elementwise work is not counted. Source: Chowdhery et al., "PaLM",
    2022, appendix B.
    """
    D, T = config.n_embd, config.block_size
    dense = 2 * 12 * D * D  # q, k, v, projection: 4 D^2; the MLP: 8 D^2
    attention = 2 * 2 * T * D  # q k^T and weights v, over all heads
    return config.n_layer * (dense + attention) + 2 * D * config.vocab_size


def train_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a training step for each token: the backward pass does twice as much."""
    return 3 * forward_flops_per_token(config)
