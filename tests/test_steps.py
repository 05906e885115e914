"""Losses, updates and evaluations."""

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

from nanogpt_jax import data, steps
from nanogpt_jax.config import ModelConfig, OptimConfig
from nanogpt_jax.hardware.products import pick
from nanogpt_jax.model import GPT, Compute
from nanogpt_jax.optim import Optimizer, make_optimizer
from nanogpt_jax.sharding import make_mesh, replicated

V, T = 11, 8
KEY = jax.random.key(3)
CONFIG = ModelConfig(block_size=T, vocab_size=V, n_layer=1, n_head=2, n_embd=12)
MODEL = GPT(CONFIG)
DROPOUT_MODEL = GPT(dataclasses.replace(CONFIG, dropout=0.3))
NOISE_MODEL = GPT(dataclasses.replace(CONFIG, token_noise=0.3))
N_STEPS = 30
ADAMW = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_iters=0), N_STEPS)

train_step = jax.jit(steps.train_step, static_argnums=(0, 1))
token_losses = jax.jit(steps.token_losses, static_argnums=0)


def sgd(learning_rate, *before) -> Optimizer:
    """With a learning rate of 1, parameters move by exactly the gradient."""
    schedule = optax.constant_schedule(learning_rate)
    return Optimizer(*optax.chain(*before, optax.sgd(learning_rate)), schedule)


@functools.cache
def new_params(model=MODEL):
    """Random parameters from NumPy, which needs no compilation."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(partial(steps.init_params, model), KEY)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.1, x.shape), x.dtype), abstract)


def new_state(tx):
    return steps.init_state(tx, new_params())


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


def assert_close(tree, other, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance), tree, other)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


# New parameters and their loss


@pytest.fixture(scope="module")
def init_params():
    return jax.jit(partial(steps.init_params, MODEL))


def test_init_depends_only_on_the_key(init_params):
    first, again, other = (init_params(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_equal(first, again)
    kernels = [params["h_0"]["attn"]["c_attn"]["kernel"] for params in (first, other)]
    assert (kernels[0] != kernels[1]).all()


def test_the_random_streams_of_a_seed_differ():
    init_key, dropout_key = map(jax.random.key_data, steps.stream_keys(5))
    other_init_key, _ = map(jax.random.key_data, steps.stream_keys(6))
    assert (init_key != dropout_key).any()
    assert (init_key != other_init_key).any()


def test_initial_loss_is_that_of_a_uniform_guess(init_params):
    losses_BT = token_losses(MODEL, init_params(jax.random.key(0)), random_ids(40, T + 1))
    assert losses_BT.shape == (40, T)
    assert losses_BT.mean() == pytest.approx(math.log(V), abs=0.05)


def test_each_position_predicts_the_next_token():
    batch_BT1 = random_ids(2, T + 1)
    logits_BTV, _ = jax.jit(MODEL.apply)({"params": new_params()}, batch_BT1[:, :T])
    losses_BT = token_losses(MODEL, new_params(), batch_BT1)
    for b, t in np.ndindex(2, T):
        logits = np.asarray(logits_BTV[b, t], np.float64)
        expected = np.log(np.exp(logits).sum()) - logits[batch_BT1[b, t + 1]]
        assert float(losses_BT[b, t]) == pytest.approx(expected, abs=1e-6)


def equations(jaxpr):
    """Yield all operations of a traced function, in loops and called functions too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                yield from equations(inner)


