"""Compile a run's programs for chips that this machine does not have: --compile_for h100 or v5e:4x4

The compiler of a GPU or a TPU runs on any machine with its extra and says whether the training step
fits into the chips' memory. The chip's published rates give a lower bound on the time of a step
(the roofline): arithmetic at its peak, or weights, gradients and optimizer state through memory,
whichever is longer. Activations and communication between chips are not included. A GPU's program
can be read: the types of its products, and what would make it wait for the host.
"""

import math
import os
import re
import time
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np

from nanogpt_jax.bench import program
from nanogpt_jax.config import TrainConfig, with_vocab_size
from nanogpt_jax.errors import InputError, first_line
from nanogpt_jax.hardware import Chip, find_chip, forward_flops_per_token, n_params, needed_bytes

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from nanogpt_jax.model import Compute

# Before JAX is imported: there is no chip to ask, and other compilations may run at the same time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # of XLA, which warns that there is no driver
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # else jax 0.7 gives up without a driver
    "JAX_PLATFORMS": "cpu",
}
# Without a GPU jax 0.7 cannot choose among the kernels for a Hopper chip.
UNTUNED = "--xla_gpu_autotune_level=0"
GPU_SHARE = 0.75  # of a GPU's memory that JAX takes
CORPUS_TOKENS = 1_000_000  # of a character corpus, which is stored on the chips
ADAMW_BYTES = 8 * 4  # per parameter: read it, its gradient (twice: clipped) and moments, write 3


def compile_for(config: TrainConfig, target: str) -> int:
    """Compile a run's programs for "h100" or "v5e:4x4", print what they need and do.

    Returns the exit code: 1 if the training step does not fit.
    """
    devices = absent_devices(target)
    from nanogpt_jax import sharding
    from nanogpt_jax.bench.step import abstract_state, compile_step
    from nanogpt_jax.hardware import choose_training, describe, memory_levers

    config = with_vocab_size(config)
    several_hosts = len({device.process_index for device in devices}) > 1
    mesh = sharding.make_mesh(sharding.choose_sizes(config, len(devices), several_hosts), devices)
    chip = find_chip(devices[0].device_kind)
    memory = chip and chip.memory_bytes * (GPU_SHARE if chip.gpu else 1)
    compute, how = choose_training(config, devices[0], mesh, memory)
    print(f"{config.config} on {target}: {describe(mesh)}: {how}")
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
        print(memory_levers(config, compute))
        return 1
    needed = needed_bytes(compiled)
    print(f"compiled in        {time.perf_counter() - start_s:10.1f} s")
    print(f"memory a device    {needed / 2**30:10.2f} GiB", end="")
    if chip is None or memory is None:
        print(f"\n{devices[0].device_kind} is not in chips.py: without its rates, no roofline")
        return 0
    print(f" of {memory / 2**30:.0f} GiB: {'fits' if needed <= memory else 'does not fit'}")
    if needed > memory:
        print(memory_levers(config, compute))
    print_roofline(config, compute, mesh, chip)
    if chip.gpu:
        print_program(compiled, "no matrix products")
        if config.model.architecture == "gpt":  # the lecture's models have no cache
            start_s = time.perf_counter()
            decode = compile_decode(config, compute, mesh)
            print(f"sampling, compiled in {time.perf_counter() - start_s:7.1f} s")
            print_program(decode, "none: with one row, all are sums")
    else:
        accessed = (compiled.cost_analysis() or {}).get("bytes accessed", math.nan)
        print(f"bytes accessed     {accessed:10.3g} as the compiler counts, see bench/absent.py")
    return 0 if needed <= memory else 1


def print_roofline(config: TrainConfig, compute: "Compute", mesh: "Mesh", chip: Chip) -> None:
    passes = 4 if compute.remat else 3  # forward, backward (counts twice), and forward again
    flops = passes * forward_flops_per_token(config.model) * config.tokens_per_iter / mesh.size
    flops_s = flops / chip.flops
    moved_bytes = least_bytes(config, compute, mesh.shape)
    moved_s = moved_bytes / chip.bandwidth
    least_s = max(flops_s, moved_s)
    print(f"FLOPs a step       {flops:10.3g} a device: {1e3 * flops_s:.3g} ms at its peak")
    print(f"bytes at least     {moved_bytes:10.3g} a device: {1e3 * moved_s:.3g} ms at its peak")
    print(
        f"roofline           {1e3 * least_s:10.3g} ms a step, "
        f"{config.tokens_per_iter / least_s:,.0f} tokens/s, without communication between chips"
    )


def print_program(compiled: "jax.stages.Compiled", without_products: str) -> None:
    """Print what a GPU's program multiplies, and where it waits."""
    if not (text := compiled.as_text()):
        print("its program cannot be read with this version of JAX; 0.10 shows it")
        return
    for i, line in enumerate(program.product_lines(text) or [without_products]):
        print(f"{'' if i else 'matrix products':18} {line}")
    forward, backward = program.fused_attention_calls(text)
    print(f"fused attention    {forward} calls forward, {backward} backward")
    print(f"waits for the host {', '.join(program.waits(text)) or 'none'}")


