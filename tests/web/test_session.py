"""What the page shows of a text is what the model's logits and attention weights say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import layers_of, random_params

from nanogpt_jax import steps
from nanogpt_jax.attention import WEIGHTS
from nanogpt_jax.config import ModelConfig
from nanogpt_jax.lecture.models import Head
from nanogpt_jax.web import session

TOKENS_T = np.array([3, 1, 4, 1, 5])


def new_model(architecture, n_layer=2, n_head=4):
    shape = {"block_size": 8, "vocab_size": 11, "n_embd": 12}
    model = steps.make_model(ModelConfig(**shape | layers_of(architecture, n_layer, n_head)))
    return model, random_params(model)


@pytest.mark.parametrize(
    ("architecture", "n_layers", "n_heads"),
    [("gpt", 2, 4), ("bigram", 0, 0), ("head", 1, 1), ("layernorm", 2, 4)],
)
def test_a_reading_has_the_models_forecasts_and_all_its_heads_by_layer(
    architecture, n_layers, n_heads
):
    model, params = new_model(architecture)
    next_probs_TV, weights = jax.jit(partial(session.read_text, model))(params, TOKENS_T)
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, TOKENS_T[None])
    np.testing.assert_allclose(next_probs_TV, jax.nn.softmax(logits_BTV[0]), atol=1e-6)
    assert [weights_HTT.shape for weights_HTT in weights] == n_layers * [(n_heads, 5, 5)]
    for weights_HTT in weights:
        np.testing.assert_allclose(weights_HTT.sum(-1), 1, atol=1e-6)
        assert not np.triu(weights_HTT, 1).any()


def test_heads_are_in_their_order_past_the_tenth():
    """By name alone Head_10 would come before Head_2."""
    model, params = new_model("multihead", n_head=12)
    _, (weights_HTT,) = jax.jit(partial(session.read_text, model))(params, TOKENS_T)
    heads = params["layers_0"]
    x_BTD = params["token_embedding_table"]["embedding"][TOKENS_T][None]
    x_BTD = x_BTD + params["position_embedding_table"]["embedding"][None, :5]
    head = jax.jit(partial(Head(head_size=1).apply, mutable=[WEIGHTS]), static_argnums=2)
    for n in range(12):
        _, kept = head({"params": heads[f"Head_{n}"]}, x_BTD, True)
        (weights_BTS,) = kept[WEIGHTS]["weights_BTS"]
        np.testing.assert_allclose(weights_HTT[n], weights_BTS[0], atol=1e-6)


@pytest.mark.parametrize("name", ["layers_{}/sa/Head_0", "h_{}/attn"])
def test_layers_are_in_their_order_past_the_tenth(name):
    """By name alone h_10 would come before h_2."""

    class Model:
        def apply(self, variables, tokens_BT, mutable):
            sown = {}
            for n in range(12):
                inner = sown
                for part in name.format(n).split("/"):
                    inner = inner.setdefault(part, {})
                inner["weights"] = (jnp.full((1, 5, 5), n),)
            return (jnp.zeros((1, 5, 11)), None), {WEIGHTS: dict(sorted(sown.items()))}

    _, weights = session.read_text(Model(), {}, TOKENS_T)
    assert [int(weights_HTT.max()) for weights_HTT in weights] == list(range(12))


def test_padding_at_the_end_changes_nothing_before_it():
    model, params = new_model("gpt")
    read_text = jax.jit(partial(session.read_text, model))
    probs_TV, weights = read_text(params, TOKENS_T)
    other_T = np.where(np.arange(5) < 3, TOKENS_T, 0)
    padded_probs_TV, padded_weights = read_text(params, other_T)
    np.testing.assert_allclose(padded_probs_TV[:3], probs_TV[:3], atol=1e-6)
    np.testing.assert_allclose(padded_weights[1][:, :3, :3], weights[1][:, :3, :3], atol=1e-6)
    assert not np.allclose(padded_probs_TV[3:], probs_TV[3:])


def test_training_keeps_no_weights():
    """They are kept only on request."""
    model, _ = new_model("gpt")
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    assert {*jax.eval_shape(model.init, jax.random.key(0), tokens_BT)} >= {"params"}
    assert {*jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))} == {
        "wte", "wpe", "h_0", "h_1", "ln_f",
    }  # fmt: skip
