"""The learning rate, weight decay, clipping, and Muon."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from nanogpt_jax import steps
from nanogpt_jax.config import OptimConfig
from nanogpt_jax.config.presets import MODERN
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import decay_mask, learning_rate_schedule, make_optimizer, muon_or_adamw

OPTIM = OptimConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=10)


def learning_rates(step, max_iters=10, **changes):
    schedule = learning_rate_schedule(dataclasses.replace(OPTIM, **changes), max_iters)
    return np.asarray(jax.jit(schedule)(step))


def test_warm_up_is_linear_and_its_first_step_is_not_zero():
    np.testing.assert_allclose(learning_rates(np.arange(5)), [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rates(0, warmup_iters=0) == 1


def test_decay_is_half_a_cosine_down_to_min_lr():
    third = 0.1 + 0.9 * 0.75  # (1 + cos 60 degrees) / 2
    two_thirds = 0.1 + 0.9 * 0.25
    rates = learning_rates(np.array([6, 7, 8, 10]))
    np.testing.assert_allclose(rates, [third, 0.55, two_thirds, 0.1], rtol=1e-6)


def test_after_the_decay_the_rate_stays_min_lr():
    np.testing.assert_allclose(learning_rates(np.array([11, 20, 10**6])), 0.1, rtol=1e-6)


def test_decay_ends_with_the_run_if_lr_decay_iters_is_none():
    rates = learning_rates(np.array([12, 20]), max_iters=20, lr_decay_iters=None)
    np.testing.assert_allclose(rates, [0.55, 0.1], rtol=1e-6)


def test_without_decay_lr_the_rate_is_constant_from_the_first_step():
    np.testing.assert_array_equal(learning_rates(np.arange(15), decay_lr=False), np.ones(15))


@pytest.mark.parametrize("lr_decay_iters", [3, 6])
def test_a_warm_up_that_leaves_no_room_for_a_decay_drops_straight_to_min_lr(lr_decay_iters):
    rates = learning_rates(np.arange(9), warmup_iters=6, lr_decay_iters=lr_decay_iters)
    np.testing.assert_allclose(rates, [*np.arange(1, 7) / 7, 0.1, 0.1, 0.1], rtol=1e-6)


def test_the_rates_are_nanogpts():
    """The formula of nanoGPT's get_lr, in float64."""

    def nanogpts(step):
        if step < 4:
            return 1.0 * (step + 1) / 5
        if step > 10:
            return 0.1
        return 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (step - 4) / 6))

    schedule = jax.jit(learning_rate_schedule(OPTIM, 10))
    for step in range(15):  # one by one, as the optimizer asks
        np.testing.assert_allclose(schedule(np.int32(step)), nanogpts(step), rtol=1e-6)


WSD = {"schedule": "wsd", "cooldown": 0.5}


def test_wsd_warms_up_stays_constant_and_decays_linearly():
    rates = learning_rates(np.arange(13), **WSD)
    warming, stable = [0.2, 0.4, 0.6, 0.8], [1, 1, 1, 1]
    decaying = [0.1 + 0.9 * 2 / 3, 0.1 + 0.9 * 1 / 3]  # the last 3 of the 6 steps after warm-up
    np.testing.assert_allclose(rates, [*warming, *stable, *decaying, 0.1, 0.1, 0.1], rtol=1e-6)


def test_wsd_with_a_cooldown_of_one_is_a_straight_line_from_the_first_step():
    rates = learning_rates(np.arange(12), schedule="wsd", cooldown=1.0, warmup_iters=0)
    np.testing.assert_allclose(rates, [*np.linspace(1, 0.1, 11), 0.1], rtol=1e-6)


@pytest.mark.parametrize("cooldown", [0.01, 0.04, 0.1])
def test_a_cooldown_of_less_than_a_step_takes_one_step(cooldown):
    rates = learning_rates(np.arange(12), schedule="wsd", cooldown=cooldown, warmup_iters=0)
    np.testing.assert_allclose(rates, [1] * 10 + [0.1] * 2, rtol=1e-6)


