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
import itertools
import json
import os
import statistics
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

from nanogpt_jax import corpora, data, decoding, hardware, steps
from nanogpt_jax.bench import profile
from nanogpt_jax.bench.race import TRAIN, run_train
from nanogpt_jax.bench.step import compile_step, new_state, token_dtype
from nanogpt_jax.config import TrainConfig, parse_train_config, with_vocab_size
from nanogpt_jax.model import Compute

CORPUS_TOKENS = 1_000_000
SAMPLE_TOKENS = 500
REPEATS = 5
DATA_FILES = 5  # together a quarter larger than what is stored on the device
DATA_TOKENS = 20_000_000  # that are read
PROFILE, PROFILED_CALLS = Path("out", "profile"), 5
SWITCHES = {"--json", "--data", "--memory", "--profile"}


def main(argv: list[str]) -> None:
    switches, argv = SWITCHES & {*argv}, [word for word in argv if word not in SWITCHES]
    config = with_vocab_size(parse_train_config(argv, __doc__ or ""))
    # First: while this process holds a TPU, no other can use it.
    starts = {} if switches & {"--data", "--memory"} else start_figures(argv)
    machine = hardware.choose(config)
    figures = {
        "config": config.config,
        "device": machine.device,
        "compute": machine.reason,
        "jax": jax.__version__,
        "cores": os.cpu_count(),
    }
    if "--memory" in switches:
        figures |= memory_figures(config, machine)
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


def start_figures(argv: list[str]) -> dict:
    """Time train.py from the command to its first step, without and with a compile cache."""
    figures: dict = {"first_step_cold_s": None, "first_step_warm_cache_s": None}
    if not TRAIN.exists():  # installed without the repository
        return figures
    with tempfile.TemporaryDirectory() as folder:
        corpora.prepare("pydocs", Path(folder))
        for name in figures:
            lines = run_train(
                [*argv, "--dataset=pydocs", f"--data_dir={folder}", f"--out_dir={folder}/{name}"],
                JAX_COMPILATION_CACHE_DIR=f"{folder}/cache",
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            )
            with contextlib.closing(lines):
                figures[name] = next(s for s, line in lines if "first step done" in line)
    return figures


def training_figures(config: TrainConfig, machine: hardware.Machine, is_traced: bool) -> dict:
    """Time train.py's step and its batches as train.py calls them, waiting one update behind."""
    start_s = time.perf_counter()
    train_step = compile_step(config, machine.compute, machine.mesh, CORPUS_TOKENS)
    compile_s = time.perf_counter() - start_s
    state = new_state(config, machine.mesh)
    _, dropout_key = steps.stream_keys(config.seed)
    shape = config.gradient_accumulation_steps, config.batch_size
    tokens = random_tokens(config, CORPUS_TOKENS)
    per_call = hardware.steps_per_call(config)
    batches = data.TrainLoader(
        tokens, config.seed, config.model.block_size, shape, machine.mesh, 0, per_call
    )

    def train(n_calls: int):
        nonlocal state
        metrics = None
        for _ in range(n_calls):
            previous = metrics
            state, metrics = train_step(state, next(batches), dropout_key)
            jax.block_until_ready(previous)
        return metrics

    n_calls = max(1, int(1 / median_s(lambda: train(1))))  # about a second of them
    step_s = median_s(lambda: train(n_calls)) / n_calls / per_call
    # Before the products below, which would count in the peak: the device's, or the process's.
    peak_memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    of_what = "device" if peak_memory else "process"
    if not peak_memory:
        with contextlib.suppress(ImportError):  # Windows does not say
            import resource

            unit = 1 if sys.platform == "darwin" else 1024  # what the operating system counts in
            peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if is_traced:
        with jax.profiler.trace(str(PROFILE)):
            jax.block_until_ready(train(PROFILED_CALLS))
        profile.print_table(PROFILE, PROFILED_CALLS * per_call)
    matmul_flops = machine.mesh.size * matmul_peak_flops(machine.compute.dtype)
    flops = hardware.train_flops_per_token(config.model) * config.tokens_per_iter / step_s
    return {
        "parameters": hardware.n_params(config.model),
        "compile_s": compile_s,
        "step_ms": 1e3 * step_s,
        "train_tokens_per_s": config.tokens_per_iter / step_s,
        "train_flops_per_s": flops,
        "matmul_peak_flops_per_s": matmul_flops,
        "share_of_matmul_peak": flops / matmul_flops,
        "chip": machine.chip.name if machine.chip else None,
        "mfu": flops / machine.peak_flops if machine.peak_flops else None,
        "train_peak_memory_bytes": peak_memory,
        "train_peak_memory_of": of_what,
        "train_compiled_bytes": hardware.needed_bytes(train_step),
    }


