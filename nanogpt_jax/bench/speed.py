"""Measure speed and its distance to the limits: python -m nanogpt_jax bench --config small

All flags of train.py apply. The step that is timed is the one of train.py, one call an update, on
random tokens. FLOPs are those of its matrix products. Two limits are printed next to it: the
fastest large matrix product that this process reaches in the same dtype, and, for a known chip, its
published peak (MFU). Times are medians; on a shared machine, compare only what ran side by side.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax import corpora, decoding, hardware, steps
from nanogpt_jax.bench import profile
from nanogpt_jax.bench.measure import TRAIN, run_python
from nanogpt_jax.bench.step import calls, compile_step, median_s, token_dtype
from nanogpt_jax.config import (
    SCRATCH,
    TrainConfig,
    field_types,
    parse_train_config,
    split_flags,
    with_vocab_size,
)
from nanogpt_jax.model import Compute
from nanogpt_jax.run import adopt

CORPUS_TOKENS = 1_000_000
SAMPLE_TOKENS = 500
PROFILE, PROFILED_CALLS = Path("out", "profile"), 5


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """A run, and what of it is measured."""

    start: bool = True  # time train.py from the command to its first step, cold and warm
    sampling: bool = True  # time sampling
    profile: bool = False  # trace some steps with JAX's profiler, and print where their time goes
    json: bool = False  # print one JSON object instead of lines


def main(argv: list[str]) -> None:
    config = with_vocab_size(adopt(parse_train_config(argv, __doc__ or "", BenchConfig))[0])
    assert isinstance(config, BenchConfig)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the figures alone
        # First: while this process holds a TPU, no other can use it.
        starts = start_figures(argv) if config.start and config.init_from == SCRATCH else {}
        machine = hardware.choose(config)
        figures = {
            "config": config.config,
            "device": machine.device,
            "compute": machine.reason,
            "jax": jax.__version__,
            "cores": os.cpu_count(),
        }
        figures |= starts | training_figures(config, machine)
        if config.sampling:
            figures |= sampling_figures(config, machine.compute)
    if config.json:
        print(json.dumps(figures))
        return
    operations = figures.pop("operations")
    for name, value in figures.items():
        print(f"{name:36} {f'{value:,.4g}' if isinstance(value, float) else value}")
    if operations:
        print(*profile.table(operations), sep="\n")


def start_figures(argv: list[str]) -> dict:
    """Time train.py from the command to its first step, without and with a compile cache."""
    flags, known = split_flags(argv, BenchConfig), field_types(TrainConfig)
    argv = [f"--{name}={value}" for name, value in flags.items() if name in known]
    figures: dict = {"first_step_cold_s": None, "first_step_warm_cache_s": None}
    if not TRAIN.exists():  # installed without the repository
        return figures
    with tempfile.TemporaryDirectory() as folder:
        corpora.prepare(corpora.Request(corpora.PYDOCS, Path(folder)))
        for name in figures:
            own = "--dataset=pydocs", f"--data_dir={folder}", f"--out_dir={folder}/{name}"
            lines = run_python(
                [str(TRAIN), *argv, *own],
                JAX_COMPILATION_CACHE_DIR=f"{folder}/cache",
                JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            )
            with contextlib.closing(lines):
                figures[name] = next(s for s, line in lines if "first step done" in line)
    return figures


def training_figures(config: BenchConfig, machine: hardware.Machine) -> dict:
    """Time train.py's step and its batches as train.py calls them, waiting one update behind."""
    start_s = time.perf_counter()
    train_step = compile_step(config, machine.compute, machine.mesh, CORPUS_TOKENS)
    compile_s = time.perf_counter() - start_s
    ids = np.random.default_rng(0).integers(config.model.vocab_size or 1, size=CORPUS_TOKENS)
    tokens, per_call = ids.astype(token_dtype(config)), hardware.steps_per_call(config)
    operations = {}
    with calls(config, machine, train_step, tokens) as train:
        n_calls = max(1, int(1 / median_s(lambda: train(1))))  # about a second of them
        step_s = median_s(lambda: train(n_calls)) / n_calls / per_call
        # Before the products below, which would count in the peak: the device's, or the process's.
        peak_memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        of_what = "device" if peak_memory else "process"
        if not peak_memory:
            with contextlib.suppress(ImportError):  # Windows does not say
                import resource

                unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in
                peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if config.profile:
            with jax.profiler.trace(str(PROFILE)):
                jax.block_until_ready(train(PROFILED_CALLS))
            operations = profile.time_by_operation(PROFILE, PROFILED_CALLS * per_call)
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
        "operations": operations,  # seconds a step
    }


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
        return [*itertools.islice(tokens, SAMPLE_TOKENS)]

    def tokens_per_s(n_rows: int, generate: Callable) -> float:
        keys_B = decoding.row_keys(0, range(n_rows))
        return n_rows * SAMPLE_TOKENS / median_s(lambda: generate(keys_B))

    return {
        "sample_tokens_per_s_1_stream": tokens_per_s(1, together),
        "sample_tokens_per_s_10_streams": tokens_per_s(10, together),
        "sample_tokens_per_s_streamed": tokens_per_s(1, one_by_one),
    }