def compile_decode(config: TrainConfig, compute: "Compute", mesh: "Mesh") -> "jax.stages.Compiled":
    """Compile what sample.py runs for each token of one stream."""
    import jax

    from nanogpt_jax import decoding, sharding, steps
    from nanogpt_jax.model import Compute

    model = steps.make_model(config.model, Compute(compute.dtype))
    one = sharding.make_mesh(devices=mesh.devices.flat[:1])

    def abstract(make):
        return sharding.place(jax.eval_shape(make), one)

    params = abstract(lambda: steps.init_params(model, jax.random.key(0)))
    params = jax.eval_shape(partial(decoding.cast, dtype=compute.dtype), params)
    cache = abstract(lambda: decoding.init_cache(config.model, 1, compute.dtype))
    keys_B = jax.eval_shape(lambda: decoding.row_keys(0, range(1)))
    tokens_B, n_generated = jax.ShapeDtypeStruct((1,), "int32"), jax.ShapeDtypeStruct((), "int32")
    sampling = decoding.Sampling(temperature=0.8, top_k=200)
    decode = partial(decoding.decode, model, n_tokens=decoding.AT_ONCE, sampling=sampling)
    jitted = jax.jit(decode, donate_argnums=1, out_shardings=sharding.replicated(one))
    return jitted.lower(params, cache, tokens_B, keys_B, n_generated).compile()


def absent_devices(target: str) -> list:
    """Return the devices of "h100", "8xa100" or "v5e:4x4", from their compiler.

    Raises InputError if there is no such chip, or its compiler is not installed.
    """
    os.environ.update(ENVIRONMENT)
    # A v4 runs as one device per chip, but compiles as two.
    if re.fullmatch(r"(?!v4)v\d+[a-z]?:\d+x\d+(x\d+)?", target):
        return _tpus(target)
    count, _, name = target.partition("x") if re.match(r"\d+x", target) else ("1", "", target)
    chip = find_chip(name)
    if chip is None or chip.gpu is None or int(count) < 1:
        raise InputError(
            "compile_for must be an NVIDIA GPU of hardware/chips.py, like h100 or 8xa100, or a TPU "
            f"topology, like v5e:4x4 or v5p:2x2x1 (any TPU but v4), got {target!r}"
        )
    return _gpus(chip, int(count))


def _gpus(chip: Chip, count: int) -> list:
    gpu = chip.gpu
    assert gpu is not None
    capability, shared = float(gpu.capability), gpu.shared_kib * 2**10
    versions = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    usable = (12,) if capability < 7.5 else (13, 12)  # CUDA 13 no longer compiles for old ones
    cuda = next((n for n in usable if f"jax-cuda{n}-plugin" in versions), None)
    if cuda is None:
        raise InputError(
            "compile_for needs NVIDIA's compiler: "
            f"pip install -e '.[cuda{usable[0]}]' (no GPU needed)"
        )
    dnn = versions.get(f"nvidia-cudnn-cu{cuda}", "9.10").split(".")
    if versions["jax"].startswith("0.7.") and capability >= 9:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNTUNED}"
    from jax.experimental import topologies

    major, minor = gpu.capability.split(".")
    threads = {7.5: 1024, 8.6: 1536, 8.9: 1536, 12.0: 1536}.get(capability, 2048)
    optin = 48 * 2**10 if capability < 7 else shared if capability < 8 else shared - 2**10
    # XLA's GpuTargetConfigProto, as text.
    config = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          threads_per_block_limit: 1024 threads_per_warp: 32
          threads_per_core_limit: {threads}
          core_count: {gpu.multiprocessors} fpus_per_core: {64 if capability <= 8 else 128}
          shared_memory_per_block: {48 * 2**10} shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {optin}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {chip.bandwidth:.0f} device_memory_size: {chip.memory_bytes:.0f}
          l2_cache_size: {gpu.l2_mib * 2**20} clock_rate_ghz: {gpu.ghz}
        }}
        platform_name: "CUDA" device_description_str: "{chip.name}"
        dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} }}
        runtime_version {{ major: {cuda} minor: {0 if cuda == 13 else 8} patch: 0 }}
    """
    options = {"target_config": config, "topology": f"1x1x{count}"}  # slices, hosts, devices
    return list(topologies.get_topology_desc("", "cuda", **options).devices)


def _tpus(topology: str) -> list:
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
    weights = reads * np.dtype(compute.dtype).itemsize * tensor_part
    own = tensor_part / mesh["fsdp"]
    sums = 2 * 4 * own if n_micro > 1 else 0  # each micro-batch reads and writes them
    return n_micro * (weights + sums) + ADAMW_BYTES * own
