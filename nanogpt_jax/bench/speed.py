"""Measure speed and its distance to the limits: python -m nanogpt_jax bench --config small [--json]

All flags of train.py apply. The step that is timed is the one of train.py, one call an update, on
random tokens. FLOPs are those of its matrix products. Two limits are printed next to it: the
fastest large matrix product that this process reaches in the same dtype, and, for a known chip, its
published peak (MFU). Times are medians; on a shared machine, compare only what ran side by side.

    --data       only time how a corpus too large for the device is read from its files
    --memory     only compile variants of the step, and print the bytes each needs on a device
    --profile    also trace some steps with JAX's profiler, and print where their time goes
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanogpt_jax import corpora, data, decoding, steps
from nanogpt_jax.bench import profile
from nanogpt_jax.bench.race import TRAIN
from nanogpt_jax.bench.step import compile_train_step, jit_steps, token_dtype
from nanogpt_jax.config import TrainConfig, parse_train_config, with_vocab_size
from nanogpt_jax.hardware import Machine, choose, n_params, needed_bytes, train_flops_per_token
from nanogpt_jax.model import Compute

CORPUS_TOKENS = 1_000_000
SAMPLE_TOKENS = 500
REPEATS = 5
DATA_FILES = 5  # together a quarter larger than what is stored on the device
DATA_TOKENS = 20_000_000  # that are read
PROFILE, PROFILED_STEPS = Path("out", "profile"), 5
SWITCHES = {"--json", "--data", "--memory", "--profile"}


def main(argv: list[str]) -> None:
    """Measure, and print a table or, with --json, one JSON object."""
    switches, argv = SWITCHES & {*argv}, [word for word in argv if word not in SWITCHES]
    config = with_vocab_size(parse_train_config(argv, __doc__ or ""))
    # First: while this process holds a TPU, no other can use it.
    starts = {} if switches & {"--data", "--memory"} else start_figures(argv)
    machine = choose(config)
    figures = {
        "config": config.config,
        "device": machine.device,
        "compute": machine.reason,
        "jax": jax.__version__,
        "cores": os.cpu_count(),
    }
    if "--memory" in switches:
        figures |= memory_of_variants(config, machine)
    elif "--data" in switches:
        figures |= data_figures(config, machine.mesh)
    else:
        figures |= starts
        figures |= training_figures(config, machine, "--profile" in switches)
        figures |= sampling_figures(config, machine.compute)
    if "--json" in switches:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:36} {f'{value:,.4g}' if isinstance(value, float) else value}")


def median_s(work: Callable[[], object]) -> float:
    """Return the median seconds of a few calls of `work`, after one that is not counted."""
    times_s = []
    for _ in range(1 + REPEATS):
        start_s = time.perf_counter()
        jax.block_until_ready(work())
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:])


def matmul_peak_flops(dtype) -> float:
    """Return the FLOP/s of the fastest large matrix product on one device, of two sizes."""
    best, times = 0.0, 8  # products per measurement, so that dispatching them does not count
    product = jax.jit(jnp.matmul)
    for size in (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
        seconds = median_s(lambda m=matrix: [product(m, m) for _ in range(times)])
        best = max(best, times * 2 * size**3 / seconds)
    return best


def training_figures(config: TrainConfig, machine: Machine, is_traced: bool) -> dict:
    """Time train.py's step and its batches as train.py calls them, waiting one update behind."""
    mesh, compute = machine.mesh, machine.compute
    jitted = jit_steps(config, compute, mesh)
    start_s = time.perf_counter()
    train_step = compile_train_step(config, jitted, mesh, CORPUS_TOKENS)
    compile_s = time.perf_counter() - start_s
    init_key, dropout_key = steps.stream_keys(config.seed)
    state = jitted.init_state(init_key)
    shape = config.gradient_accumulation_steps, config.batch_size
    tokens = random_tokens(config, CORPUS_TOKENS)
    batches = data.TrainLoader(tokens, config.seed, config.model.block_size, shape, mesh)

    def train(n_steps: int):
        nonlocal state
        metrics = None
        for _ in range(n_steps):
            previous = metrics
            state, metrics = train_step(state, next(batches), dropout_key)
            jax.block_until_ready(previous)
        return metrics

    n_steps = max(1, int(1 / median_s(lambda: train(1))))  # about a second of them
    step_s = median_s(lambda: train(n_steps)) / n_steps
    memory = memory_figures()  # before the products below, which would count in it
    if is_traced:
        with jax.profiler.trace(str(PROFILE)):
            jax.block_until_ready(train(PROFILED_STEPS))
        profile.print_table(PROFILE, PROFILED_STEPS)
    peak = mesh.size * matmul_peak_flops(compute.dtype)
    achieved = train_flops_per_token(config.model) * config.tokens_per_iter / step_s
    return {
        "parameters": n_params(config.model),
        "compile_s": compile_s,
        "step_ms": 1e3 * step_s,
        "train_tokens_per_s": config.tokens_per_iter / step_s,
        "train_flops_per_s": achieved,
        "matmul_peak_flops_per_s": peak,
        "share_of_matmul_peak": achieved / peak,
        "chip": machine.chip.name if machine.chip else None,
        "mfu": achieved / machine.peak_flops if machine.peak_flops else None,
        **memory,
        "train_compiled_bytes": needed_bytes(train_step),
    }


