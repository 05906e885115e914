"""Updates and evaluations: one dispatch against many, micro-batches against one batch."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanogpt_jax import data, steps
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer

V, T = 11, 8
KEY = jax.random.key(3)


@pytest.fixture
def model(model_config):
    return GPT(dataclasses.replace(model_config, n_layer=1))


@pytest.fixture
def dropout_model(model_config):
    return GPT(dataclasses.replace(model_config, n_layer=1, dropout=0.3))


@pytest.fixture
def tx(tiny_config):
    return make_optimizer(tiny_config.optim, tiny_config.max_iters)


def new_state(model, tx):
    """A state as `init_state` makes it, but from NumPy: that saves a compilation a test."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(partial(steps.init_state, model, tx), KEY)
    params = jax.tree.map(lambda x: rng.normal(0.1, 0.1, x.shape).astype(x.dtype), abstract.params)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    return jax.tree.map(jnp.asarray, zeros._replace(params=params))


def new_params(model):
    return new_state(model, optax.identity()).params


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


def assert_close(tree, other, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), tree, other)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_init_is_a_function_of_the_key(model, tx):
    init_state = jax.jit(partial(steps.init_state, model, tx))
    first, again, other = (init_state(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first.step == 0
    assert_equal(first.params, again.params)
    kernels = [s.params["h_0"]["attn"]["c_attn"]["kernel"] for s in (first, other)]
    assert (kernels[0] != kernels[1]).all()


def test_streams_of_a_seed_differ():
    weights_key, dropout_key = map(jax.random.key_data, steps.stream_keys(5))
    other_weights_key, _ = map(jax.random.key_data, steps.stream_keys(6))
    assert (weights_key != dropout_key).any()
    assert (weights_key != other_weights_key).any()


def test_loss_at_the_start_is_that_of_a_blind_guess(model):
    params = jax.jit(partial(steps.init_params, model))(jax.random.key(0))
    losses_BT = jax.jit(partial(steps.token_losses, model))(params, random_ids(40, T + 1))
    assert losses_BT.shape == (40, T)
    assert losses_BT.mean() == pytest.approx(math.log(V), abs=0.05)


def test_each_position_is_scored_on_the_token_after_it(model):
    params = new_params(model)
    batch_BT1 = random_ids(2, T + 1)
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, batch_BT1[:, :T])
    losses_BT = jax.jit(partial(steps.token_losses, model))(params, batch_BT1)
    for b, t in np.ndindex(2, T):
        logits = np.asarray(logits_BTV[b, t], np.float64)
        expected = np.log(np.exp(logits).sum()) - logits[batch_BT1[b, t + 1]]
        assert float(losses_BT[b, t]) == pytest.approx(expected, abs=1e-6)


def test_micro_batches_equal_one_batch(model):
    tx = optax.sgd(1.0)  # parameters move by just the gradient
    state = new_state(model, tx)
    batch_ABT1 = random_ids(3, 4, T + 1)
    step = jax.jit(partial(steps.train_step, model, tx))
    in_parts = step(state, batch_ABT1, KEY)
    at_once = step(state, batch_ABT1.reshape(1, 12, T + 1), KEY)
    assert_close(in_parts, at_once, rtol=1e-6, atol=1e-6)


def test_metrics_are_those_before_the_update_and_before_clipping(model):
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state = new_state(model, tx)
    batch_ABT1 = random_ids(1, 4, T + 1)
    after, metrics = jax.jit(partial(steps.train_step, model, tx))(state, batch_ABT1, KEY)

    def mean_loss(params):
        return steps.token_losses(model, params, batch_ABT1[0]).mean()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    norm = math.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert float(metrics.loss) == pytest.approx(float(loss), abs=1e-6)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert after.step == 1
    clipped = jax.tree.map(lambda p, g: p - g / norm * 1e-3, state.params, grads)
    assert_close(after.params, clipped, atol=1e-7)


class TestManyStepsInOneDispatch:
    """A run of any rhythm is the same run: what makes resuming exact."""

    @pytest.fixture
    def setup(self, dropout_model, tx):
        train_steps = jax.jit(partial(steps.train_steps, dropout_model, tx))
        state = new_state(dropout_model, tx)
        tokens = random_ids(200).astype(np.uint16)
        offsets_NAB = np.random.default_rng(1).integers(0, 200 - T, (7, 2, 3), np.int32)
        return train_steps, state, tokens, offsets_NAB

    def test_equal_as_many_dispatches_of_one_bit_for_bit(self, setup):
        train_steps, state, tokens, offsets_NAB = setup
        together, metrics = train_steps(state, tokens, offsets_NAB, np.int32(5), KEY)
        losses = []
        for i in range(5):
            rolled_NAB = np.roll(offsets_NAB, -i, axis=0)
            state, one = train_steps(state, tokens, rolled_NAB, np.int32(1), KEY)
            losses.append(one.loss[0])
        np.testing.assert_array_equal(metrics.loss[:5], losses)
        assert_equal(together, state)

    def test_equal_calls_of_train_step(self, setup, dropout_model, tx):
        """Another program, compiled apart: equal but for the rounding of fused operations."""
        train_steps, state, tokens, offsets_NAB = setup
        together, metrics = train_steps(state, tokens, offsets_NAB, np.int32(5), KEY)
        step = jax.jit(partial(steps.train_step, dropout_model, tx))
        for i in range(5):
            batch_ABT1 = np.array(
                [[tokens[o : o + T + 1] for o in row] for row in offsets_NAB[i]], np.int32
            )
            state, one = step(state, batch_ABT1, KEY)
            assert_close(one, jax.tree.map(lambda x, i=i: x[i], metrics), atol=1e-5)
        assert state.step == together.step
        assert_close(state.params, together.params, atol=1e-4)

    def test_one_compilation_serves_any_number(self, setup):
        train_steps, state, tokens, offsets_NAB = setup
        for n in (0, 1, 4, 7):
            after, metrics = train_steps(state, tokens, offsets_NAB, np.int32(n), KEY)
            assert after.step == n
            assert ((metrics.loss > 0) == (np.arange(7) < n)).all()
        assert train_steps._cache_size() == 1


def test_dropout_is_a_function_of_seed_step_and_micro_batch(dropout_model):
    """With a learning rate of 0 nothing else can tell two calls apart."""
    tx = optax.sgd(0.0)
    state = new_state(dropout_model, tx)
    step = jax.jit(partial(steps.train_step, dropout_model, tx))
    batch_ABT1 = random_ids(2, 4, T + 1)

    def loss(at_step, seed=0, batch_ABT1=batch_ABT1):
        _, dropout_key = steps.stream_keys(seed)
        return float(step(state._replace(step=jnp.int32(at_step)), batch_ABT1, dropout_key)[1].loss)

    assert loss(4) == loss(4)
    assert loss(4) != loss(5)
    assert loss(4) != loss(4, seed=1)
    assert loss(4) != loss(4, batch_ABT1=batch_ABT1[::-1])


@pytest.mark.parametrize("n_tokens", [T + 1, T + 2, 2 * T + 1, 137])
def test_evaluation_is_the_plain_mean_over_the_whole_split(model, n_tokens):
    """Ragged end included: each token but the first is predicted exactly once."""
    params = new_params(model)
    tokens = random_ids(n_tokens).astype(np.uint16)
    batches = data.eval_batches(tokens, T, batch_size=3)
    sums, counts = jax.jit(partial(steps.eval_steps, model))(params, tokens, *batches)
    token_losses = jax.jit(partial(steps.token_losses, model))
    losses, predicted = [], 0
    while predicted < n_tokens - 1:
        left = min(T, n_tokens - 1 - predicted)
        end = predicted + left + 1
        window_BT1 = tokens[None, end - T - 1 : end].astype(np.int32)
        losses += token_losses(params, window_BT1)[0, -left:].tolist()
        predicted += left
    assert len(losses) == n_tokens - 1 == sum(counts)
    assert float(sum(sums) / sum(counts)) == pytest.approx(np.mean(losses), abs=1e-6)


def test_four_devices_compute_what_one_does(dropout_model):
    """Dropout's masks too: the random bits do not depend on where the rows lie."""
    tx = optax.sgd(1.0)
    state = new_state(dropout_model, tx)
    batch_ABT1 = random_ids(2, 8, T + 1)
    step = jax.jit(partial(steps.train_step, dropout_model, tx))
    on_one = step(state, batch_ABT1, KEY)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows_apart = NamedSharding(mesh, PartitionSpec(None, "data"))
    on_four = step(
        jax.device_put(state, everywhere),
        jax.device_put(batch_ABT1, rows_apart),
        jax.device_put(KEY, everywhere),
    )
    assert len(on_four[1].loss.devices()) == 4
    assert_close(on_four, on_one, rtol=1e-6, atol=1e-6)
