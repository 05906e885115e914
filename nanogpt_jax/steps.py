"""What a run computes, as pure functions of arrays; train.py jits them.

Randomness is a function of (seed, stream, step): nothing random is part of the state.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import lax

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.data import Batch, EvalLoader, gather
from nanogpt_jax.hardware.products import pick
from nanogpt_jax.model import GPT, Compute, Model
from nanogpt_jax.optim import Optimizer


class TrainState(NamedTuple):
    """Everything that changes during training; arrays only."""

    step: jax.Array  # int32 scalar: updates done, skipped ones included
    params: dict  # float32, by GPT-2's names
    opt_state: optax.OptState
    loss_scale: DynamicScale  # for float16, whose gradients underflow; otherwise unused
    skipped: jax.Array  # int32 scalar: updates skipped because a gradient overflowed float16


class Metrics(NamedTuple):
    """What one update reports; scalars."""

    loss: jax.Array  # mean cross-entropy of the update's batch before the update, nats per token
    grad_norm: jax.Array  # global norm of the gradient, before clipping
    skipped: jax.Array  # updates skipped so far, this one included
    learning_rate: jax.Array


def make_model(config: ModelConfig, compute: Compute | None = None) -> Model:
    """Return the model of a configuration: the GPT, or one of the lecture's models."""
    if config.architecture == "gpt":
        return GPT(config, compute or Compute())
    from nanogpt_jax.lecture.models import MODELS  # a GPT does not need them

    return MODELS[config.architecture](config, compute or Compute())


def stream_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Return the keys of a run's random streams on the device: initial weights; dropout, noise."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    return init_key, dropout_key


def init_params(model: Model, key) -> dict:
    """Return new parameters, by GPT-2's names."""
    plain = model.clone(compute=Compute())  # a fused kernel cannot take a sequence of one token
    return plain.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_state(tx: Optimizer, params) -> TrainState:
    """Return the state before the first update of these parameters."""
    loss_scale = DynamicScale().replace(fin_steps=jnp.int32(0), scale=jnp.float32(2**16))
    return TrainState(jnp.int32(0), params, tx.init(params), loss_scale, jnp.int32(0))


def new_state(model: Model, tx: Optimizer, key) -> TrainState:
    """Return the state before the first update of new parameters."""
    return init_state(tx, init_params(model, key))


def add_noise(tokens_BT, rate: float, n_tokens: int, key):
    """Replace tokens with random ones at this rate.

    Source: Xie et al., "Data noising as smoothing in neural network language models", 2017.
    """
    where_key, token_key = jax.random.split(key)
    is_noise_BT = jax.random.bernoulli(where_key, rate, tokens_BT.shape)
    noise_BT = jax.random.randint(token_key, tokens_BT.shape, 0, n_tokens)
    return jnp.where(is_noise_BT, noise_BT, tokens_BT)


