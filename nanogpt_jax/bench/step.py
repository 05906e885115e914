"""The training step of train.py from shapes alone, for those who time it, size it or place it."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from nanogpt_jax import data, sharding, steps
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.hardware import Machine, steps_per_call
from nanogpt_jax.model import Compute
from nanogpt_jax.optim import make_optimizer

REPEATS = 5


def _init_state(config: TrainConfig, key) -> steps.TrainState:
    tx = make_optimizer(config.optim, config.max_iters)
    return steps.new_state(steps.make_model(config.model), tx, key)


def abstract_state(config: TrainConfig, mesh: Mesh | AbstractMesh) -> steps.TrainState:
    """Return the shapes of a run's state, each with its sharding; nothing is computed."""
    state = jax.eval_shape(partial(_init_state, config), jax.random.key(0))
    return sharding.place(state, mesh)


def new_state(config: TrainConfig, mesh: Mesh) -> steps.TrainState:
    """Return the state before a run's first update."""
    init_key, _ = steps.stream_keys(config.seed)
    shardings = jax.tree.map(lambda array: array.sharding, abstract_state(config, mesh))
    return jax.jit(partial(_init_state, config), out_shardings=shardings)(init_key)


def token_dtype(config: TrainConfig) -> str:
    """Return the dtype of a corpus's token ids; vocab_size must be set."""
    return "uint16" if (config.model.vocab_size or 0) <= 2**16 else "uint32"


def compile_step(
    config: TrainConfig, compute: Compute, mesh: Mesh, n_tokens: int | None, dtype: str = ""
) -> jax.stages.Compiled:
    """Compile train.py's (state, batch, key) -> (state, metrics); the devices need not exist.

    The state is donated. The corpus has n_tokens; None: too many, so that its windows are sent.
    Their dtype is that of a new corpus, unless it is given.
    """
    model = steps.make_model(config.model, compute)
    tx = make_optimizer(config.optim, config.max_iters)
    state = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    everywhere, rows = sharding.replicated(mesh), sharding.by_rows(mesh, axis=2)
    shape = steps_per_call(config), config.gradient_accumulation_steps, config.batch_size
    dtype, window = dtype or token_dtype(config), config.model.block_size + 1
    corpus, windows = None, jax.ShapeDtypeStruct((*shape, window), dtype, sharding=rows)
    if n_tokens is not None:
        corpus = jax.ShapeDtypeStruct((n_tokens,), dtype, sharding=everywhere)
        windows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    batch = data.Batch(corpus, windows)  # type: ignore[arg-type]  # shapes, not arrays
    update = partial(steps.train_steps, model, tx)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere))
    return jitted.lower(state, batch, jax.eval_shape(jax.random.key, 0)).compile()


def median_s(work: Callable[[], object], repeats: int | None = None) -> float:
    """Return the median seconds of a few calls of `work`, after one that is not counted."""
    times_s = []
    for _ in range(1 + (repeats or REPEATS)):
        start_s = time.perf_counter()
        jax.block_until_ready(work())
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:])


@contextlib.contextmanager
def calls(
    config: TrainConfig, machine: Machine, train_step: Callable, tokens: data.Tokens
) -> Iterator[Callable[[int], steps.Metrics | None]]:
    """Yield what makes n calls of a compiled step as train.py does, waiting one update behind.

    It trains a state of its own.
    """
    state = new_state(config, machine.mesh)
    _, dropout_key = steps.stream_keys(config.seed)
    shape = config.gradient_accumulation_steps, config.batch_size
    sizes = config.model.block_size, shape, machine.mesh, 0, steps_per_call(config)

    def train(n_calls: int):
        nonlocal state
        metrics = None
        for _ in range(n_calls):
            previous = metrics
            state, metrics = train_step(state, next(batches), dropout_key)
            jax.block_until_ready(previous)
        return metrics

    with contextlib.closing(data.train_batches(tokens, config.seed, *sizes)) as batches:
        yield train


def time_step(config: TrainConfig, machine: Machine, tokens: data.Tokens) -> tuple[float, float]:
    """Return the seconds to compile train.py's step for a corpus, and of one update."""
    n_tokens, start_s = len(tokens) if data.is_resident(tokens) else None, time.perf_counter()
    dtype = tokens.dtype.name
    train_step = compile_step(config, machine.compute, machine.mesh, n_tokens, dtype)
    compile_s = time.perf_counter() - start_s
    machine.check_fits(train_step, config)
    with calls(config, machine, train_step, tokens) as train:
        return compile_s, median_s(lambda: train(1), repeats=3) / steps_per_call(config)
