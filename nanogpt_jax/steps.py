"""What a run computes, as pure functions of arrays; train.py jits them.

Randomness is a function of (seed, stream, step): nothing random is part of the state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import lax

from nanogpt_jax.devices import Compute
from nanogpt_jax.model import GPT


class TrainState(NamedTuple):
    """All that changes while training; arrays only."""

    step: jax.Array  # int32 scalar: updates done, skipped ones included
    params: dict  # float32, by GPT-2's names
    opt_state: optax.OptState
    loss_scale: DynamicScale  # of float16, whose gradients underflow; unused otherwise
    skipped: jax.Array  # int32 scalar: updates left out since a gradient overflowed float16


class Metrics(NamedTuple):
    """What one update reports."""

    loss: jax.Array  # mean cross-entropy of the update's batch, in nats a token, before the update
    grad_norm: jax.Array  # global norm of the gradient, before clipping
    skipped: jax.Array  # updates skipped so far, this one included


def stream_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Return the keys of a run's two streams on the device: initial weights and dropout."""
    weights_key, dropout_key = jax.random.split(jax.random.key(seed))
    return weights_key, dropout_key


def init_params(model: GPT, key) -> dict:
    """Return new parameters, by GPT-2's names."""
    plain = model.clone(compute=Compute())  # a fused kernel takes no sequence of one token
    return plain.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_state(model: GPT, tx: optax.GradientTransformation, key) -> TrainState:
    """Return the state before the first update, with new parameters."""
    return first_state(tx, init_params(model, key))


def first_state(tx: optax.GradientTransformation, params) -> TrainState:
    """Return the state before the first update of these parameters."""
    loss_scale = DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(2**16))
    return TrainState(jnp.int32(0), params, tx.init(params), loss_scale, jnp.int32(0))


