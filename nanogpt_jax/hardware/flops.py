"""Count parameters, FLOPs and bytes of a model from its configuration alone. No JAX."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from nanogpt_jax.config import ModelConfig, TrainConfig, replace_fields
from nanogpt_jax.errors import InputError

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

    found = [Part("token embedding", V * D)]
    if config.positions == "learned":
        found += [Part("position embedding", T * D)]
    found += [
        dense("attention: q, k, v", D, 3 * D, has_bias=bias and is_gpt),  # the lecture has none
        Part("attention: scores", 0, L * 2 * T * D),
        Part("attention: weighted sums", 0, L * 2 * T * D),
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
    if config.embedding_shortcut:
        found += [Part("embedding shortcut", L)]
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


def optimizer_bytes(config: ModelConfig, optimizer: str = "adamw") -> int:
    """Return the size of the optimizer's moments: AdamW keeps two per parameter, Muon one."""
    n_moments = 2 * n_params(config)
    if optimizer == "muon":
        D = config.n_embd
        n_moments -= config.n_layer * D * (4 * D + config.mlp_in_features + config.hidden_size)
    return 4 * n_moments


def checkpoint_bytes(config: ModelConfig, optimizer: str = "adamw") -> int:
    """Return a checkpoint's size on disk: parameters and optimizer moments, in float32."""
    return 4 * n_params(config) + optimizer_bytes(config, optimizer)


def least_sampling_bytes(config: ModelConfig, n_rows: int = 0) -> int:
    """Return the bytes sampling needs: weights, and a 16-bit key-value cache for each row."""
    return 4 * (n_params(config) + n_rows * config.n_layer * config.block_size * config.n_embd)


def check_memory(
    config: ModelConfig, needed: int, device_bytes: int | None, n_devices: int, advice: str
) -> None:
    """Raise InputError if n_devices together cannot hold a model; memory of None is unknown."""
    if device_bytes is not None and needed > n_devices * device_bytes:
        raise InputError(
            f"a model of {n_params(config):,} parameters needs at least {needed / 2**30:,.1f} GiB "
            f"here, but memory is {n_devices} x {device_bytes / 2**30:,.1f} GiB: use {advice}"
        )


def is_float32(config: TrainConfig) -> bool:
    """Return whether a run multiplies in float32 on any chip; with dtype auto the chip decides."""
    return config.compute.dtype == "float32" or config.model.architecture != "gpt"


def estimate_memory(config: TrainConfig) -> dict[str, int]:
    """Estimate the bytes that a training step needs on one device, by kind.

    Activations are what the backward pass of a GPT reads again: outputs of products, normalized
    streams, and attention weights unless a fused kernel is used. The compiler may do better.
    Source: Korthikanti et al., "Reducing activation recomputation in large transformer models",
    2022.
    """
    model, compute = config.model, config.compute
    D, T, V, L = model.n_embd, model.block_size, model.vocab_size, model.n_layer
    assert V is not None
    width = 4 if is_float32(config) else 2
    has_dropout = model.dropout > 0
    is_fused = compute.attention != "xla" and not has_dropout and width == 2
    stream = D * width
    mlp = (model.mlp_in_features + model.hidden_size) * width
    scores = 0 if is_fused else model.n_head * T * (4 + width + has_dropout)
    masks = 2 * D * has_dropout  # a byte per element
    streams = 7 + 2 * model.token_shift  # two norms, q k v, attention, the stream
    block = streams * stream + mlp + scores + masks
    layers = L * stream + (block if compute.remat else L * block)
    logits = 2 * 4 * V // (compute.loss_chunks or 1)  # and their gradient
    weights = 4 * n_params(model)
    return {
        "weights": weights,
        "gradients": weights * min(2, config.gradient_accumulation_steps),  # and their sum
        "optimizer": optimizer_bytes(model, config.optim.optimizer),
        "activations": config.batch_size * T * (layers + logits + stream),
    }


def fewest_loss_chunks(config: TrainConfig, memory: float, mesh: Mapping[str, int]) -> int:
    """Return the fewest pieces of the loss, up to 8, with which a step fits by estimate.

    A tenth of the memory is left to what the estimate does not know.
    """
    counts = [n for n in (1, 2, 4, 8) if config.model.block_size % n == 0]
    if config.eval_only:  # keeps no activations
        config = replace_fields(config, {"remat": True})
    for n in counts:
        needed = estimate_memory(replace_fields(config, {"loss_chunks": n}))
        if config.eval_only:
            needed |= {"gradients": 0, "optimizer": 0}
        activations = needed.pop("activations") / (mesh["data"] * mesh["fsdp"])
        state = sum(needed.values()) / (mesh["fsdp"] * mesh["tensor"])
        if state + activations <= 0.9 * memory:
            return n
    return counts[-1]


def steps_per_call(config: TrainConfig, start_step: int = 0) -> int:
    """Return how many updates a call of the compiled step makes: 1, or up to 20 of a small model.

    Evaluations, the end and a resumed start fall between two calls.
    """
    if config.tokens_per_iter * train_flops_per_token(config.model) > SMALL_STEP_FLOPS:
        return 1
    return math.gcd(20, config.eval_interval, config.max_iters, start_step)


def needed_bytes(compiled) -> int:
    """Return the bytes that a `jax.stages.Compiled` needs on each device, arguments included."""
    sizes = compiled.memory_analysis()
    at_once = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes  # donated: the output reuses the input's memory
    )
    return max(at_once, sizes.peak_memory_in_bytes)  # a TPU reports its peak, a CPU does not