def random_tokens(config: TrainConfig, n_tokens: int) -> np.ndarray:
    """Return random token ids, in the dtype of a corpus."""
    vocab_size = config.model.vocab_size or 1
    ids = np.random.default_rng(0).integers(vocab_size, size=n_tokens)
    return ids.astype(token_dtype(config))


def memory_of_variants(config: TrainConfig, machine: Machine) -> dict:
    """Return the bytes per device that the step needs, as configured and with each way to save."""
    mesh, compute = machine.mesh, machine.compute
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
        jitted = jit_steps(config, variant, mesh)
        compiled = compile_train_step(config, jitted, mesh, CORPUS_TOKENS)
        figures[f"train_compiled_bytes_{name}"] = needed_bytes(compiled)
    return figures


def sampling_figures(config: TrainConfig, compute: Compute) -> dict:
    """Time cached decoding: one and ten rows in one program, and one call for each token."""
    model = steps.make_model(config.model, Compute(compute.dtype))
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
    decode = jax.jit(partial(decoding.decode, model), static_argnames="sampling", donate_argnums=1)
    keys_B = decoding.row_keys(0, range(1))

    def stream():
        decoding = prefill(params, window_BS, length)
        for _ in range(SAMPLE_TOKENS):
            decoding, tokens_B = decode(params, decoding, keys_B, sampling=sampling)
            np.asarray(tokens_B)
        return decoding

    figures["sample_tokens_per_s_streamed"] = SAMPLE_TOKENS / median_s(stream)
    return figures


def data_figures(config: TrainConfig, mesh: Mesh) -> dict:
    """Time how train.py reads a corpus that is not stored on the device: its windows, from files.

    On one core, where the system can pin a process to one: reading and sending share it. First as
    the files come from the disk, then from the system's page cache.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    block_size = config.model.block_size
    shape = config.gradient_accumulation_steps, config.batch_size
    n_steps = max(1, DATA_TOKENS // config.tokens_per_iter)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"train_{i:05}.bin") for i in range(DATA_FILES)]
        width = np.dtype(token_dtype(config)).itemsize
        ids = random_tokens(config, data.RESIDENT_BYTES // width // (DATA_FILES - 1))
        for path in paths:
            ids.tofile(path)
        # Like a corpus of data/prepare.py: its checksum is trusted, its ids are checked when read.
        tokens, _ = corpora.open_tokens(
            paths, ids.dtype.name, config.model.vocab_size or 1, 1, crc32=0
        )
        figures: dict[str, float] = {"data_bytes": tokens.nbytes, "data_shards": len(paths)}
        for name in ("from_disk", "remembered"):
            if name == "from_disk":
                drop_from_page_cache(paths)
            start_s = time.perf_counter()
            batches = data.TrainLoader(tokens, config.seed, block_size, shape, mesh)
            for _ in range(n_steps):
                jax.block_until_ready(next(batches).windows)
            seconds = time.perf_counter() - start_s
            batches.close()
            figures[f"data_tokens_per_s_{name}"] = n_steps * config.tokens_per_iter / seconds
    return figures


def drop_from_page_cache(paths: list[Path]) -> None:
    """Drop files from the page cache, where the system lets a process do so (Linux)."""
    for path in paths if hasattr(os, "posix_fadvise") else []:
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # only what is written can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_figures() -> dict:
    """Return the device's peak memory, or the process's if the device does not count (CPU)."""
    peak, of_what = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"), "device"
    if not peak:
        of_what = "process"
        with contextlib.suppress(ImportError):  # Windows does not say
            import resource

            unit = 1 if sys.platform == "darwin" else 1024  # what the operating system counts in
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"train_peak_memory_bytes": peak, "train_peak_memory_of": of_what}


def start_figures(argv: list[str]) -> dict:
    """Time `python train.py` from its start to its first step, without and with a compile cache."""
    if not TRAIN.exists():  # installed without the repository
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
            command = [sys.executable, str(TRAIN), *flags, f"--out_dir={Path(folder, name)}"]
            start_s = time.perf_counter()
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process:
                assert process.stdout is not None
                is_done = any("first step done" in line for line in process.stdout)
                figures[name] = time.perf_counter() - start_s
                process.kill()
            if not is_done:
                errors.seek(0)
                raise RuntimeError(f"train.py made no step: {errors.read()}")
        return figures
