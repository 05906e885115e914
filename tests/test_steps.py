"""Updates and evaluations: one dispatch against many, micro-batches against one batch."""

import dataclasses
import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanogpt_jax import data, steps
from nanogpt_jax.config import ModelConfig, OptimConfig
from nanogpt_jax.hardware.devices import Compute
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
    init_key, dropout_key = map(jax.random.key_data, steps.stream_keys(5))
    other_weights_key, _ = map(jax.random.key_data, steps.stream_keys(6))
    assert (init_key != dropout_key).any()
    assert (init_key != other_weights_key).any()


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


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("n_micro", [1, 2])
def test_no_update_is_made_of_a_loss_or_gradient_that_is_not_finite(
    model, tx, bad, n_micro, monkeypatch
):
    """One of the micro-batches has it; the state must stay fit to be looked at, and resumed."""
    state = new_state(model, tx)

    def token_losses(model, params, batch_BT1, key):
        x = params["wte"]["embedding"].sum() * (batch_BT1[0, 0] - 1)  # 0 in a batch of ones
        return jnp.log(x * x) if bad == "loss" else jnp.sqrt(jnp.abs(x))

    monkeypatch.setattr(steps, "token_losses", token_losses)
    batch_ABT1 = np.full((n_micro, 1, T + 1), 2)
    batch_ABT1[0] = 1
    after, metrics = jax.jit(partial(steps.train_step, model, tx))(state, batch_ABT1, KEY)
    assert np.isfinite(metrics.loss) == (bad != "loss")
    assert not np.isfinite(metrics.grad_norm)
    assert after.step == 1
    assert after.skipped == 0  # float16 alone goes on
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=state.step), state)


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
    n = len(batches[0])
    eval_steps = jax.jit(partial(steps.eval_steps, model))
    sums, counts = eval_steps(params, tokens, *batches, 0, n)
    parts = [eval_steps(params, tokens, *batches, *part) for part in ((0, 1), (1, n - 1))]
    for whole, first, rest in zip((sums, counts), *parts, strict=True):
        np.testing.assert_array_equal(first + rest, whole)  # in two dispatches the same
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


# Other ways to compute the same


def computed(model, **compute):
    """The same model, computed so."""
    return GPT(model.config, Compute(**compute))


def with_loss_scale(state, scale):
    return state._replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(scale)))


def losses_and_grads(model, params, batch_BT1, key=None):
    """(losses_BT, gradients), of a sum of the losses that tells them all apart."""
    weights_BT = np.random.default_rng(5).normal(size=(batch_BT1.shape[0], T))

    def weighted_loss(params):
        losses_BT = steps.token_losses(model, params, batch_BT1, key)
        return (losses_BT * weights_BT).sum(), losses_BT

    (_, losses_BT), grads = jax.jit(jax.value_and_grad(weighted_loss, has_aux=True))(params)
    return losses_BT, grads


@pytest.mark.parametrize("n_chunks", [2, 4, 8])
def test_chunks_of_the_context_give_the_same_losses_and_gradients(model, n_chunks):
    params, batch_BT1 = new_params(model), random_ids(3, T + 1)
    whole = losses_and_grads(model, params, batch_BT1)
    in_chunks = losses_and_grads(computed(model, loss_chunks=n_chunks), params, batch_BT1)
    assert_close(in_chunks, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_logits_exist_only_for_a_chunk_at_a_time(model_config, n_chunks):
    B, V = 9, 57  # a number that is no other size here
    model = GPT(dataclasses.replace(model_config, vocab_size=V), Compute(loss_chunks=n_chunks))
    tx = optax.sgd(1.0)
    state = jax.eval_shape(partial(steps.init_state, model, tx), KEY)
    batch_ABT1 = jax.ShapeDtypeStruct((1, B, T + 1), jnp.int32)
    text = jax.jit(partial(steps.train_step, model, tx)).lower(state, batch_ABT1, KEY).as_text()
    shapes = [[int(n) for n in shape.split("x")] for shape in re.findall(r"<([\dx]+)xf32>", text)]
    assert max(math.prod(shape) for shape in shapes if V in shape) == B * T * V / n_chunks


def test_remat_gives_the_same_losses_and_gradients(dropout_model):
    """With dropout: the second time the same weights are dropped."""
    params, batch_BT1 = new_params(dropout_model), random_ids(3, T + 1)
    key = jax.random.key(3, impl="rbg")  # of this kind for its quick compilation
    plain = losses_and_grads(dropout_model, params, batch_BT1, key)
    again = losses_and_grads(computed(dropout_model, remat=True), params, batch_BT1, key)
    assert_close(again, plain, rtol=1e-6, atol=1e-6)


def test_remat_keeps_less_for_the_backward_pass(model_config):
    """The more layers, the less: of each only its input."""

    def kept_bytes(n_layer, remat):
        model = GPT(dataclasses.replace(model_config, n_layer=n_layer), Compute(remat=remat))
        params = jax.eval_shape(partial(steps.init_params, model), KEY)
        batch_BT1 = jax.ShapeDtypeStruct((64, T + 1), jnp.int32)

        def backward(params, batch_BT1):
            return jax.vjp(lambda p: steps.token_losses(model, p, batch_BT1), params)[1]

        kept = jax.tree.leaves(jax.eval_shape(backward, params, batch_BT1))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)

    params_bytes = 4 * (12 * 12**2 + 2 * 12)
    inputs_bytes = 4 * 64 * T * 12
    more_bytes = kept_bytes(3, remat=True) - kept_bytes(2, remat=True)
    assert inputs_bytes <= more_bytes <= inputs_bytes + 2 * params_bytes
    assert kept_bytes(3, remat=True) < 0.2 * kept_bytes(3, remat=False)


