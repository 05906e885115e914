"""Compile a run's step for TPUs that are not there: python train.py --compile_for v5e:4x4

The TPU's compiler runs on any machine: it tells whether the very training step fits into the
chips' memory. From the chip's published rates follows the least time that a step can take (the
roofline): what the arithmetic takes at its best, or the moving of weights and gradients, whichever
is longer. Activations and the exchange between chips are not in it. Needs the tpu extra, no TPU.

What was compared so (jax 0.10.2; CPU seconds to compile, memory a device, and the compiler's own
estimate of a step at 1.5 GHz, exchange between chips and splash kernels not in it; no TPU was at
hand to time anything):

    gpt2, v5e:4x4, --batch_size 160 --gradient_accumulation_steps 3 --loss_chunks 1
        splash attention                     8.4 GiB   249 ms   taken
        XLA attention                       13.1 GiB   496 ms
    the same with 4 layers
        as it is                      67 s   5.2 GiB   137 ms
        heads of 128 in place of 64   70 s   5.0 GiB   133 ms   GPT-2's are of 64
        --loss_chunks 8               87 s   2.9 GiB   183 ms   the presets': larger batches fit
        the same, chunks unrolled     90 s   3.2 GiB   176 ms
        --remat                       88 s   4.1 GiB   173 ms
    gpt2-xl, v5e:16x16, --mesh data=4,fsdp=64 --batch_size 512 ... --remat
        layers as a Python loop      247 s   3.6 GiB   206 ms   taken: kept once in the cache
        one lax.scan over them        82 s   1.4 GiB   250 ms
    shakespeare, v5e:2x2
        masks where they are used    125 s   0.4 GiB   10.1 ms
        masks made once               56 s   0.5 GiB    6.4 ms  taken: `drop` in attention.py
        rbg in place of threefry      54 s   0.6 GiB    6.8 ms
"""

import math
import os
import re
import time

# Before JAX is loaded: there is no TPU to ask, and other compilations may run beside this one.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_LOG_DIR="disabled",
    JAX_PLATFORMS="cpu",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from nanogpt_jax import data
from nanogpt_jax import mesh as meshes
from nanogpt_jax.config import TrainConfig, with_vocab_size
from nanogpt_jax.errors import InputError, first_line
from nanogpt_jax.hardware import chips, devices
from nanogpt_jax.hardware import flops as counts
from nanogpt_jax.programs import Programs, make_programs, needed_bytes
from nanogpt_jax.sharding import whole_note

CORPUS_TOKENS = 1_000_000  # of a character corpus, which lies on the chip; a larger one does not
ADAMW_BYTES = 8 * 4  # a parameter: read it, its gradient (clipped: twice) and averages, write three


def compile_for(config: TrainConfig, topology: str) -> int:
    """Compile the step for a topology like "v5e:4x4", print what it needs, return the exit code.

    Raises:
        InputError: there is no such topology, or no TPU compiler.
    """
    config = with_vocab_size(config)
    tpus = topology_devices(topology)
    several_hosts = len({device.process_index for device in tpus}) > 1
    mesh = meshes.make_mesh(meshes.choose_sizes(config, len(tpus), several_hosts), tpus)
    compute, how = devices.choose(config.compute, config.model, tpus[0], mesh)
    print(f"{config.config} on {topology}: {devices.describe(mesh)}: {how}")
    begun_s = time.perf_counter()
    try:
        programs = make_programs(config, compute, mesh)
        print(whole_note(mesh, programs.abstract_state.params), end="")
        compiled = lower_step(config, programs, mesh).compile()
    except Exception as error:  # the class differs between versions of JAX, the text does not
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = first_line(error)
        print(f"does not fit: {reason}")
        print("less: --remat, a larger --loss_chunks, a smaller --batch_size, --mesh fsdp=-1")
        return 1
    compile_s = time.perf_counter() - begun_s
    chip = chips.find(tpus[0].device_kind)
    # A device can be a part of a chip: a core.
    share = math.prod(map(int, re.findall(r"\d+", topology.partition(":")[2]))) / len(tpus)
    needed = needed_bytes(compiled)
    passes = 4 if compute.remat else 3  # forward, backward (as two), and forward again
    flops = passes * counts.forward_flops_per_token(config.model) * config.tokens_per_iter
    flops /= mesh.size
    moved_bytes = least_bytes(config, compute, mesh)
    counted_bytes = compiled.cost_analysis()["bytes accessed"]
    print(f"compiled in        {compile_s:10.1f} s")
    print(f"memory a device    {needed / 2**30:10.2f} GiB", end="")
    if chip is None:
        print(f"\n{tpus[0].device_kind} is not in chips.py: no rates, so no roofline")
        return 0
    memory_bytes = chip.memory_bytes * share
    arithmetic_s = flops / (chip.flops * share)
    movement_s = moved_bytes / (chip.bandwidth * share)
    roofline_s = max(arithmetic_s, movement_s)
    fits = needed <= memory_bytes
    print(f" of {memory_bytes / 2**30:.0f} GiB: {'fits' if fits else 'does not fit'}")
    print(f"FLOPs a step       {flops:10.3g} a device: {1e3 * arithmetic_s:.1f} ms at its peak")
    print(f"bytes at least     {moved_bytes:10.3g} a device: {1e3 * movement_s:.1f} ms at its peak")
    print(f"bytes accessed     {counted_bytes:10.3g} by the compiler's count, see tpu.py")
    print(
        f"roofline           {1e3 * roofline_s:10.1f} ms a step, "
        f"{config.tokens_per_iter / roofline_s:,.0f} tokens/s, before any exchange between chips"
    )
    return 0 if fits else 1


