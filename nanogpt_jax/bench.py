"""Speed, and its distance to the limit: python -m nanogpt_jax.bench --config small [--json]

All of train.py's flags are understood. The step that is timed is the very one of train.py, on
random tokens; FLOPs are those of its matrix products (accounting.py), and the limit is the fastest
large product of float32 arrays that the same process reaches, so the share says what a better
program could still win. Times are medians; on a shared machine, compare only what was run side by
side.

What was tried for `small` on 2 CPU cores (AMD EPYC, jax 0.10.2; ms a step, prototypes of this
model, one after the other; runs of one and the same variant differ by 1):

    nn.Dense as it is, (B, T, D) inputs             31.2
    dense layers on flattened (B T, D) inputs       19.0   taken: _flat_dot_general in model.py
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

import dataclasses
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

from nanogpt_jax import accounting, corpora, data, generate, sharding, steps
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.errors import run_command
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.presets import parse_train_config

CORPUS_TOKENS = 1_000_000
SAMPLE_TOKENS = 500
REPEATS = 5


def main(argv: list[str]) -> None:
    """Measure, and print a table or, with --json, one JSON object."""
    config = parse_train_config([word for word in argv if word != "--json"], __doc__)
    vocab_size = config.model.vocab_size or 65
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size)
    )
    starts = start_figures(argv)  # first: once this process holds a TPU, no other can
    figures = {
        "config": config.config,
        "device": sharding.describe_device(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        **starts,
    }
    figures |= training_figures(config)
    figures |= sampling_figures(config)
    if "--json" in argv:
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


def matmul_peak_flops() -> float:
    """Return the FLOP/s of the best large matrix product of float32 arrays, of a few sizes."""
    best, times = 0.0, 8  # products in one measurement, so that the dispatch does not count
    product = jax.jit(jnp.matmul)
    for size in (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192):
        matrix = jax.random.normal(jax.random.key(0), (size, size))
        seconds = median_s(lambda m=matrix: [product(m, m) for _ in range(times)])
        best = max(best, times * 2 * size**3 / seconds)
    return best


def training_figures(config: TrainConfig) -> dict:
    """Time train.py's step, some of them in a dispatch of about a second."""
    model, tx = GPT(config.model), make_optimizer(config.optim, config.max_iters)
    weights_key, dropout_key = steps.stream_keys(config.seed)
    state = jax.jit(partial(steps.init_state, model, tx))(weights_key)
    corpus = np.random.default_rng(0).integers(config.model.vocab_size, size=CORPUS_TOKENS)
    batches = data.TrainBatches(
        corpus.astype(np.uint16 if config.model.vocab_size <= 2**16 else np.uint32),
        config.seed,
        config.model.block_size,
        (config.gradient_accumulation_steps, config.batch_size),
        1024,
    )
    tokens, offsets_NAB = jax.device_put(batches.read(0, batches.most_steps))
    train_steps = jax.jit(partial(steps.train_steps, model, tx), donate_argnames="state")
    begun_s = time.perf_counter()
    compiled = train_steps.lower(state, tokens, offsets_NAB, np.int32(0), dropout_key).compile()
    compile_s = time.perf_counter() - begun_s

    def dispatch(n_steps: int):
        nonlocal state
        state, metrics = compiled(state, tokens, offsets_NAB, np.int32(n_steps), dropout_key)
        return metrics

    few = min(batches.most_steps, 5)
    few_s = median_s(lambda: dispatch(few)) / few
    n_steps = int(min(batches.most_steps, max(1, 1 / few_s)))
    step_s = median_s(lambda: dispatch(n_steps)) / n_steps
    memory = memory_figures()  # before the products below count in it
    peak = matmul_peak_flops()
    achieved = accounting.train_flops_per_token(config.model) * config.tokens_per_iter / step_s
    return {
        "parameters": sum(accounting.parameter_counts(config.model).values()),
        "compile_s": compile_s,
        "step_ms": 1e3 * step_s,
        "steps_per_dispatch": n_steps,
        "train_tokens_per_s": config.tokens_per_iter / step_s,
        "train_flops_per_s": achieved,
        "matmul_peak_flops_per_s": peak,
        "share_of_matmul_peak": achieved / peak,
        **memory,
    }


def sampling_figures(config: TrainConfig) -> dict:
    """Time cached decoding: one and ten streams in one program, and one dispatch for each token."""
    model = GPT(config.model)
    params = jax.jit(partial(steps.init_params, model))(jax.random.key(0))
    write = jax.jit(partial(generate.generate, model), static_argnames=("n_tokens", "sampling"))
    sampling = generate.Sampling(temperature=0.8, top_k=200)
    window_BS = np.zeros((1, config.model.block_size), np.int32)
    length = np.int32(1)
    figures = {}
    for n_rows in (1, 10):
        keys_B = generate.row_keys(0, range(n_rows))
        starts_BS = np.repeat(window_BS, n_rows, axis=0)
        seconds = median_s(
            lambda s=starts_BS, k=keys_B: write(
                params, s, length, k, n_tokens=SAMPLE_TOKENS, sampling=sampling
            )
        )
        name = f"sample_tokens_per_s_{n_rows}_stream{'s' if n_rows > 1 else ''}"
        figures[name] = n_rows * SAMPLE_TOKENS / seconds

    prefill = jax.jit(partial(generate.prefill, model))
    decode = jax.jit(
        partial(generate.decode, model), static_argnames="sampling", donate_argnames="generation"
    )
    keys_B = generate.row_keys(0, range(1))

    def stream():
        generation = prefill(params, window_BS, length)
        for _ in range(SAMPLE_TOKENS):
            generation, tokens_B = decode(params, generation, keys_B, sampling=sampling)
            np.asarray(tokens_B)
        return generation

    figures["sample_tokens_per_s_streamed"] = SAMPLE_TOKENS / median_s(stream)
    return figures


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
    train_py = Path(__file__).parent.parent / "train.py"
    if not train_py.exists():  # installed without the repository
        return {"first_step_cold_s": None, "first_step_warm_cache_s": None}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(Path(folder, "cache")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        flags = [word for word in argv if word != "--json"]
        flags += ["--dataset", "pydocs", "--data_dir", folder]
        corpora.prepare("pydocs", Path(folder))
        figures = {}
        for name in ("first_step_cold_s", "first_step_warm_cache_s"):
            command = [sys.executable, str(train_py), *flags, "--out_dir", str(Path(folder, name))]
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