def test_wsd_obeys_max_iters_and_decay_lr():
    rates = learning_rates(np.array([11, 12, 16, 20]), max_iters=20, lr_decay_iters=None, **WSD)
    np.testing.assert_allclose(rates, [1, 1, 0.55, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(learning_rates(np.arange(15), decay_lr=False, **WSD), 1)


@pytest.mark.parametrize("lr_decay_iters", [3, 6])
def test_wsd_too_drops_to_min_lr_after_a_warm_up_that_leaves_no_room(lr_decay_iters):
    rates = learning_rates(np.arange(9), warmup_iters=6, lr_decay_iters=lr_decay_iters, **WSD)
    np.testing.assert_allclose(rates, [*np.arange(1, 7) / 7, 0.1, 0.1, 0.1], rtol=1e-6)


KERNELS = ["attn.c_attn.kernel", "attn.c_proj.kernel", "mlp.c_fc.kernel", "mlp.c_proj.kernel"]
DECAYING = {
    "wte.embedding",
    "wpe.embedding",
    *(f"h_{i}.{kernel}" for i in range(2) for kernel in KERNELS),
}


def random_params(model_config) -> dict:
    """Return a GPT's parameters, none of them zero, not even biases."""
    init = partial(steps.init_params, GPT(model_config))
    abstract = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.uniform(1, 2, x.shape).astype(np.float32), abstract)


@pytest.mark.parametrize("bias", [True, False])
def test_embeddings_and_kernels_decay_and_biases_and_scales_do_not(model_config, bias):
    params = random_params(dataclasses.replace(model_config, bias=bias))
    mask = flatten_dict(decay_mask(params), sep=".")
    assert mask.keys() == flatten_dict(params, sep=".").keys()
    assert {name for name, decays in mask.items() if decays is True} == DECAYING
    others = {name for name, decays in mask.items() if decays is False}
    assert others == mask.keys() - DECAYING
    assert {name.rpartition(".")[2] for name in others} == {"scale"} | ({"bias"} if bias else set())


@pytest.mark.parametrize("bias", [True, False])
def test_an_update_without_gradient_shrinks_only_what_decays(model_config, bias):
    params = random_params(dataclasses.replace(model_config, bias=bias))
    config = dataclasses.replace(OPTIM, learning_rate=0.5, decay_lr=False, weight_decay=0.25)
    tx = make_optimizer(config, max_iters=10)

    @jax.jit
    def update(params):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    updated = flatten_dict(update(params), sep=".")
    for name, param in flatten_dict(params, sep=".").items():
        expected = param * (1 - 0.5 * 0.25) if name in DECAYING else param
        np.testing.assert_allclose(updated[name], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("grad_clip", "expected"),
    [(0, 4), (100, 4), (6, 4 / 3), (1, 1)],
    ids=["0 does not clip", "above both norms", "between the norms", "below both norms"],
)
def test_grad_clip_bounds_the_norm_over_all_parameters(grad_clip, expected):
    """Gradients of norm 30, then 3; the betas make the second update (g1 + 2 g2) / (3 |g2|)."""
    config = OptimConfig(
        learning_rate=0.01, decay_lr=False, beta1=0.5, beta2=0, weight_decay=0, grad_clip=grad_clip
    )
    tx = make_optimizer(config, max_iters=10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    opt_state = tx.init(params)
    for norm in (30, 3):
        grads = {"a": jnp.array([0.6 * norm]), "b": jnp.array([0.8 * norm])}
        updates, opt_state = tx.update(grads, opt_state, params)
    np.testing.assert_allclose(updates["a"], [-0.01 * expected], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [-0.01 * expected], rtol=1e-5)


# Muon

MUON = OptimConfig(
    optimizer="muon",
    learning_rate=0.5,
    decay_lr=False,
    weight_decay=0.25,
    grad_clip=0.0,
    muon_momentum=0.0,
)
MATRICES = {f"h_0.{kernel}" for kernel in KERNELS}
kinds = pytest.mark.parametrize("fields", [{"bias": True}, MODERN], ids=["gpt2", "modern"])


@cache
def optimizer_and_jitted_update(config):
    tx = make_optimizer(config, max_iters=10)
    return tx, jax.jit(tx.update)


def updates_of(config, params, *grads):
    """The updates for some successive gradients, each by parameter name."""
    tx, update = optimizer_and_jitted_update(config)
    opt_state, found = tx.init(params), []
    for grad in grads:
        updates, opt_state = update(grad, opt_state, params)
        found.append({name: np.asarray(x) for name, x in flatten_dict(updates, sep=".").items()})
    return found


def random_grads(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


def squares(name, matrix):
    """The matrices that are orthogonalised separately: c_attn holds those of q, k and v."""
    return np.split(matrix, 3, axis=1) if "c_attn" in name else [matrix]


@kinds
def test_muon_updates_only_the_matrices_of_the_blocks(model_config, fields):
    params = random_params(dataclasses.replace(model_config, **fields))
    matrices = {f"h_{i}.{kernel}" for i in range(2) for kernel in KERNELS}
    chosen = flatten_dict(muon_or_adamw(params), sep=".")
    assert chosen.keys() == flatten_dict(params, sep=".").keys()
    assert {name for name, by in chosen.items() if by == "muon"} == matrices
    others = {name for name, by in chosen.items() if by == "adamw"}
    assert others == chosen.keys() - matrices


@kinds
def test_adamw_with_nesterov_momentum_updates_the_rest(model_config, fields):
    params = random_params(dataclasses.replace(model_config, n_layer=1, **fields))
    grads = [random_grads(params, seed) for seed in (1, 2)]
    adamw = optax.adamw(0.5, 0.9, 0.95, weight_decay=0.25, mask=decay_mask, nesterov=True)
    opt_state = adamw.init(params)
    for grad, found in zip(grads, updates_of(MUON, params, *grads), strict=True):
        updates, opt_state = jax.jit(adamw.update)(grad, opt_state, params)
        for name, update in flatten_dict(updates, sep=".").items():
            is_near = np.allclose(found[name], update, rtol=1e-4, atol=1e-6)
            assert is_near == (name not in MATRICES), name


@kinds
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_muons_updates_are_nearly_orthogonal_and_as_large_as_adamws(model_config, fields, size):
    """All directions count equally, whatever the gradient's size."""
    config = dataclasses.replace(model_config, n_layer=1, n_embd=48, **fields)
    params = random_params(config)
    grads = jax.tree.map(lambda x: size * x, random_grads(params))
    no_decay = dataclasses.replace(MUON, weight_decay=0.0)
    (updates,) = updates_of(no_decay, params, grads)
    grads = flatten_dict(grads, sep=".")
    for name in MATRICES:
        pairs = zip(squares(name, updates[name]), squares(name, grads[name]), strict=True)
        for update, grad in pairs:
            scale = 0.5 * 0.2 * max(update.shape) ** 0.5
            left, values, right = np.linalg.svd(-update / scale, full_matrices=False)
            assert 0.5 < np.median(values) < 1.3, name
            # The smallest of a square Gaussian matrix are near 0; they grow over several steps.
            assert (values > 0.5).mean() > 0.9, name
            assert values.max() < 1.3, name
            towards, _, back = np.linalg.svd(grad, full_matrices=False)
            assert np.sum((left @ right) * (towards @ back)) > 0.95 * len(values), name
            rms = np.sqrt(np.mean(update**2)) / 0.5
            assert 0.15 < rms < 0.25, name


def test_q_k_and_v_are_updated_separately(model_config):
    """The size of v's gradient changes no update, neither of v nor of q and k."""
    params = random_params(dataclasses.replace(model_config, n_layer=1))
    no_decay = dataclasses.replace(MUON, weight_decay=0.0)
    grads, other = random_grads(params), random_grads(params)
    other["h_0"]["attn"]["c_attn"]["kernel"][:, 24:] *= 100
    plain, scaled = (updates_of(no_decay, params, g)[0] for g in (grads, other))
    for name in MATRICES:
        np.testing.assert_allclose(scaled[name], plain[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_muon_uses_muon_momentum(model_config, momentum):
    """Without momentum an update depends only on its own gradient."""
    params = random_params(dataclasses.replace(model_config, n_layer=1))
    config = dataclasses.replace(MUON, muon_momentum=momentum, weight_decay=0.0)
    first, second = random_grads(params, 1), random_grads(params, 2)
    alone = updates_of(config, params, second)[0]
    after = updates_of(config, params, first, second)[1]
    for name in MATRICES:
        assert np.allclose(after[name], alone[name], atol=1e-5) == (momentum == 0), name


@kinds
def test_with_muon_too_an_update_without_gradient_shrinks_only_what_decays(model_config, fields):
    """And it is finite: a model initialised with zeros has gradients that are zero."""
    params = random_params(dataclasses.replace(model_config, n_layer=1, **fields))
    (updates,) = updates_of(MUON, params, jax.tree.map(np.zeros_like, params))
    for name, param in flatten_dict(params, sep=".").items():
        expected = -0.5 * 0.25 * param if param.ndim >= 2 else 0 * param
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6, err_msg=name)


def test_grad_clip_does_not_change_the_size_of_muons_updates(model_config):
    params = random_params(dataclasses.replace(model_config, n_layer=1))
    grads = random_grads(params)
    config = dataclasses.replace(MUON, grad_clip=1e-2)
    (free,), (clipped,) = (updates_of(c, params, grads) for c in (MUON, config))
    for name in MATRICES:
        np.testing.assert_allclose(clipped[name], free[name], atol=1e-4, err_msg=name)


def test_the_names_of_adamws_state_never_change(model_config):
    """Checkpoints store arrays by these names: runs older than Muon still resume."""
    params = random_params(dataclasses.replace(model_config, n_layer=1))
    names = {name for name, _ in named_leaves(make_optimizer(OPTIM, 10).init(params))}
    of_params = flatten_dict(params, sep=".").keys()
    averages = {f"1.0.{mean}.{name}" for mean in ("mu", "nu") for name in of_params}
    assert names == averages | {"1.0.count", "1.2.count"}


def test_muon_stores_one_average_of_a_matrix_and_adamw_two_of_the_rest(model_config):
    params = random_params(dataclasses.replace(model_config, n_layer=1, **MODERN))
    sizes = {name: param.size for name, param in flatten_dict(params, sep=".").items()}
    state = make_optimizer(MUON, 10).init(params)
    kept = sum(leaf.size for _, leaf in named_leaves(state) if leaf.ndim >= 2)
    assert kept == sum(size * (1 if name in MATRICES else 2) for name, size in sizes.items())
    names = [name for name, _ in named_leaves(state)]
    assert len(set(names)) == len(names)


def named_leaves(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