def token_losses(model: GPT, params, batch_BT1, dropout_key=None):
    """Return loss_BT: the cross-entropy of each next token, in nats.

    With loss_chunks > 1 head and loss are computed for one piece of the context after the other,
    and again in the backward pass, so that of logits_BTV only a piece exists at any time.

    Args:
        batch_BT1: T + 1 token ids a row; the first T are read, the last T predicted.
        dropout_key: None for no dropout.
    """
    variables = {"params": params}
    x_BTD, _ = model.apply(
        variables,
        batch_BT1[:, :-1],
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="stream",
    )

    def losses(x_BTD, targets_BT):
        logits_BTV = model.apply(variables, x_BTD, method="head")
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)

    n_chunks = model.compute.loss_chunks
    if n_chunks == 1:
        return losses(x_BTD, batch_BT1[:, 1:])

    def in_chunks(x_BT):  # of the context, not of the rows: those lie on several devices
        B, T = x_BT.shape[:2]
        return jnp.moveaxis(x_BT.reshape(B, n_chunks, T // n_chunks, *x_BT.shape[2:]), 1, 0)

    chunks = in_chunks(x_BTD), in_chunks(batch_BT1[:, 1:])
    losses_CBT = lax.map(lambda chunk: jax.checkpoint(losses)(*chunk), chunks)
    return jnp.moveaxis(losses_CBT, 0, 1).reshape(batch_BT1[:, 1:].shape)


def train_step(
    model: GPT, tx: optax.GradientTransformation, state: TrainState, batch_ABT1, key
) -> tuple[TrainState, Metrics]:
    """Make one update from A micro-batches, one after the other, so memory does not grow with A.

    Of a loss or a gradient that is not finite no update is made: parameters and optimizer stay as
    they were. In float16, whose loss is scaled up before its gradient is taken, that is usual: the
    update is counted as skipped and the scale halved. Source: Micikevicius et al., "Mixed precision
    training", 2018.

    Args:
        batch_ABT1: int32 token ids.
        key: of the dropout stream; the step and the micro-batch are folded in here.
    """
    n_micro = batch_ABT1.shape[0]
    step_key = jax.random.fold_in(key, state.step)
    is_scaled = model.compute.dtype == jnp.float16

    def mean_loss(params, batch_BT1, micro_key):
        return token_losses(model, params, batch_BT1, micro_key).mean()

    def accumulate(total, micro):
        batch_BT1, index = micro
        inputs = state.params, batch_BT1, jax.random.fold_in(step_key, index)
        if is_scaled:
            scaled = state.loss_scale.value_and_grad(mean_loss)(*inputs)
            loss_and_grads = scaled.aux, scaled.grad
        else:
            loss_and_grads = jax.value_and_grad(mean_loss)(*inputs)
        return jax.tree.map(jnp.add, total, loss_and_grads), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
    total, _ = lax.scan(accumulate, zeros, (batch_ABT1, jnp.arange(n_micro)))
    loss, grads = jax.tree.map(lambda x: x / n_micro, total)
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    loss_scale, skipped = state.loss_scale, state.skipped
    if is_scaled:
        # It adjusts itself by the gradient that it sees: once an update, one as finite as all were.
        seen = jnp.where(is_finite, 1.0, jnp.nan)
        loss_scale = loss_scale.value_and_grad(lambda x: x * seen)(jnp.float32(0)).dynamic_scale
        skipped += ~is_finite
    metrics = Metrics(loss, grad_norm, skipped)
    return TrainState(state.step + 1, params, opt_state, loss_scale, skipped), metrics


def read_windows(corpus, places, length: int):
    """Return windows of ids, int32 of shape (..., length).

    Args:
        corpus: ids, of shape (n_tokens,), or None.
        places: where in it the windows begin, of shape (...); without a corpus, the windows.
    """
    if corpus is None:
        return places.astype(jnp.int32)
    flat = jax.vmap(lambda offset: lax.dynamic_slice(corpus, (offset,), (length,)))(
        places.reshape(-1)
    )
    return flat.astype(jnp.int32).reshape(*places.shape, length)


def train_steps(
    model: GPT, tx: optax.GradientTransformation, state: TrainState, corpus, places_NAB, n, key
) -> tuple[TrainState, Metrics]:
    """Make n <= N updates in one dispatch.

    n is an argument of the compiled program, not a part of it: one compilation serves any number
    of steps, so a run stops exactly where an evaluation or its end is due.

    Args:
        corpus, places_NAB: the batches of N updates, see `read_windows`.
        n: int32 scalar.

    Returns:
        The state and Metrics of shape (N,), of which the first n are filled.
    """
    length = model.config.block_size + 1

    def body(i, carry):
        state, metrics = carry
        batch_ABT1 = read_windows(corpus, places_NAB[i], length)
        state, now = train_step(model, tx, state, batch_ABT1, key)
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, now)

    unfilled = jnp.zeros(places_NAB.shape[0])
    metrics = Metrics(unfilled, unfilled, unfilled.astype(jnp.int32))
    return lax.fori_loop(0, n, body, (state, metrics))


def eval_step(model: GPT, params, batch_BT1, counts_B):
    """Return (sum of losses, number of targets) over the last counts_B targets of each row."""
    loss_BT = token_losses(model, params, batch_BT1)
    T = loss_BT.shape[1]
    counted_BT = jnp.arange(T)[None, :] >= T - counts_B[:, None]
    return jnp.where(counted_BT, loss_BT, 0).sum(), counts_B.sum()


def eval_steps(model: GPT, params, corpus, places_NB, counts_NB, first, n):
    """Return (sums, counts), each of shape (N,): `eval_step` over n of N batches in one dispatch.

    As in `train_steps`, one compilation serves any number of batches.

    Args:
        corpus, places_NB: the batches, see `read_windows`.
        first, n: int32 scalars: n batches from `first` on are evaluated, the others are 0.
    """
    length = model.config.block_size + 1

    def body(i, found):
        batch_BT1 = read_windows(corpus, places_NB[i], length)
        of_batch = eval_step(model, params, batch_BT1, counts_NB[i])
        return jax.tree.map(lambda all_, one: all_.at[i].set(one), found, of_batch)

    none = jnp.zeros(counts_NB.shape[0]), jnp.zeros(counts_NB.shape[0], counts_NB.dtype)
    return lax.fori_loop(first, first + n, body, none)
