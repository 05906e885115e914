"""Parameters, FLOPs and bytes of a model, counted from its configuration alone. No JAX."""

from dataclasses import dataclass

from nanogpt_jax.config import ComputeConfig, ModelConfig, hidden_size, mlp_in_features
from nanogpt_jax.errors import InputError


@dataclass(frozen=True)
class Part:
    """A part of a model, all its layers together: a matrix product as a rule."""

    name: str
    n_params: int = 0
    forward_flops: int = 0  # of one token; a multiply-add counts 2


def parts(config: ModelConfig) -> tuple[Part, ...]:
    """Return the parts of a model in the order of its forward pass; vocab_size must be known.

    FLOPs are those of the model's matrix products, one by one; neither elementwise work is counted
    nor Muon's own products, a twentieth more in `shakespeare-fast`. Scores are
    counted over the whole window, as they are computed, though half of them are masked. Source:
    Chowdhery et al., "PaLM", 2022, appendix B.
    """
    rung, D, T, V = config.architecture, config.n_embd, config.block_size, config.vocab_size
    if rung == "bigram":
        return (Part("token embedding", V * V),)  # the table is the logits
    L, bias = config.n_layer, config.bias

    def dense(name: str, n_in: int, n_out: int, has_bias: bool = bias, times: int = L) -> Part:
        params = n_in * n_out + has_bias * n_out
        return Part(name, times * params, times * 2 * n_in * n_out)

    is_gpt, F = rung == "gpt", hidden_size(config)
    found = [Part("token embedding", V * D)]
    found += [Part("position embedding", T * D)] if config.positions == "learned" else []
    found += [
        dense("attention: q, k, v", D, 3 * D, has_bias=bias and is_gpt),  # not the lecture's
        Part("attention: scores", 0, L * 2 * T * D),
        Part("attention: weighted sums", 0, L * 2 * T * D),
    ]
    if rung in ("gpt", "residual", "layernorm"):
        found += [
            dense("attention: projection", D, D),
            dense("mlp: up", D, mlp_in_features(config)),
            dense("mlp: down", F, D),
        ]
    elif rung in ("feedforward", "deep"):
        found += [dense("mlp", D, D)]
    if rung in ("gpt", "layernorm") and config.norm == "layernorm":
        found += [Part("layer norm", (2 * L + 1) * D * (1 + bias))]
    if is_gpt and config.tied_head:  # its weights are the token embedding's
        return (*found, Part("head", 0, 2 * D * V))
    return (*found, dense("head", D, V, has_bias=bias and not is_gpt, times=1))


def n_params(config: ModelConfig) -> int:
    """Return the number of all parameters."""
    return sum(part.n_params for part in parts(config))


def n_params_as_told(config: ModelConfig) -> int:
    """Return the number that a model is known by: nanoGPT's is without the position embedding."""
    is_learned = config.architecture == "gpt" and config.positions == "learned"
    return n_params(config) - is_learned * config.block_size * config.n_embd


def size_in_words(config: ModelConfig) -> str:
    """Return that number as it is written: "0.80M parameters", "4,225 parameters"."""
    n = n_params_as_told(config)
    return f"{n / 1e6:.2f}M parameters" if n >= 1e5 else f"{n:,} parameters"


def optimizer_bytes(config: ModelConfig, optimizer: str = "adamw") -> int:
    """Return what the optimizer keeps: AdamW two means of each parameter, Muon one of its own."""
    n_means = 2 * n_params(config)
    if optimizer == "muon":
        D = config.n_embd
        n_means -= config.n_layer * D * (4 * D + mlp_in_features(config) + hidden_size(config))
    return 4 * n_means


def checkpoint_bytes(config: ModelConfig, optimizer: str = "adamw") -> int:
    """Return what a checkpoint takes on the disk: parameters and optimizer, in float32."""
    return 4 * n_params(config) + optimizer_bytes(config, optimizer)


def forward_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of one forward pass, for each of block_size tokens."""
    return sum(part.forward_flops for part in parts(config))


def train_flops_per_token(config: ModelConfig) -> int:
    """Return the FLOPs of a training step for each token: the backward pass does twice as much."""
    return 3 * forward_flops_per_token(config)


def is_float32(config: ModelConfig, compute: ComputeConfig) -> bool:
    """Return whether a run surely multiplies in float32; with dtype auto the chip decides."""
    return compute.dtype == "float32" or config.architecture != "gpt"


def least_training_bytes(config: ModelConfig, optimizer: str = "adamw") -> int:
    """Return what training needs whatever the batch: weights, gradients and the optimizer's."""
    return 8 * n_params(config) + optimizer_bytes(config, optimizer)


def least_sampling_bytes(config: ModelConfig, n_rows: int = 0) -> int:
    """Return what writing needs: weights, and of each row keys and values of 16 bits."""
    return 4 * (n_params(config) + n_rows * config.n_layer * config.block_size * config.n_embd)


def check_memory(
    config: ModelConfig, needed: int, device_bytes: int | None, n_devices: int, advice: str
) -> None:
    """Refuse what some devices surely cannot hold, before anything is built.

    Args:
        device_bytes: the memory of a device; None: nothing tells.
        n_devices: those that share it out among them.
        advice: what could be changed.

    Raises:
        InputError: they cannot.
    """
    if device_bytes is not None and needed > n_devices * device_bytes:
        raise InputError(
            f"a model of {n_params(config):,} parameters must have at least "
            f"{needed / 2**30:,.1f} GiB here, but memory is {n_devices} x "
            f"{device_bytes / 2**30:,.1f} GiB: take {advice}"
        )


def memory_bytes(
    config: ModelConfig, compute: ComputeConfig, batch_size: int, optimizer: str = "adamw"
) -> dict[str, int]:
    """Return about what a training step needs on one device, by kind.

    Activations are what the backward pass reads again: outputs of products, normalised streams,
    weights of attention where no fused kernel serves. What a compiler joins or makes anew is not
    foreseen; `train.py` prints what the compiled step needs. Arrays are those of model.py, of the
    lecture's rungs it is a guess. Source of the way to count: Korthikanti et al., "Reducing
    activation recomputation in large transformer models", 2022.

    Args:
        batch_size: sequences of a micro-batch on the device.
    """
    D, T, V, L = config.n_embd, config.block_size, config.vocab_size, config.n_layer
    width = 4 if is_float32(config, compute) else 2
    drops = config.dropout > 0
    is_fused = compute.attention != "xla" and not drops and width == 2
    inputs = D * width  # x before a block
    mlp = mlp_in_features(config) + hidden_size(config)
    dense = (2 * D + 3 * D + D + D + mlp) * width  # norms, q k v, attention, stream, MLP
    scores = 0 if is_fused else config.n_head * T * (4 + width + drops)
    of_block = dense + scores + 2 * D * drops  # a mask takes a byte an element
    of_layers = L * inputs + (of_block if compute.remat else L * of_block)
    logits = 2 * 4 * V // compute.loss_chunks  # and their gradient
    n = n_params(config)
    return {
        "weights": 4 * n,
        "gradients": 4 * n,
        "optimizer": optimizer_bytes(config, optimizer),
        "activations": batch_size * T * (of_layers + logits + D * width),
    }


def needed_bytes(compiled) -> int:
    """Return the bytes that a compiled function needs on each device, its arguments included.

    Args:
        compiled: a `jax.stages.Compiled`.
    """
    sizes = compiled.memory_analysis()
    at_once = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes  # donated: the output replaces the input
    )
    return max(at_once, sizes.peak_memory_in_bytes)  # a CPU does not know its peak, a TPU does
