import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from nanogpt_jax import steps
from nanogpt_jax.config import OptimConfig
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import decay_mask, learning_rate_schedule, make_optimizer

OPTIM = OptimConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=10)


def learning_rates(step, max_iters=10, **changes):
    schedule = learning_rate_schedule(dataclasses.replace(OPTIM, **changes), max_iters)
    return np.asarray(jax.jit(schedule)(step))


def test_warm_up_is_linear_and_its_first_step_is_not_zero():
    np.testing.assert_allclose(learning_rates(np.arange(5)), [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)


def test_without_warm_up_the_first_step_has_the_highest_rate():
    assert learning_rates(0, warmup_iters=0) == 1


def test_decay_is_half_a_cosine_down_to_min_lr():
    third = 0.1 + 0.9 * 0.75  # (1 + cos 60 degrees) / 2
    two_thirds = 0.1 + 0.9 * 0.25
    rates = learning_rates(np.array([6, 7, 8, 10]))
    np.testing.assert_allclose(rates, [third, 0.55, two_thirds, 0.1], rtol=1e-6)


def test_past_the_end_of_the_decay_the_rate_stays_min_lr():
    np.testing.assert_allclose(learning_rates(np.array([11, 20, 10**6])), 0.1, rtol=1e-6)


def test_decay_ends_with_the_run_where_lr_decay_iters_is_none():
    rates = learning_rates(np.array([12, 20]), max_iters=20, lr_decay_iters=None)
    np.testing.assert_allclose(rates, [0.55, 0.1], rtol=1e-6)


def test_without_decay_lr_the_rate_is_constant_from_the_first_step():
    np.testing.assert_array_equal(learning_rates(np.arange(15), decay_lr=False), np.ones(15))


@pytest.mark.parametrize("lr_decay_iters", [3, 6])
def test_warm_up_as_long_as_the_decay_and_longer_goes_straight_to_min_lr(lr_decay_iters):
    rates = learning_rates(np.arange(9), warmup_iters=6, lr_decay_iters=lr_decay_iters)
    np.testing.assert_allclose(rates, [*np.arange(1, 7) / 7, 0.1, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize("decay_lr", [True, False])
def test_one_step_has_the_rate_it_has_among_all(decay_lr):
    """The optimizer asks for one step, the log for all of them."""
    together = learning_rates(np.arange(15), decay_lr=decay_lr)
    assert together.shape == (15,)
    one_by_one = [learning_rates(np.int32(step), decay_lr=decay_lr) for step in range(15)]
    np.testing.assert_allclose(one_by_one, together, rtol=1e-6)


KERNELS = ["attn.c_attn.kernel", "attn.c_proj.kernel", "mlp.c_fc.kernel", "mlp.c_proj.kernel"]
DECAYING = {
    "wte.embedding",
    "wpe.embedding",
    *(f"h_{i}.{kernel}" for i in range(2) for kernel in KERNELS),
}


def random_params(model_config) -> dict:
    """Return a GPT's tree with no zeros in it, biases included."""
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
def test_an_update_without_gradient_shrinks_just_what_decays(model_config, bias):
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
