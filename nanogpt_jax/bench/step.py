"""The training step of train.py from shapes alone, for those who time it, size it or place it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from nanogpt_jax import data, sharding, steps
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.hardware import steps_per_call
from nanogpt_jax.model import Compute
from nanogpt_jax.optim import make_optimizer


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
    config: TrainConfig, compute: Compute, mesh: Mesh, n_tokens: int | None
) -> jax.stages.Compiled:
    """Compile train.py's (state, batch, key) -> (state, metrics); the devices need not exist.

    The state is donated. The corpus has n_tokens; None: too many, so that its windows are sent.
    """
    model = steps.make_model(config.model, compute)
    tx = make_optimizer(config.optim, config.max_iters)
    state = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    everywhere, rows = sharding.replicated(mesh), sharding.by_rows(mesh, axis=2)
    shape = steps_per_call(config), config.gradient_accumulation_steps, config.batch_size
    dtype, window = token_dtype(config), config.model.block_size + 1
    corpus, windows = None, jax.ShapeDtypeStruct((*shape, window), dtype, sharding=rows)
    if n_tokens is not None:
        corpus = jax.ShapeDtypeStruct((n_tokens,), dtype, sharding=everywhere)
        windows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    batch = data.Batch(corpus, windows)  # type: ignore[arg-type]  # shapes, not arrays
    update = partial(steps.train_steps, model, tx)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, everywhere))
    return jitted.lower(state, batch, jax.eval_shape(jax.random.key, 0)).compile()