def random_tokens(config: TrainConfig, n_tokens: int) -> np.ndarray:
    ids = np.random.default_rng(0).integers(config.model.vocab_size or 1, size=n_tokens)
    return ids.astype(token_dtype(config))


def matmul_peak_flops(dtype) -> float:
    """Return the FLOP/s of the fastest large matrix product on one device, of two sizes."""
    best, times = 0.0, 8  # products per measurement, so that dispatching them does not count
    product = jax.jit(jnp.matmul)
    for size in (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
        seconds = median_s(lambda m=matrix: [product(m, m) for _ in range(times)])
        best = max(best, times * 2 * size**3 / seconds)
    return best


def sampling_figures(config: TrainConfig, compute: Compute) -> dict:
    """Time cached decoding: one and ten rows in one program, and one call for each token."""
    model = steps.make_model(config.model, Compute(compute.dtype))
    params = jax.jit(partial(steps.init_params, model))(jax.random.key(0))
    sampling = decoding.Sampling(temperature=0.8, top_k=200)

    def together(keys_B):
        prompt_B1 = np.zeros((len(keys_B), 1), np.int32)
        return decoding.generate(model, params, prompt_B1, keys_B, SAMPLE_TOKENS, sampling)

    def one_by_one(keys_B):
        tokens = decoding.write(model, params, np.zeros((1, 1), np.int32), keys_B, sampling)
        return [np.asarray(tokens_B1) for tokens_B1 in itertools.islice(tokens, SAMPLE_TOKENS)]

    def tokens_per_s(n_rows: int, generate: Callable) -> float:
        keys_B = decoding.row_keys(0, range(n_rows))
        return n_rows * SAMPLE_TOKENS / median_s(lambda: generate(keys_B))

    return {
        "sample_tokens_per_s_1_stream": tokens_per_s(1, together),
        "sample_tokens_per_s_10_streams": tokens_per_s(10, together),
        "sample_tokens_per_s_streamed": tokens_per_s(1, one_by_one),
    }


def memory_figures(config: TrainConfig, machine: hardware.Machine) -> dict:
    """Return the bytes per device that the step needs, as configured and with each way to save."""
    compute = machine.compute
    chunks = next((n for n in (8, 4, 2) if config.model.block_size % n == 0), 1)
    figures = {}
    for name, variant in {
        "as_configured": compute,
        "plain": compute._replace(remat=False, loss_chunks=1),
        "loss_chunks": compute._replace(remat=False, loss_chunks=chunks),
        "remat": compute._replace(remat=True, loss_chunks=1),
        "remat_loss_chunks": compute._replace(remat=True, loss_chunks=chunks),
    }.items():
        step = compile_step(config, variant, machine.mesh, CORPUS_TOKENS)
        figures[f"train_compiled_bytes_{name}"] = hardware.needed_bytes(step)
    return figures


def data_figures(config: TrainConfig, mesh: Mesh) -> dict:
    """Time how train.py reads windows from files: from the disk, then from the page cache."""
    if hasattr(os, "sched_setaffinity"):  # on one core, which reading and sending share
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
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
            for path in paths if name == "from_disk" and hasattr(os, "posix_fadvise") else []:
                with path.open("rb+") as file:  # drop it from the page cache
                    os.fsync(file.fileno())  # only what is written can be dropped
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start_s = time.perf_counter()
            batches = data.TrainLoader(tokens, config.seed, config.model.block_size, shape, mesh)
            for _ in range(n_steps):
                jax.block_until_ready(next(batches).windows)
            seconds = time.perf_counter() - start_s
            batches.close()
            figures[f"data_tokens_per_s_{name}"] = n_steps * config.tokens_per_iter / seconds
    return figures
