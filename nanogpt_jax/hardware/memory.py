"""The memory of a device, and what a model asks of it. JAX is imported when a device is asked."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from nanogpt_jax.config import ModelConfig, TrainConfig, replace_fields
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware.flops import is_float32, n_params

CGROUPS, CGROUP_FILES = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_bytes(device) -> int | None:
    """Return the memory that programs can use on a device; None if unknown."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_memory_limits())


def _memory_limits() -> Iterator[int]:
    """Yield what this process's memory is limited to, in bytes: as by `ulimit -v` or a container.

    To Linux a container, of Docker or Slurm, is a control group within others, of version 2 or 1.
    """
    import resource  # not on Windows

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    yield sys.maxsize if limit == resource.RLIM_INFINITY else limit
    for line in CGROUPS.read_text().splitlines() if CGROUPS.exists() else ():
        group = line.split(":", 2)[2].strip("/")
        for top, name in ("", "memory.max"), ("memory", "memory.limit_in_bytes"):
            for level in (Path(group), *Path(group).parents):
                with contextlib.suppress(OSError, ValueError):  # not visible here; "max"
                    yield int((CGROUP_FILES / top / level / name).read_text())


def optimizer_bytes(config: ModelConfig, optimizer: str) -> int:
    """Return the size of the optimizer's moments: AdamW keeps two per parameter, Muon one."""
    n_moments = 2 * n_params(config)
    if optimizer == "muon":
        D = config.n_embd
        n_moments -= config.n_layer * D * (4 * D + config.mlp_in_features + config.hidden_size)
    return 4 * n_moments


def check_memory(
    config: ModelConfig, needed: int, device_bytes: int | None, n_devices: int, advice: str
) -> None:
    """Raise InputError if n_devices together cannot hold a model; memory of None is unknown."""
    if device_bytes is not None and needed > n_devices * device_bytes:
        raise InputError(
            f"a model of {n_params(config):,} parameters needs at least {needed / 2**30:,.1f} GiB "
            f"here, but memory is {n_devices} x {device_bytes / 2**30:,.1f} GiB: use {advice}"
        )


def check_sampling_memory(config: ModelConfig, n_rows: int, advice: str) -> None:
    """Raise InputError if the first device cannot hold a model and a 16-bit cache of n_rows."""
    import jax

    needed = 4 * (n_params(config) + n_rows * config.n_layer * config.block_size * config.n_embd)
    check_memory(config, needed, memory_bytes(jax.local_devices()[0]), 1, advice)


def estimate_memory(config: TrainConfig) -> dict[str, int]:
    """Estimate the bytes, by kind, that a step (with eval_only, an evaluation) needs on a device.

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
    scores = 0 if is_fused else round(model.n_head * model.n_keys) * (4 + width + has_dropout)
    masks = 2 * D * has_dropout  # a byte per element
    streams = 7 + 2 * model.token_shift  # two norms, q k v, attention, the stream
    block = streams * stream + mlp + scores + masks
    layers = L * stream + (block if compute.remat or config.eval_only else L * block)
    logits = 2 * 4 * V // (compute.loss_chunks or 1)  # and their gradient
    weights, trains = 4 * n_params(model), not config.eval_only
    return {
        "weights": weights,
        "gradients": trains * weights * min(2, config.gradient_accumulation_steps),  # and their sum
        "optimizer": trains * optimizer_bytes(model, config.optim.optimizer),
        "activations": config.batch_size * T * (layers + logits + stream),
    }


def fewest_loss_chunks(config: TrainConfig, memory: float, mesh: Mapping[str, int]) -> int:
    """Return the fewest pieces of the loss, up to 8, with which a step fits by estimate.

    A tenth of the memory is left to what the estimate does not know.
    """
    counts = [n for n in (1, 2, 4, 8) if config.model.block_size % n == 0]
    for n in counts:
        needed = estimate_memory(replace_fields(config, {"loss_chunks": n}))
        activations = needed.pop("activations") / (mesh["data"] * mesh["fsdp"])
        state = sum(needed.values()) / (mesh["fsdp"] * mesh["tensor"])
        if state + activations <= 0.9 * memory:
            return n
    return counts[-1]


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