def token_losses(model: Model, params, batch_BT1, dropout_key=None):
    """Return loss_BT: the cross-entropy of each next token, in nats.

    With loss_chunks > 1, the head and the loss are computed for one piece of the context at a time,
    and again in the backward pass, so that only a piece of logits_BTV exists at any time.

    Args:
        batch_BT1: T + 1 token ids a row; the first T are read, the last T predicted.
        dropout_key: None for no dropout, and no noise in the tokens read.
    """
    variables, config, tokens_BT = {"params": params}, model.config, batch_BT1[:, :-1]
    if dropout_key is not None and config.token_noise > 0:
        n_tokens = config.known_tokens or config.vocab_size or 0
        noise_key = jax.random.fold_in(dropout_key, 1)
        tokens_BT = add_noise(tokens_BT, config.token_noise, n_tokens, noise_key)
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    x_BTD, _ = model.apply(
        variables, tokens_BT, deterministic=dropout_key is None, rngs=rngs, method="hidden_states"
    )

    def losses(x_BTD, targets_BT):
        logits_BTV = model.apply(variables, x_BTD, method="head")
        if model.compute.dtype == jnp.float32:  # a CPU scatters as fast as it compares
            return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        return jax.nn.logsumexp(logits_BTV, axis=-1) - pick(logits_BTV, targets_BT)

    n_chunks = model.compute.loss_chunks
    if n_chunks == 1:
        return losses(x_BTD, batch_BT1[:, 1:])

    def in_chunks(x_BT):  # of the context, not of the rows, which are spread over devices
        B, T = x_BT.shape[:2]
        return jnp.moveaxis(x_BT.reshape(B, n_chunks, T // n_chunks, *x_BT.shape[2:]), 1, 0)

    chunks = in_chunks(x_BTD), in_chunks(batch_BT1[:, 1:])
    losses_CBT = lax.map(lambda chunk: jax.checkpoint(losses)(*chunk), chunks)
    return jnp.moveaxis(losses_CBT, 0, 1).reshape(batch_BT1[:, 1:].shape)


def train_step(
    model: Model, tx: Optimizer, state: TrainState, batch_ABT1, key
) -> tuple[TrainState, Metrics]:
    """Make one update from A micro-batches, one after another, so memory does not grow with A.

    If the loss or the gradient is not finite, the update is skipped: parameters and optimizer stay
    as they were. In float16, whose loss is scaled up before its gradient is taken, that is normal:
    the skipped update is counted and the scale halved. Source: Micikevicius et al., "Mixed
    precision training", 2018.

    Args:
        batch_ABT1: int32 token ids.
        key: the dropout stream's; the step and the micro-batch are folded in here.
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
        # DynamicScale adjusts to the gradient it is shown: once per update, one that is as finite.
        probe = jnp.where(is_finite, 1.0, jnp.nan)
        loss_scale = loss_scale.value_and_grad(lambda x: x * probe)(jnp.float32(0)).dynamic_scale
        skipped += ~is_finite
    # Without the barriers, XLA rounds this copy of the rate differently for another N in a call.
    count = lax.optimization_barrier(state.step - state.skipped)
    metrics = Metrics(loss, grad_norm, skipped, lax.optimization_barrier(tx.learning_rate(count)))
    return TrainState(state.step + 1, params, opt_state, loss_scale, skipped), metrics


def train_steps(
    model: Model, tx: Optimizer, state: TrainState, batch: Batch, key
) -> tuple[TrainState, Metrics]:
    """Make an update for each of the N steps of a batch: `train_step`, N times in one `lax.scan`.

    N is 1, except for models so small that a call costs as much as an update: on a CPU XLA
    allocates a function's buffers at each call, which takes a third of a step of `small`.

    Returns:
        The state, and Metrics of shape (N,).
    """

    def one(state, windows):
        batch_ABT1 = gather(batch._replace(windows=windows), model.config.block_size + 1)
        return train_step(model, tx, state, batch_ABT1, key)

    return lax.scan(one, state, batch.windows)


def eval_step(model: Model, params, batch_BT1, counts_B):
    """Return (sum of losses, number of targets) over the last counts_B targets of each row."""
    loss_BT = token_losses(model, params, batch_BT1)
    T = loss_BT.shape[1]
    counted_BT = jnp.arange(T)[None, :] >= T - counts_B[:, None]
    return jnp.where(counted_BT, loss_BT, 0).sum(), counts_B.sum()


def eval_batch(model: Model, params, batch: Batch, counts_B):
    """Return what `eval_step` returns, for the windows of a batch."""
    batch_BT1 = gather(batch, model.config.block_size + 1)
    return eval_step(model, params, batch_BT1, counts_B)


def evaluate(
    eval_step: Callable,
    params,
    batches: EvalLoader,
    should_stop: Callable[[float], bool] = lambda share: False,
) -> float | None:
    """Return the mean loss over all targets of some batches, in nats per token.

    Exact whatever the batches: sums and counts are added up on the host, in float64.

    Args:
        eval_step: compiled, (params, batch, counts_B) -> (sum of losses, number of targets).
        should_stop: asked before each batch, with the share done; if it says yes, return None.
    """
    total, pending = np.zeros(2), None
    for i, batch in enumerate(batches):
        if should_stop(i / len(batches)):
            return None
        previous, pending = pending, eval_step(params, *batch)
        if previous is not None:  # one behind, so that the device never waits for the host
            total += jax.device_get(previous)
    loss, n_targets = total + jax.device_get(pending)
    return float(loss / n_targets)