def traced_step(dtype, **model):
    model = GPT(dataclasses.replace(CONFIG, **model), Compute(jnp.dtype(dtype)))
    step = partial(steps.train_step, model, ADAMW)
    state = jax.eval_shape(lambda: steps.init_state(ADAMW, new_params(model)))
    return [*equations(jax.make_jaxpr(step)(state, random_ids(2, 3, T + 1), KEY).jaxpr)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", [{"dropout": 0.2}, {"tied_head": False, "attention_window": 4}])
def test_16_bit_training_multiplies_no_float32_matrices(dtype, model):
    """In a backward pass too: that would take twice the time, or eight times on a T4."""
    products = [eqn for eqn in traced_step(dtype, **model) if eqn.primitive.name == "dot_general"]
    assert len(products) >= 3 * 7  # of one layer and the head, forward and backward
    assert {str(x.aval.dtype) for eqn in products for x in eqn.invars} == {dtype}


def test_the_gradient_of_16_bit_training_scatters_no_logits():
    scattered = {
        eqn.outvars[0].aval.shape
        for eqn in traced_step("bfloat16")
        if eqn.primitive.name.startswith("scatter")
    }
    assert scattered == {(V, 12), (T, 12)}  # those of the embeddings


def test_picking_logits_has_the_gradient_of_a_gather():
    logits_BTV, targets_BT = jax.random.normal(KEY, (2, 3, V)), random_ids(2, 3)
    weights_BT = jax.random.normal(jax.random.key(4), (2, 3))

    def gathered(logits_BTV):
        return (logits_BTV[*np.indices((2, 3)), targets_BT] * weights_BT).sum()

    def picked(logits_BTV):
        return (pick(logits_BTV, targets_BT) * weights_BT).sum()

    values = jax.value_and_grad(gathered)(logits_BTV), jax.value_and_grad(picked)(logits_BTV)
    assert_equal(*values)


# Updates


def test_micro_batches_equal_one_batch():
    tx = sgd(1.0)
    batch_ABT1 = random_ids(2, 4, T + 1)
    in_two = train_step(MODEL, tx, new_state(tx), batch_ABT1, KEY)
    in_one = train_step(MODEL, tx, new_state(tx), batch_ABT1.reshape(1, 8, T + 1), KEY)
    assert_close(in_two, in_one, rtol=1e-6, atol=1e-6)


def test_metrics_are_from_before_the_update_and_before_clipping():
    tx = sgd(1.0, optax.clip_by_global_norm(1e-3))._replace(
        learning_rate=lambda count: 0.25 * (count + 1)
    )
    state = new_state(tx)._replace(step=jnp.int32(5), skipped=jnp.int32(2))
    batch_ABT1 = random_ids(1, 4, T + 1)
    after, metrics = train_step(MODEL, tx, state, batch_ABT1, KEY)

    def mean_loss(params):
        return steps.token_losses(MODEL, params, batch_ABT1[0]).mean()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    norm = math.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert float(metrics.loss) == pytest.approx(float(loss), abs=1e-6)
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)
    assert float(metrics.learning_rate) == 1.0  # skipped updates do not count: of update 3
    assert after.step == 6
    clipped = jax.tree.map(lambda p, g: p - g / norm * 1e-3, state.params, grads)
    assert_close(after.params, clipped, atol=1e-7)


def test_several_updates_in_a_call_are_those_of_as_many_calls_bit_for_bit():
    tokens, mesh = random_ids(200).astype(np.uint16), make_mesh()
    step = jax.jit(partial(steps.train_steps, DROPOUT_MODEL, ADAMW))

    def train(n_calls, n_steps):
        state, metrics = jax.device_put(new_state(ADAMW), replicated(mesh)), []
        batches = data.train_batches(tokens, 0, T, (2, 4), mesh, 0, n_steps)
        for _ in range(n_calls):
            state, now = step(state, next(batches), KEY)
            metrics.append(now)
        batches.close()
        return state, jax.tree.map(lambda *xs: np.concatenate(xs), *metrics)

    state, metrics = train(6, 1)
    assert_equal(train(2, 3), (state, metrics))
    assert len(set(metrics.loss.tolist())) == 6


