"""The jitted programs of a run, laid over a mesh: what train.py runs, and what is timed or sized.

Pure functions of steps.py become programs here: only arrays go in, the rest is closed over.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh

from nanogpt_jax import sharding, steps
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.devices import Compute
from nanogpt_jax.mesh import replicated
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.rungs import make_model


class Programs(NamedTuple):
    """The programs of a run, and the shapes and places of its state."""

    model: nn.Module  # the GPT, or a rung of the lecture
    abstract_state: steps.TrainState  # ShapeDtypeStructs, each with its sharding
    init_state: Callable  # (weights_key) -> state
    first_state: Callable  # (params) -> state, of parameters that come from elsewhere
    train_steps: Callable  # (state, corpus, places_NAB, n, dropout_key) -> (state, metrics)
    eval_steps: Callable  # (params, corpus, places_NB, counts_NB, first, n) -> (sums, counts)


def make_programs(config: TrainConfig, compute: Compute, mesh: Mesh) -> Programs:
    """Return the programs of a run; nothing is compiled yet."""
    model = make_model(config.model, compute)
    tx = make_optimizer(config.optim, config.max_iters)
    init_state = partial(steps.init_state, model, tx)
    abstract = jax.eval_shape(init_state, jax.random.key(0))
    places = sharding.tree_shardings(mesh, abstract)
    everywhere = replicated(mesh)
    return Programs(
        model=model,
        abstract_state=sharding.with_shardings(abstract, places),
        init_state=jax.jit(init_state, out_shardings=places),
        first_state=jax.jit(
            partial(steps.first_state, tx), donate_argnames="params", out_shardings=places
        ),
        train_steps=jax.jit(
            partial(steps.train_steps, model, tx),
            donate_argnames="state",  # the new state takes the old one's memory
            out_shardings=(places, everywhere),
        ),
        eval_steps=jax.jit(partial(steps.eval_steps, model), out_shardings=everywhere),
    )


def needed_bytes(compiled) -> int:
    """Return the bytes that a compiled program needs on each device, its inputs included."""
    sizes = compiled.memory_analysis()
    at_once = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes  # donated: the output lies where the input lay
    )
    return max(at_once, sizes.peak_memory_in_bytes)  # a CPU does not know its peak, a TPU does
