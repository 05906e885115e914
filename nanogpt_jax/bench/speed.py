"""Speed, and its distance to the limit: python -m nanogpt_jax.bench.speed --config small [--json]

All of train.py's flags are understood. The step that is timed is the very one of train.py, on
random tokens; FLOPs are those of its matrix products (counts.py). Two limits stand beside
it: the fastest large product that the same process reaches, of the same type, and what the chip's
maker promises (MFU), where the chip is known. Times are medians; on a shared machine, compare only
what was run side by side.

    --data       only time how a corpus too large for the device is read from its shards
    --memory     only compile the step, in variants, and show the bytes each needs on a device
    --profile    also write a profiler trace of some steps, and show where their time goes
    --race NAME  only let a preset and its fast twin race to a loss, see race.py

What was tried for `small` on 2 CPU cores (AMD EPYC, jax 0.10.2; ms a step, prototypes of this
model, one after the other; runs of one and the same variant differ by 1):

    nn.Dense as it is, (B, T, D) inputs             31.2
    dense layers on flattened (B T, D) inputs       19.0   taken: flat_dot_general in model.py
    also the residual stream kept flat              18.4   not worth its reshapes
    attention with heads before time (BHTK)         19.2
    jax.nn.dot_product_attention                    20.8
    token embedding as a one-hot product            19.4
    LayerNorm's fast variance                       19.0   not taken: digits for no time
    optimizer as one flat vector (optax.flatten)    18.6 to 20.8
    no AdamW and no clipping at all                 17.9   so the optimizer takes 1
    tanh GELU                                       17.8   nanoGPT's is exact; --activation has it
    layers stacked, one lax.scan over them          25.3   unrolled: 18.7
    lax.scan or lax.fori_loop over steps            18.0, 18.4
    YNN fusions (xla_cpu_experimental_ynn_fusion_type): flat 17.9, with plain nn.Dense 22.1;
        not taken: within the noise, and jax 0.7.2 does not know the option
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax import corpora, data, decoding, steps
from nanogpt_jax import mesh as meshes
from nanogpt_jax.bench import profile as profiling
from nanogpt_jax.bench import race
from nanogpt_jax.config import TrainConfig, parse_train_config, with_vocab_size
from nanogpt_jax.data import MOST_STEPS_PER_DISPATCH
from nanogpt_jax.errors import run_command
from nanogpt_jax.hardware import chips, devices
from nanogpt_jax.hardware import flops as counts
from nanogpt_jax.lecture.models import make_model
from nanogpt_jax.loader import TrainFeed
from nanogpt_jax.programs import Programs, make_programs, needed_bytes

CORPUS_TOKENS = 1_000_000
SAMPLE_TOKENS = 500
REPEATS = 5
DATA_SHARDS = 5  # of a corpus a quarter larger than what lies on the device
DATA_TOKENS = 20_000_000  # that are read
PROFILE = Path("out", "profile")
SWITCHES = {"--json", "--data", "--memory", "--profile"}


def main(argv: list[str]) -> None:
    """Measure, and print a table or, with --json, one JSON object."""
    if any(word.partition("=")[0] == "--race" for word in argv):
        race.main(argv)
        return
    switches, argv = SWITCHES & {*argv}, [word for word in argv if word not in SWITCHES]
    config = with_vocab_size(parse_train_config(argv, __doc__))
    # First: once this process holds a TPU, no other can.
    starts = {} if switches & {"--data", "--memory"} else start_figures(argv)
    mesh = meshes.make_mesh(meshes.choose_sizes(config, jax.device_count()))
    compute, how = devices.choose(config.compute, config.model, jax.devices()[0], mesh)
    figures = {
        "config": config.config,
        "device": devices.describe(mesh),
        "compute": how,
        "jax": jax.__version__,
        "cores": os.cpu_count(),
    }
    if "--memory" in switches:
        figures |= memory_of_variants(config, compute, mesh)
    elif "--data" in switches:
        figures |= data_figures(config, mesh)
    else:
        figures |= starts
        figures |= training_figures(config, compute, mesh, "--profile" in switches)
        figures |= sampling_figures(config, compute)
    if "--json" in switches:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:36} {f'{value:,.4g}' if isinstance(value, float) else value}")


def median_s(work) -> float:
    """Return the median seconds of a few calls of `work`, after one that is not counted."""
    times_s = []
    for _ in range(1 + REPEATS):
        begun_s = time.perf_counter()
        jax.block_until_ready(work())
        times_s.append(time.perf_counter() - begun_s)
    return statistics.median(times_s[1:])


def matmul_peak_flops(dtype) -> float:
    """Return the FLOP/s of the best large matrix product on one device, of a few sizes."""
    best, times = 0.0, 8  # products in one measurement, so that the dispatch does not count
    product = jax.jit(jnp.matmul)
    for size in (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
        seconds = median_s(lambda m=matrix: [product(m, m) for _ in range(times)])
        best = max(best, times * 2 * size**3 / seconds)
    return best


def step_inputs(config: TrainConfig, programs: Programs, mesh) -> tuple:
    """Return what `train_steps` is given beside the state and n, of random tokens: (corpus,
    places_NAB, dropout_key)."""
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=CORPUS_TOKENS)
    tokens = tokens.astype(np.uint16 if config.model.vocab_size <= 2**16 else np.uint32)
    shape = config.gradient_accumulation_steps, config.batch_size
    batches = data.TrainBatches(
        tokens, config.seed, config.model.block_size, shape, MOST_STEPS_PER_DISPATCH
    )
    places_NAB = meshes.put_places(
        tokens,
        batches.offsets(0, batches.most_steps),
        config.model.block_size + 1,
        meshes.by_rows(mesh, axis=2),
    )
    return meshes.put_corpus(tokens, mesh), places_NAB, steps.stream_keys(config.seed)[1]


def training_figures(config: TrainConfig, compute: devices.Compute, mesh, profile: bool) -> dict:
    """Time train.py's step, some of them in a dispatch of about a second."""
    programs = make_programs(config, compute, mesh)
    state = programs.init_state(steps.stream_keys(config.seed)[0])
    corpus, places_NAB, key = step_inputs(config, programs, mesh)
    lowered = programs.train_steps.lower(state, corpus, places_NAB, np.int32(0), key)
    begun_s = time.perf_counter()
    train_steps = lowered.compile()
    compile_s = time.perf_counter() - begun_s

    def dispatch(n_steps: int):
        nonlocal state
        state, metrics = train_steps(state, corpus, places_NAB, np.int32(n_steps), key)
        return metrics

    most = places_NAB.shape[0]
    few = min(most, 5)
    few_s = median_s(lambda: dispatch(few)) / few
    n_steps = int(min(most, max(1, 1 / few_s)))
    step_s = median_s(lambda: dispatch(n_steps)) / n_steps
    memory = memory_figures()  # before the products below count in it
    if profile:
        with jax.profiler.trace(str(PROFILE)):
            jax.block_until_ready(dispatch(few))
        profiling.print_table(PROFILE, few)
    peak = mesh.size * matmul_peak_flops(compute.dtype)
    achieved = counts.train_flops_per_token(config.model) * config.tokens_per_iter / step_s
    chip = chips.find(jax.devices()[0].device_kind)
    return {
        "parameters": counts.n_params(config.model),
        "compile_s": compile_s,
        "step_ms": 1e3 * step_s,
        "steps_per_dispatch": n_steps,
        "train_tokens_per_s": config.tokens_per_iter / step_s,
        "train_flops_per_s": achieved,
        "matmul_peak_flops_per_s": peak,
        "share_of_matmul_peak": achieved / peak,
        "chip": chip.name if chip else None,
        "mfu": achieved / (mesh.size * chip.device_flops) if chip else None,
        **memory,
        "train_compiled_bytes": needed_bytes(train_steps),
    }