def least_bytes(config: TrainConfig, compute: devices.Compute, mesh) -> float:
    """Return the bytes that a step must move on a device: weights, gradients and optimizer.

    Activations are not in it. The compiler's own count, "bytes accessed", is of another kind: it
    counts what is in a loop once, the micro-batches and the pieces of the loss, and takes what
    stays within the chip for traffic. It serves to compare variants of one program.
    """
    n_params = counts.n_params(config.model)
    n_micro = config.gradient_accumulation_steps
    reads = 3 if compute.remat else 2  # forward, backward, and forward again
    weights = reads * compute.dtype.itemsize * n_params / mesh.shape["tensor"]
    own = n_params / mesh.shape["tensor"] / mesh.shape["fsdp"]
    sums = 2 * 4 * own if n_micro > 1 else 0  # read and written by each micro-batch
    return n_micro * (weights + sums) + ADAMW_BYTES * own


def topology_devices(topology: str) -> list:
    """Return the devices of a topology.

    Raises:
        InputError: there is no such topology, or no TPU compiler.
    """
    if not re.fullmatch(r"v\d+[a-z]?:\d+x\d+(x\d+)?", topology):
        raise InputError(f"compile_for must look like v5e:4x4 or v5p:2x2x1, got {topology!r}")
    if topology.startswith("v4:"):  # run, a v4 chip is one device; compiled for like this, two
        raise InputError("compile_for: v4 cannot be compiled for, but v2, v3, v5e, v5p and v6e")
    options = {}
    if topology.endswith(":1x1"):  # one chip, where the compiler expects hosts of four
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        )
    except RuntimeError as error:
        reason = first_line(error)
        if "not installed" in reason:
            raise InputError(
                "compile_for needs the TPU's compiler: pip install -e '.[tpu]' (no TPU needed)"
            ) from None
        raise InputError(f"compile_for: the compiler knows no {topology!r} ({reason})") from None


def lower_step(config: TrainConfig, programs: Programs, mesh) -> jax.stages.Lowered:
    """Return train.py's step, lowered for a mesh, of which no array is needed."""
    # A model whose vocabulary is given has its corpus in files; windows of it are sent.
    is_large = config.model.vocab_size > 2**10
    tokens = np.broadcast_to(np.uint16(0), 2**40 if is_large else CORPUS_TOKENS)
    block_size, shape = (
        config.model.block_size,
        (config.gradient_accumulation_steps, config.batch_size),
    )
    batches = data.TrainBatches(
        tokens, config.seed, block_size, shape, data.MOST_STEPS_PER_DISPATCH
    )
    by_rows, everywhere = meshes.by_rows(mesh, axis=2), meshes.replicated(mesh)
    places_shape = (batches.most_steps, *shape)

    def array(shape, dtype, sharding=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if data.is_resident(tokens):
        corpus = array(tokens.shape, jnp.uint16)
        places_NAB = array(places_shape, jnp.int32, by_rows)
    else:
        corpus = None
        places_NAB = array((*places_shape, block_size + 1), jnp.uint16, by_rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return programs.train_steps.lower(
        programs.abstract_state,
        corpus,
        places_NAB,
        array((), jnp.int32),
        array(key.shape, key.dtype),
    )
