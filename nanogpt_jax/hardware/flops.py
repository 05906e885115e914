"""Count parameters and FLOPs of a model from its configuration alone. No JAX."""

import math
from typing import NamedTuple

from nanogpt_jax.config import ModelConfig, TrainConfig

SMALL_STEP_FLOPS = 2e10  # a tenth of a second of two CPU cores


class Part(NamedTuple):
    """One kind of parameters or product in a model, summed over its layers."""

    name: str
    n_params: int = 0
    forward_flops: int = 0  # per token; a multiply-add counts as 2


def parts(config: ModelConfig) -> list[Part]:
    """Return the parts of a model in the order of its forward pass; vocab_size must be set.

    FLOPs are those of the model's matrix products. Elementwise work is not counted, nor are Muon's
    own products (5 % more in `shakespeare-fast`). Attention scores are counted over the whole
    window, as they are computed, although half of them are masked. Source: Chowdhery et al.,
    "PaLM", 2022, appendix B.
    """
    name, D, T, V = config.architecture, config.n_embd, config.block_size, config.vocab_size
    assert V is not None
    if name == "bigram":
        return [Part("token embedding", V * V)]  # the table is the logits
    L, F, bias, is_gpt = config.n_layer, config.hidden_size, config.bias, name == "gpt"

    def dense(part: str, n_in: int, n_out: int, has_bias: bool = bias, times: int = L) -> Part:
        params = n_in * n_out + has_bias * n_out
        return Part(part, times * params, times * 2 * n_in * n_out)

    products = round(L * 2 * config.n_keys * D)
    found = [Part("token embedding", V * D)]
    if config.positions == "learned":
        found += [Part("position embedding", T * D)]
    found += [
        dense("attention: q, k, v", D, 3 * D, has_bias=bias and is_gpt),  # the lecture has none
        Part("attention: scores", 0, products),
        Part("attention: weighted sums", 0, products),
    ]
    if name in ("gpt", "residual", "layernorm"):
        found += [
            dense("attention: projection", D, D),
            dense("mlp: up", D, config.mlp_in_features),
            dense("mlp: down", F, D),
        ]
    elif name in ("feedforward", "deep"):
        found += [dense("mlp", D, D)]
    if name in ("gpt", "layernorm") and config.norm == "layernorm":
        found += [Part("layer norm", (2 * L + 1) * D * (1 + bias))]
    if config.token_shift:
        found += [Part("token shift", 2 * L * D)]
    head = dense("head", D, V, has_bias=bias and not is_gpt, times=1)
    is_tied = is_gpt and config.tied_head  # then its weights are the token embedding's
    return [*found, head._replace(n_params=0) if is_tied else head]


def n_params(config: ModelConfig) -> int:
    """Return the number of parameters, position embedding included."""
    return sum(part.n_params for part in parts(config))


def headline_params(config: ModelConfig) -> int:
    """Return the size a model is known by: like nanoGPT, without a GPT's position embedding."""
    is_learned = config.architecture == "gpt" and config.positions == "learned"
    return n_params(config) - is_learned * config.block_size * config.n_embd


def size_in_words(config: ModelConfig) -> str:
    """Return the headline size in words: "0.80M parameters", "4,225 parameters"."""
    n = headline_params(config)
    return f"{n / 1e6:.2f}M parameters" if n >= 1e5 else f"{n:,} parameters"


def forward_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a forward pass over block_size tokens, per token."""
    return sum(part.forward_flops for part in parts(config))


def train_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of training per token: the backward pass takes twice the forward pass."""
    return 3 * forward_flops_per_token(config)


def is_float32(config: TrainConfig) -> bool:
    """Return whether a run multiplies in float32 on any chip; with dtype auto the chip decides."""
    return config.compute.dtype == "float32" or config.model.architecture != "gpt"


def steps_per_call(config: TrainConfig, start_step: int = 0) -> int:
    """Return how many updates a call of the compiled step makes: 1, or up to 20 of a small model.

    Evaluations, the end and a resumed start fall between two calls.
    """
    if config.tokens_per_iter * train_flops_per_token(config.model) > SMALL_STEP_FLOPS:
        return 1
    return math.gcd(20, config.eval_interval, config.max_iters, start_step)