def memory_of_variants(config: TrainConfig, compute: devices.Compute, mesh) -> dict:
    """Return the bytes a device that the step needs, as configured and with each way to save."""
    chunks = next((n for n in (8, 4, 2) if config.model.block_size % n == 0), 1)
    variants = {
        "as_configured": compute,
        "plain": compute._replace(remat=False, loss_chunks=1),
        "loss_chunks": compute._replace(remat=False, loss_chunks=chunks),
        "remat": compute._replace(remat=True, loss_chunks=1),
        "remat_loss_chunks": compute._replace(remat=True, loss_chunks=chunks),
    }
    figures = {}
    for name, variant in variants.items():
        programs = make_programs(config, variant, mesh)
        corpus, places_NAB, key = step_inputs(config, programs, mesh)
        arguments = programs.abstract_state, corpus, places_NAB, np.int32(0), key
        compiled = programs.train_steps.lower(*arguments).compile()
        figures[f"train_compiled_bytes_{name}"] = needed_bytes(compiled)
    return figures


def sampling_figures(config: TrainConfig, compute: devices.Compute) -> dict:
    """Time cached decoding: one and ten streams in one program, and one dispatch for each token."""
    model = make_model(config.model, devices.Compute(compute.dtype))
    params = jax.jit(partial(steps.init_params, model))(jax.random.key(0))
    write = jax.jit(partial(decoding.generate, model), static_argnames=("n_tokens", "sampling"))
    sampling = decoding.Sampling(temperature=0.8, top_k=200)
    window_BS = np.zeros((1, config.model.block_size), np.int32)
    length = np.int32(1)
    figures = {}
    for n_rows in (1, 10):
        keys_B = decoding.row_keys(0, range(n_rows))
        starts_BS = np.repeat(window_BS, n_rows, axis=0)
        seconds = median_s(
            lambda s=starts_BS, k=keys_B: write(
                params, s, length, k, n_tokens=SAMPLE_TOKENS, sampling=sampling
            )
        )
        name = f"sample_tokens_per_s_{n_rows}_stream{'s' if n_rows > 1 else ''}"
        figures[name] = n_rows * SAMPLE_TOKENS / seconds

    prefill = jax.jit(partial(decoding.prefill, model))
    decode = jax.jit(
        partial(decoding.decode, model), static_argnames="sampling", donate_argnames="state"
    )
    keys_B = decoding.row_keys(0, range(1))

    def stream():
        generation = prefill(params, window_BS, length)
        for _ in range(SAMPLE_TOKENS):
            generation, tokens_B = decode(params, generation, keys_B, sampling=sampling)
            np.asarray(tokens_B)
        return generation

    figures["sample_tokens_per_s_streamed"] = SAMPLE_TOKENS / median_s(stream)
    return figures


