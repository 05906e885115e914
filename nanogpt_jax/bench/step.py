"""The step of train.py, jitted as train.py jits it, for those who time it, size it or place it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanogpt_jax import data, sharding, steps
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.model import Compute, Model
from nanogpt_jax.optim import make_optimizer


class JittedSteps(NamedTuple):
    """The functions of a run, jitted for a mesh but not yet compiled."""

    model: Model
    abstract_state: steps.TrainState  # shapes, dtypes and shardings
    init_state: Callable  # (key) -> state
    train_step: jax.stages.Wrapped  # (state, batch, key) -> (state, metrics); the state is donated
    eval_step: Callable  # (params, batch, counts_B) -> (sum of losses, number of targets)


def init_state(config: TrainConfig, model: Model, key) -> steps.TrainState:
    """Return the state before the first update."""
    tx = make_optimizer(config.optim, config.max_iters)
    return steps.init_state(tx, steps.init_params(model, key))


def abstract_state(config: TrainConfig) -> steps.TrainState:
    """Return the shapes and dtypes of a run's state; nothing is computed."""
    init = partial(init_state, config, steps.make_model(config.model))
    return jax.eval_shape(init, jax.random.key(0))


def jit_steps(config: TrainConfig, compute: Compute, mesh: Mesh) -> JittedSteps:
    """Return the jitted functions of a run on a mesh."""
    model = steps.make_model(config.model, compute)
    tx = make_optimizer(config.optim, config.max_iters)
    length = config.model.block_size + 1

    def train_step(state, batch, key):
        return steps.train_step(model, tx, state, data.gather(batch, length), key)

    def eval_step(params, batch, counts_B):
        return steps.eval_step(model, params, data.gather(batch, length), counts_B)

    abstract, replicated = sharding.place(abstract_state(config), mesh), sharding.replicated(mesh)
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    return JittedSteps(
        model,
        abstract,
        jax.jit(partial(init_state, config, model), out_shardings=shardings),
        jax.jit(train_step, donate_argnames="state", out_shardings=(shardings, replicated)),
        jax.jit(eval_step, out_shardings=replicated),
    )


def token_dtype(config: TrainConfig) -> str:
    """Return the dtype of a corpus's token ids."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    return "uint16" if vocab_size <= 2**16 else "uint32"


def compile_train_step(
    config: TrainConfig, jitted: JittedSteps, mesh: Mesh, n_tokens: int | None
) -> jax.stages.Compiled:
    """Compile the training step from shapes alone, so that the mesh's devices need not exist.

    Args:
        n_tokens: of a corpus stored on the devices; None for a larger one, whose windows are sent.
    """

    def array(shape, dtype, placement):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)

    rows = sharding.by_rows(mesh, axis=1)
    shape, dtype = (config.gradient_accumulation_steps, config.batch_size), token_dtype(config)
    if n_tokens is None:
        windows = array((*shape, config.model.block_size + 1), dtype, rows)
        batch = data.Batch(None, windows)  # type: ignore[arg-type]  # a shape, not an array
    else:
        corpus = array((n_tokens,), dtype, sharding.replicated(mesh))
        batch = data.Batch(corpus, array(shape, jnp.int32, rows))  # type: ignore[arg-type]
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jitted.train_step.lower(jitted.abstract_state, batch, key).compile()
