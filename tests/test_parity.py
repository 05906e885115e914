"""Numbers equal PyTorch's, which make_golden.py stored in tests/golden/."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from nanogpt_jax import steps
from nanogpt_jax.config import ModelConfig, OptimConfig
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer

MODELS = ("exact_gelu_bias", "exact_gelu_no_bias", "tanh_gelu_bias", "tanh_gelu_no_bias")
N_STEPS = 10


def read_golden(name: str) -> dict:
    """Return the arrays of a golden file, nested: golden["params"]["ln_f"]["scale"]."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as arrays:
        return unflatten_dict(dict(arrays), sep=".")


def make_config(cls, fields: dict):
    return cls(**{name: value.item() for name, value in fields.items()})


def assert_close(actual, golden) -> None:
    """Within 1e-5 of the array's largest value, or within 1e-5 if that is larger than 1."""
    flat_actual, flat_golden = (flatten_dict({"": tree}, sep=".") for tree in (actual, golden))
    assert flat_actual.keys() == flat_golden.keys()
    for name, array in flat_golden.items():
        assert flat_actual[name].shape == array.shape
        atol = 1e-5 * min(1, np.abs(array).max())
        np.testing.assert_allclose(flat_actual[name], array, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module", params=MODELS)
def golden(request) -> dict:
    return read_golden(request.param)


@pytest.fixture(scope="module")
def model(golden) -> GPT:
    return GPT(make_config(ModelConfig, golden["config"]))


@pytest.fixture(scope="module")
def adamw() -> dict:
    return read_golden("adamw")


@pytest.fixture(scope="module")
def states_and_metrics(adamw) -> tuple[dict, steps.Metrics]:
    """Return ({updates done: TrainState}, Metrics of shape (N,)) of our ten updates."""
    model = GPT(make_config(ModelConfig, adamw["config"]))
    tx = make_optimizer(make_config(OptimConfig, adamw["optim"]), N_STEPS)
    train_step = jax.jit(partial(steps.train_step, model, tx))
    params = jax.tree.map(jax.numpy.asarray, adamw["params"]["0"])
    state, metrics = steps.init_state(tx, params), []
    states = {}
    for batch_ABT1 in adamw["batches_NABT1"]:
        state, now = train_step(state, batch_ABT1, jax.random.key(0))
        states[int(state.step)] = state
        metrics.append(now)
    return states, jax.tree.map(lambda *values: np.stack(values), *metrics)


def without_key_biases(params: dict) -> dict:
    """Return params without the biases of attention's keys.

    Softmax ignores a number added to all scores of a query, so their gradient is rounding noise,
    which AdamW scales up to steps as large as the learning rate.
    """
    return {
        name: dict(block, attn=dict(block["attn"], c_attn=_without_keys(block["attn"]["c_attn"])))
        if name.startswith("h_")
        else block
        for name, block in params.items()
    }


def _without_keys(c_attn: dict) -> dict:
    query, _, value = np.split(c_attn["bias"], 3)
    return {"kernel": c_attn["kernel"], "bias": np.concatenate([query, value])}


def test_pytorchs_parameters_fill_exactly_our_tree(golden, model):
    ours = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    assert jax.tree.map(np.shape, golden["params"]) == jax.tree.map(np.shape, ours)


def test_logits_loss_and_gradients_equal_pytorchs(golden, model):
    batch_BT1 = golden["batch_BT1"]

    def mean_loss(params):
        return steps.token_losses(model, params, batch_BT1).mean()

    @jax.jit
    def compute(params):
        logits_BTV, _ = model.apply({"params": params}, batch_BT1[:, :-1])
        return logits_BTV, *jax.value_and_grad(mean_loss)(params)

    logits_BTV, loss, grads = compute(golden["params"])
    assert_close(logits_BTV, golden["logits_BTV"])
    assert_close(loss, golden["loss"])
    assert_close(grads, golden["grads"])


def test_ten_updates_reach_the_parameters_of_torch_adamw(adamw, states_and_metrics):
    states, _ = states_and_metrics
    assert set(adamw["params"]) == {"0", "1", "5", str(N_STEPS)}
    for n_updates in (1, 5, N_STEPS):
        theirs = adamw["params"][str(n_updates)]
        assert_close(without_key_biases(states[n_updates].params), without_key_biases(theirs))


def test_ten_updates_report_pytorchs_losses_and_gradient_norms(adamw, states_and_metrics):
    _, metrics = states_and_metrics
    np.testing.assert_allclose(metrics.loss, adamw["losses"], rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, adamw["grad_norms"], rtol=1e-5)


def test_the_ten_updates_include_clipping_warm_up_and_decay(adamw):
    """Otherwise the comparison above would say little."""
    clipped = adamw["grad_norms"] > adamw["optim"]["grad_clip"]
    assert clipped.sum() >= 3
    assert (~clipped).sum() >= 3
    assert 0 < adamw["optim"]["warmup_iters"] < adamw["optim"]["lr_decay_iters"] < N_STEPS