def test_a_resumed_run_is_bit_equal_and_one_compiled_step_serves_it_all():
    tokens, mesh = random_ids(200).astype(np.uint16), make_mesh()

    @partial(jax.jit, out_shardings=replicated(mesh))
    def step(state, batch):
        return steps.train_steps(DROPOUT_MODEL, ADAMW, state, batch, KEY)

    def train(state, n_steps):
        batches = data.train_batches(tokens, 0, T, (2, 4), mesh, int(state.step))
        state, losses = jax.device_put(state, replicated(mesh)), []
        for _ in range(n_steps):
            state, metrics = step(state, next(batches))
            losses.append(metrics.loss[0])
        batches.close()
        return state, losses

    straight, losses = train(new_state(ADAMW), 5)
    halfway, first_losses = train(new_state(ADAMW), 2)
    resumed, last_losses = train(jax.tree.map(np.asarray, halfway), 3)
    assert_equal(resumed, straight)
    assert_equal([*first_losses, *last_losses], losses)
    assert len(set(map(float, losses))) == 5
    assert straight.step == 5
    assert step._cache_size() == 1


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_an_update_is_skipped_if_its_loss_or_gradient_is_not_finite(bad, monkeypatch):
    """It is so in one of the two micro-batches. The state stays usable."""

    def fake_losses(model, params, batch_BT1, key):
        x = params["wte"]["embedding"].sum() * (batch_BT1[0, 0] - 1)  # 0 in a batch of ones
        return jnp.log(x * x) if bad == "loss" else jnp.sqrt(jnp.abs(x))

    monkeypatch.setattr(steps, "token_losses", fake_losses)
    state = new_state(ADAMW)
    batch_ABT1 = np.full((2, 1, T + 1), 2)
    step = jax.jit(partial(steps.train_step, MODEL, ADAMW))
    moved, _ = step(state, batch_ABT1, KEY)
    assert (moved.params["wte"]["embedding"] != state.params["wte"]["embedding"]).all()
    batch_ABT1[0] = 1
    after, metrics = step(state, batch_ABT1, KEY)
    assert np.isfinite(metrics.loss) == (bad != "loss")
    assert not np.isfinite(metrics.grad_norm)
    assert after.step == 1
    assert after.skipped == 0  # only float16 counts them and continues
    assert_equal(after._replace(step=state.step), state)


@pytest.mark.parametrize("model", [DROPOUT_MODEL, NOISE_MODEL])
def test_dropout_and_noise_depend_on_seed_step_and_micro_batch(model):
    """With a learning rate of 0 nothing else can make two losses differ."""
    tx = sgd(0.0)
    state = new_state(tx)
    batch_ABT1 = random_ids(2, 4, T + 1)

    def loss(step, seed=0, batch_ABT1=batch_ABT1):
        _, dropout_key = steps.stream_keys(seed)
        at_step = state._replace(step=jnp.int32(step))
        return float(train_step(model, tx, at_step, batch_ABT1, dropout_key)[1].loss)

    assert loss(4) == loss(4)
    assert loss(4) != loss(5)
    assert loss(4) != loss(4, seed=1)
    assert loss(4) != loss(4, batch_ABT1=batch_ABT1[::-1])


def test_noise_replaces_tokens_at_its_rate_with_any_that_exist():
    tokens_BT = jnp.full((200, 500), 3)
    noisy_BT = np.asarray(steps.add_noise(tokens_BT, 0.2, V - 1, KEY))
    counts = np.bincount(noisy_BT.ravel(), minlength=V) / noisy_BT.size
    # A hundred thousand draws: five standard deviations.
    np.testing.assert_allclose(np.delete(counts, [3, V - 1]), 0.2 / (V - 1), atol=0.0023)
    assert counts[V - 1] == 0
    assert counts[3] == pytest.approx(0.8 + 0.2 / (V - 1), abs=0.0063)


def test_noise_is_read_and_never_predicted(monkeypatch):
    """The targets are the text's own, and an evaluation reads the text as it is."""
    known = []

    def add_noise(tokens_BT, rate, n_tokens, key):
        known.append(n_tokens)
        return (tokens_BT + 1) % V

    monkeypatch.setattr(steps, "add_noise", add_noise)
    params, batch_BT1 = new_params(), random_ids(4, T + 1)
    logits_BTV, _ = MODEL.apply({"params": params}, (batch_BT1[:, :-1] + 1) % V)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch_BT1[:, 1:])
    assert_close(steps.token_losses(NOISE_MODEL, params, batch_BT1, KEY), expected, rtol=1e-5)
    assert_equal(
        steps.token_losses(NOISE_MODEL, params, batch_BT1),
        steps.token_losses(MODEL, params, batch_BT1),
    )
    padded = NOISE_MODEL.clone(config=dataclasses.replace(NOISE_MODEL.config, known_tokens=V - 2))
    steps.token_losses(padded, params, batch_BT1, KEY)
    assert known == [V, V - 2]


# Evaluation