def data_figures(config: TrainConfig, mesh) -> dict:
    """Time how train.py reads a corpus that does not fit on the device: its windows, from shards.

    On one core, where the system can pin a process to one: reading and placing share it. First as
    the files come from the disk, then as the system remembers them.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    vocab_size, block_size = config.model.vocab_size, config.model.block_size
    dtype = np.dtype("uint16" if vocab_size <= 2**16 else "uint32")
    batch_shape = config.gradient_accumulation_steps, config.batch_size
    n_steps = max(1, DATA_TOKENS // config.tokens_per_iter)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"train_{i:05}.bin") for i in range(DATA_SHARDS)]
        tokens_of_one = data.RESIDENT_BYTES // dtype.itemsize // (DATA_SHARDS - 1)
        ids = np.random.default_rng(0).integers(vocab_size, size=tokens_of_one).astype(dtype)
        for path in paths:
            ids.tofile(path)
        # As data/prepare.py's own, whose checksum is trusted, and whose ids are checked when read.
        tokens, _ = data.open_tokens(paths, dtype.name, vocab_size, 1, crc32=0)
        figures = {"data_bytes": tokens.nbytes, "data_shards": len(paths)}
        for name in ("from_disk", "remembered"):
            if name == "from_disk":
                forget(paths)
            begun_s = time.perf_counter()
            feed = TrainFeed(
                tokens, config.seed, block_size, batch_shape, mesh, 0, MOST_STEPS_PER_DISPATCH
            )
            done = 0
            while done < n_steps:
                some = min(feed.most_steps, n_steps - done)
                jax.block_until_ready(feed.places(some))
                done += some
            seconds = time.perf_counter() - begun_s
            feed.close()
            figures[f"data_tokens_per_s_{name}"] = n_steps * config.tokens_per_iter / seconds
    return figures


def forget(paths: list[Path]) -> None:
    """Make the system forget what it remembers of some files, where it can be asked to (Linux)."""
    for path in paths if hasattr(os, "posix_fadvise") else []:
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # what is not written yet cannot be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_figures() -> dict:
    """Return the device's peak memory, or the process's where the device keeps no count (CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    of_device = stats.get("peak_bytes_in_use")
    return {
        "train_peak_memory_bytes": of_device or process_peak_bytes(),
        "train_peak_memory_of": "device" if of_device else "process",
    }


def process_peak_bytes() -> int | None:
    """Return the most memory this process ever held; None where Python cannot say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # what the operating system counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_figures(argv: list[str]) -> dict:
    """Time `python train.py` from the process's start to its first step, without and with cache."""
    if not race.TRAIN.exists():  # installed without the repository
        return {"first_step_cold_s": None, "first_step_warm_cache_s": None}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(Path(folder, "cache")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        flags = [*argv, "--dataset", "pydocs", "--data_dir", folder]
        corpora.prepare("pydocs", Path(folder))
        figures = {}
        for name in ("first_step_cold_s", "first_step_warm_cache_s"):
            command = [sys.executable, str(race.TRAIN), *flags, f"--out_dir={Path(folder, name)}"]
            begun_s = time.perf_counter()
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process:
                told = next((line for line in process.stdout if "first step done" in line), None)
                figures[name] = time.perf_counter() - begun_s
                process.kill()
                if told is None:
                    errors.seek(0)
                    raise RuntimeError(f"train.py made no step: {errors.read()}")
        return figures


if __name__ == "__main__":
    run_command(main)