N_STEPS = 30
PLAIN = GPT(ModelConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=12))
ADAMW = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_iters=0), N_STEPS)


@pytest.fixture(scope="module")
def train():
    """train(n, dtype, loss_scale) makes n <= 30 steps: (state before, state, metrics)."""
    tokens = (np.arange(200) % V).astype(np.uint16)
    offsets_NAB = np.random.default_rng(1).integers(0, 200 - T, (N_STEPS, 2, 4), np.int32)

    @functools.cache
    def program(dtype):
        model = computed(PLAIN, dtype=jnp.dtype(dtype))
        return jax.jit(partial(steps.train_steps, model, ADAMW))

    @functools.cache
    def train(n, dtype, loss_scale=2**16):
        before = with_loss_scale(steps.first_state(ADAMW, new_params(PLAIN)), loss_scale)
        return before, *program(dtype)(before, tokens, offsets_NAB, np.int32(n), KEY)

    return train


class TestSixteenBits:
    """Activations of 16 bits; parameters, optimizer and metrics stay float32."""

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_run_is_that_of_float32_within_two_percent(self, train, dtype):
        _, _, exact = train(N_STEPS, "float32")
        _, after, metrics = train(N_STEPS, dtype)
        np.testing.assert_allclose(metrics.loss, exact.loss, rtol=0.02)
        assert (metrics.loss != exact.loss).any()
        assert metrics.loss[-1] < metrics.loss[0] - 0.2
        assert after.skipped == 0
        assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {"float32", "int32"}
        assert {leaf.dtype.name for leaf in metrics} == {"float32", "int32"}

    def test_a_step_whose_gradient_overflows_changes_nothing_but_the_scale(self, train):
        before, after, metrics = train(1, "float16", loss_scale=1e38)
        assert_equal(after.params, before.params)
        assert_equal(after.opt_state, before.opt_state)
        # Once, though both micro-batches overflow.
        assert after.loss_scale.scale == np.float32(1e38) / 2
        assert (after.step, after.skipped, metrics.skipped[0]) == (1, 1, 1)
        assert np.isfinite(metrics.loss[0])

    def test_after_an_overflow_the_run_recovers(self, train):
        _, after, metrics = train(N_STEPS, "float16", loss_scale=2**30)
        is_skipped = np.diff(metrics.skipped, prepend=0) == 1
        assert 2 <= is_skipped.sum() == after.skipped <= 15
        assert is_skipped[:2].all()
        np.testing.assert_array_equal(np.isfinite(metrics.grad_norm), ~is_skipped)
        assert after.opt_state[1][0].count == N_STEPS - after.skipped
        assert metrics.loss[-1] < metrics.loss[0] - 0.2

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_scale_is_of_no_account_in_other_types(self, train, dtype):
        before, after, _ = train(2, dtype, loss_scale=1e38)
        assert_equal(after.loss_scale, before.loss_scale)
        assert after.skipped == 0
        assert_equal(after.params, train(2, dtype)[1].params)

    def test_one_micro_batch_that_overflows_skips_the_whole_update(self):
        state = steps.first_state(ADAMW, new_params(PLAIN))
        model = computed(PLAIN, dtype=jnp.float16)
        step = jax.jit(partial(steps.train_step, model, ADAMW))

        def after(scale, *micro_batches):
            return step(with_loss_scale(state, scale), np.stack(micro_batches), KEY)[0]

        mild, steep = random_ids(4, T + 1), np.full((4, T + 1), 3)  # all gradients of one sign
        scale = next(
            2.0**n
            for n in range(10, 40)
            if after(2.0**n, *3 * [steep]).skipped and not after(2.0**n, *3 * [mild]).skipped
        )
        for micro_batches in ((steep, mild, mild), (mild, steep, mild), (mild, mild, steep)):
            skipping = after(scale, *micro_batches)
            assert_equal(skipping.params, state.params)
            assert_equal(skipping.opt_state, state.opt_state)
            assert (skipping.skipped, skipping.loss_scale.scale) == (1, scale / 2)