def test_evaluation_is_the_exact_mean_over_the_whole_split(monkeypatch):
    """Each token but the first is predicted exactly once, at a ragged end too."""
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)  # windows of one shape for splits of any length
    params = new_params()

    @jax.jit
    def eval_step(params, batch, counts_B):
        return steps.eval_step(MODEL, params, data.gather(batch, T + 1), counts_B)

    for n_tokens in (T + 1, T + 2, 2 * T + 1, 137):
        tokens = random_ids(n_tokens).astype(np.uint16)
        batches = data.EvalLoader(tokens, T, 3, make_mesh())
        losses, predicted = [], 0
        while predicted < n_tokens - 1:
            left = min(T, n_tokens - 1 - predicted)
            end = predicted + left + 1
            window_BT1 = tokens[None, end - T - 1 : end].astype(np.int32)
            losses += token_losses(MODEL, params, window_BT1)[0, -left:].tolist()
            predicted += left
        assert len(losses) == n_tokens - 1 == batches.n_targets
        loss = steps.evaluate(eval_step, params, batches)
        assert loss == pytest.approx(np.mean(losses), abs=1e-6), n_tokens
    assert eval_step._cache_size() == 1


def test_an_evaluation_reports_its_progress_and_stops_on_request():
    """On a large corpus it takes minutes; Ctrl-C must not wait for its end."""
    batches = data.EvalLoader(random_ids(90).astype(np.uint16), T, 3, make_mesh())
    assert len(batches) == 4
    n_evaluated = 0

    def eval_step(params, batch, counts_B):
        nonlocal n_evaluated
        n_evaluated += 1
        return np.float32(2 * counts_B.sum()), counts_B.sum()

    shares = []
    assert steps.evaluate(eval_step, None, batches, lambda share: shares.append(share)) == 2.0
    assert shares == [0, 0.25, 0.5, 0.75]
    n_evaluated = 0
    assert steps.evaluate(eval_step, None, batches, lambda share: share >= 0.5) is None
    assert n_evaluated == 2


# Other ways to compute the same


def computed(model, **compute):
    """The same model, computed in another way."""
    return GPT(model.config, Compute(**compute))


def losses_and_grads(model, batch_BT1, key=None):
    """(losses_BT, gradients of a weighted sum of them in which no two are alike)."""
    weights_BT = np.random.default_rng(5).normal(size=(batch_BT1.shape[0], T))

    def weighted_loss(params):
        losses_BT = steps.token_losses(model, params, batch_BT1, key)
        return (losses_BT * weights_BT).sum(), losses_BT

    (_, losses_BT), grads = jax.jit(jax.value_and_grad(weighted_loss, has_aux=True))(new_params())
    return losses_BT, grads


def test_loss_chunks_change_neither_losses_nor_gradients():
    batch_BT1 = random_ids(3, T + 1)
    whole = losses_and_grads(MODEL, batch_BT1)
    in_chunks = losses_and_grads(computed(MODEL, loss_chunks=4), batch_BT1)
    assert_close(in_chunks, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_logits_exist_for_one_chunk_at_a_time(n_chunks):
    B, V = 9, 57  # unlike any other size here
    model = GPT(dataclasses.replace(CONFIG, vocab_size=V), Compute(loss_chunks=n_chunks))
    params = jax.eval_shape(partial(steps.init_params, model), KEY)
    batch_BT1 = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)

    def mean_loss(params, batch_BT1):
        return steps.token_losses(model, params, batch_BT1).mean()

    text = jax.jit(jax.value_and_grad(mean_loss)).lower(params, batch_BT1).as_text()
    shapes = [[int(n) for n in shape.split("x")] for shape in re.findall(r"<([\dx]+)xf32>", text)]
    assert max(math.prod(shape) for shape in shapes if V in shape) == B * T * V / n_chunks


@pytest.mark.slow
def test_remat_changes_neither_losses_nor_gradients():
    """The second forward pass drops the same elements as the first."""
    batch_BT1 = random_ids(3, T + 1)
    key = jax.random.key(3, impl="rbg")  # compiles faster
    plain = losses_and_grads(DROPOUT_MODEL, batch_BT1, key)
    again = losses_and_grads(computed(DROPOUT_MODEL, remat=True), batch_BT1, key)
    assert_close(again, plain, rtol=1e-6, atol=1e-6)


