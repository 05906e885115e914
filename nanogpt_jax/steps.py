"""What a run computes, as pure functions of arrays; train.py jits them.

Randomness is a function of (seed, stream, step): nothing random is part of the state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from nanogpt_jax.model import GPT


class TrainState(NamedTuple):
    """All that changes while training; arrays only."""

    step: jax.Array  # int32 scalar: updates done
    params: dict  # float32, by GPT-2's names
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """What one update reports, float32."""

    loss: jax.Array  # mean cross-entropy of the update's batch, in nats a token, before the update
    grad_norm: jax.Array  # global norm of the gradient, before clipping


def stream_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Return the keys of a run's two streams on the device: initial weights and dropout."""
    weights_key, dropout_key = jax.random.split(jax.random.key(seed))
    return weights_key, dropout_key


def init_params(model: GPT, key) -> dict:
    """Return new parameters, by GPT-2's names."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_state(model: GPT, tx: optax.GradientTransformation, key) -> TrainState:
    """Return the state before the first update."""
    params = init_params(model, key)
    return TrainState(jnp.int32(0), params, tx.init(params))


def token_losses(model: GPT, params, batch_BT1, dropout_key=None):
    """Return loss_BT: the cross-entropy of each next token, in nats.

    Args:
        batch_BT1: T + 1 token ids a row; the first T are read, the last T predicted.
        dropout_key: None for no dropout.
    """
    logits_BTV, _ = model.apply(
        {"params": params},
        batch_BT1[:, :-1],
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch_BT1[:, 1:])


def train_step(
    model: GPT, tx: optax.GradientTransformation, state: TrainState, batch_ABT1, key
) -> tuple[TrainState, Metrics]:
    """Make one update from A micro-batches, one after the other, so memory does not grow with A.

    Args:
        batch_ABT1: int32 token ids.
        key: of the dropout stream; the step and the micro-batch are folded in here.
    """
    n_micro = batch_ABT1.shape[0]
    step_key = jax.random.fold_in(key, state.step)

    def mean_loss(params, batch_BT1, micro_key):
        return token_losses(model, params, batch_BT1, micro_key).mean()

    def accumulate(total, micro):
        batch_BT1, index = micro
        micro_key = jax.random.fold_in(step_key, index)
        loss_and_grads = jax.value_and_grad(mean_loss)(state.params, batch_BT1, micro_key)
        return jax.tree.map(jnp.add, total, loss_and_grads), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
    total, _ = lax.scan(accumulate, zeros, (batch_ABT1, jnp.arange(n_micro)))
    loss, grads = jax.tree.map(lambda x: x / n_micro, total)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), Metrics(loss, optax.tree.norm(grads))


def windows(tokens, offsets, length: int):
    """Gather windows of ids: from offsets of shape (...) to int32 ids of shape (..., length)."""
    flat = jax.vmap(lambda offset: lax.dynamic_slice(tokens, (offset,), (length,)))(
        offsets.reshape(-1)
    )
    return flat.astype(jnp.int32).reshape(*offsets.shape, length)


def train_steps(
    model: GPT, tx: optax.GradientTransformation, state: TrainState, tokens, offsets_NAB, n, key
) -> tuple[TrainState, Metrics]:
    """Make n <= N updates in one dispatch.

    n is an argument of the compiled program, not a part of it: one compilation serves any number
    of steps, so a run stops exactly where an evaluation or its end is due.

    Args:
        tokens: ids, of shape (n_tokens,), in which the windows lie.
        offsets_NAB: where they begin.
        n: int32 scalar.

    Returns:
        The state and Metrics of shape (N,), of which the first n are filled.
    """
    length = model.config.block_size + 1

    def body(i, carry):
        state, metrics = carry
        state, now = train_step(model, tx, state, windows(tokens, offsets_NAB[i], length), key)
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, now)

    unfilled = jnp.zeros(offsets_NAB.shape[0])
    return lax.fori_loop(0, n, body, (state, Metrics(unfilled, unfilled)))


def eval_step(model: GPT, params, batch_BT1, counts_B):
    """Return (sum of losses, number of targets) over the last counts_B targets of each row."""
    loss_BT = token_losses(model, params, batch_BT1)
    T = loss_BT.shape[1]
    counted_BT = jnp.arange(T)[None, :] >= T - counts_B[:, None]
    return jnp.where(counted_BT, loss_BT, 0).sum(), counts_B.sum()


def eval_steps(model: GPT, params, tokens, offsets_NB, counts_NB):
    """Return (sums, counts), each of shape (N,): `eval_step` over N batches in one dispatch."""
    length = model.config.block_size + 1

    def body(_, batch):
        offsets_B, counts_B = batch
        return None, eval_step(model, params, windows(tokens, offsets_B, length), counts_B)

    return lax.scan(body, None, (offsets_NB, counts_NB))[1]
