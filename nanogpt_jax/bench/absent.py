"""Compile a run's step for TPUs that this machine does not have: train.py --compile_for v5e:4x4

The TPU's compiler runs on any machine with the tpu extra and says whether the training step fits
into the chips' memory. The chip's published rates give a lower bound on the time of a step (the
roofline): arithmetic at its peak, or weights, gradients and optimizer state through memory,
whichever is longer. Activations and communication between chips are not included.
"""

import math
import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nanogpt_jax.config import TrainConfig, with_vocab_size
from nanogpt_jax.errors import InputError, first_line
from nanogpt_jax.hardware import find_chip, forward_flops_per_token, n_params, needed_bytes

if TYPE_CHECKING:
    from nanogpt_jax.model import Compute

# Before JAX is imported: there is no TPU to ask, and other compilations may run at the same time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "JAX_PLATFORMS": "cpu",
}
CORPUS_TOKENS = 1_000_000  # of a character corpus, which is stored on the chips
ADAMW_BYTES = 8 * 4  # per parameter: read it, its gradient (twice: clipped) and moments, write 3


def compile_for(config: TrainConfig, topology: str) -> int:
    """Compile the step for a topology like "v5e:4x4", print what it needs, return the exit code."""
    tpus = topology_devices(topology)
    from nanogpt_jax import sharding
    from nanogpt_jax.bench.step import abstract_state, compile_step
    from nanogpt_jax.hardware import choose_compute, describe

    config = with_vocab_size(config)
    several_hosts = len({device.process_index for device in tpus}) > 1
    mesh = sharding.make_mesh(sharding.choose_sizes(config, len(tpus), several_hosts), tpus)
    compute, how = choose_compute(config.compute, config.model, tpus[0], mesh)
    print(f"{config.config} on {topology}: {describe(mesh)}: {how}")
    print(sharding.unsplit_note(mesh, abstract_state(config, mesh).params), end="")
    # With a vocabulary of its own, a model's corpus is in files, whose windows are sent.
    n_tokens = None if (config.model.vocab_size or 0) > 2**10 else CORPUS_TOKENS
    start_s = time.perf_counter()
    try:
        compiled = compile_step(config, compute, mesh, n_tokens)
    except Exception as error:  # the class differs between versions of JAX, the text does not
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"does not fit: {first_line(error)}")
        print("try --remat, a larger --loss_chunks, a smaller --batch_size, or --mesh fsdp=-1")
        return 1
    needed = needed_bytes(compiled)
    print(f"compiled in        {time.perf_counter() - start_s:10.1f} s")
    print(f"memory a device    {needed / 2**30:10.2f} GiB", end="")
    chip = find_chip(tpus[0].device_kind)
    if chip is None:
        print(f"\n{tpus[0].device_kind} is not in chips.py: without its rates there is no roofline")
        return 0
    fits = needed <= chip.memory_bytes
    print(f" of {chip.memory_bytes / 2**30:.0f} GiB: {'fits' if fits else 'does not fit'}")

    passes = 4 if compute.remat else 3  # forward, backward (counts twice), and forward again
    flops = passes * forward_flops_per_token(config.model) * config.tokens_per_iter / mesh.size
    flops_s = flops / chip.flops
    moved_bytes = least_bytes(config, compute, mesh.shape)
    moved_s = moved_bytes / chip.bandwidth
    least_s = max(flops_s, moved_s)
    print(f"FLOPs a step       {flops:10.3g} a device: {1e3 * flops_s:.1f} ms at its peak")
    print(f"bytes at least     {moved_bytes:10.3g} a device: {1e3 * moved_s:.1f} ms at its peak")
    print(
        f"roofline           {1e3 * least_s:10.1f} ms a step, "
        f"{config.tokens_per_iter / least_s:,.0f} tokens/s, without communication between chips"
    )
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed", math.nan)
    print(f"bytes accessed     {accessed:10.3g} as the compiler counts, see bench/absent.py")
    return 0 if fits else 1


def topology_devices(topology: str) -> list:
    """Return the devices of a topology, from the TPU's compiler."""
    # A v4 runs as one device per chip, but compiles as two.
    if not re.fullmatch(r"(?!v4)v\d+[a-z]?:\d+x\d+(x\d+)?", topology):
        raise InputError(
            f"compile_for must look like v5e:4x4 or v5p:2x2x1, for any TPU but v4, got {topology!r}"
        )
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    # A single chip, where the compiler expects hosts of four.
    options = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except RuntimeError as error:
        reason = first_line(error)
        raise InputError(
            "compile_for needs the TPU's compiler: pip install -e '.[tpu]' (no TPU needed)"
            if "not installed" in reason
            else f"compile_for must be a topology that exists, like v5e:4x4, got {topology!r} "
            f"({reason})"
        ) from None


def least_bytes(config: TrainConfig, compute: "Compute", mesh: Mapping[str, int]) -> float:
    """Return the bytes of weights, gradients and optimizer state that a step moves on a device.

    The compiler's own count, "bytes accessed", differs: it counts the body of a loop once
    (micro-batches, chunks of the loss) and includes what stays within the chip.
    """
    n_micro = config.gradient_accumulation_steps
    reads = 3 if compute.remat else 2  # forward, backward, and forward again
    tensor_part = n_params(config.model) / mesh["tensor"]
    weights = reads * compute.dtype.itemsize * tensor_part
    own = tensor_part / mesh["fsdp"]
    sums = 2 * 4 * own if n_micro > 1 else 0  # each micro-batch reads and writes them
    return n_micro * (weights + sums) + ADAMW_BYTES * own