def test_remat_keeps_only_each_layers_input_for_the_backward_pass():
    def kept_bytes(n_layer, remat):
        model = GPT(dataclasses.replace(CONFIG, n_layer=n_layer), Compute(remat=remat))
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


# 16-bit activations; parameters, optimizer state and metrics stay float32


@pytest.fixture(scope="module")
def train():
    """train(n, dtype, loss_scale) makes n <= 30 updates: (state before, state, metrics)."""
    tokens = (np.arange(200) % V).astype(np.uint16)
    offsets_NAB = np.random.default_rng(1).integers(0, 200 - T, (N_STEPS, 2, 4))
    batches_NABT1 = data.read_windows(tokens, offsets_NAB, T + 1)

    @functools.cache
    def train(n, dtype, loss_scale=2**16):
        model = computed(MODEL, dtype=jnp.dtype(dtype))
        state = before = with_loss_scale(new_state(ADAMW), loss_scale)
        metrics = []
        for batch_ABT1 in batches_NABT1[:n]:
            state, now = train_step(model, ADAMW, state, batch_ABT1, KEY)
            metrics.append(now)
        return before, state, jax.tree.map(lambda *values: np.stack(values), *metrics)

    return train


def with_loss_scale(state, scale):
    return state._replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(scale)))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_16_bit_training_follows_float32_within_two_percent(train, dtype):
    _, _, exact = train(N_STEPS, "float32")
    _, after, metrics = train(N_STEPS, dtype)
    np.testing.assert_allclose(metrics.loss, exact.loss, rtol=0.02)
    assert (metrics.loss != exact.loss).any()
    assert metrics.loss[-1] < metrics.loss[0] - 0.2
    assert after.skipped == 0
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {"float32", "int32"}
    assert {leaf.dtype.name for leaf in metrics} == {"float32", "int32"}


def test_a_gradient_that_overflows_float16_changes_only_the_loss_scale(train):
    before, after, metrics = train(1, "float16", loss_scale=1e38)
    assert_equal(after.params, before.params)
    assert_equal(after.opt_state, before.opt_state)
    # Halved once, though both micro-batches overflow.
    assert after.loss_scale.scale == np.float32(1e38) / 2
    assert (after.step, after.skipped, metrics.skipped[0]) == (1, 1, 1)
    assert np.isfinite(metrics.loss[0])


def test_float16_training_recovers_from_an_overflow(train):
    _, after, metrics = train(N_STEPS, "float16", loss_scale=2**30)
    is_skipped = np.diff(metrics.skipped, prepend=0) == 1
    assert 2 <= is_skipped.sum() == after.skipped <= 15
    assert is_skipped[:2].all()
    np.testing.assert_array_equal(np.isfinite(metrics.grad_norm), ~is_skipped)
    assert after.opt_state[1][0].count == N_STEPS - after.skipped
    assert metrics.loss[-1] < metrics.loss[0] - 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_ignore_the_loss_scale(train, dtype):
    before, after, _ = train(2, dtype, loss_scale=1e38)
    assert_equal(after.loss_scale, before.loss_scale)
    assert after.skipped == 0
    assert_equal(after.params, train(2, dtype)[1].params)


def test_one_micro_batch_that_overflows_skips_the_whole_update():
    state, model = new_state(ADAMW), computed(MODEL, dtype=jnp.dtype("float16"))

    def after(scale, *micro_batches):
        batch_ABT1 = np.stack(micro_batches).astype(np.uint16)  # like `train`'s: compiled once
        return train_step(model, ADAMW, with_loss_scale(state, scale), batch_ABT1, KEY)[0]

    mild, steep = random_ids(4, T + 1), np.full((4, T + 1), 3)  # all gradients of one sign
    scale = next(
        2.0**n
        for n in range(10, 40)
        if after(2.0**n, steep, steep).skipped and not after(2.0**n, mild, mild).skipped
    )
    for micro_batches in ((steep, mild), (mild, steep)):
        skipping = after(scale, *micro_batches)
        assert_equal(skipping.params, state.params)
        assert_equal(skipping.opt_state, state.opt_state)
        assert (skipping.skipped, skipping.loss_scale.scale) == (1, scale / 2)
