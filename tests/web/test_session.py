"""What the page shows of a text is what the model's logits and attention weights say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import layers_of

from nanogpt_jax import steps
from nanogpt_jax.attention import WEIGHTS
from nanogpt_jax.config import ModelConfig
from nanogpt_jax.lecture.models import Head
from nanogpt_jax.model import GPT
from nanogpt_jax.web import session


def test_a_reading_has_the_models_forecasts_and_the_weights_of_each_layer(model_config):
    model = GPT(model_config)
    params = steps.init_params(model, jax.random.key(0))
    tokens_T = jnp.array([3, 1, 4, 1, 5])
    next_probs_TV, weights = jax.jit(partial(session.read_text, model))(params, tokens_T)
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, tokens_T[None])
    np.testing.assert_allclose(next_probs_TV, jax.nn.softmax(logits_BTV[0]), atol=1e-6)
    assert len(weights) == model_config.n_layer
    for weights_HTT in weights:
        assert weights_HTT.shape == (model_config.n_head, 5, 5)
        np.testing.assert_allclose(weights_HTT.sum(-1), 1, atol=1e-6)
        assert not np.triu(weights_HTT, 1).any()


@pytest.mark.parametrize(
    ("architecture", "n_layers", "n_heads"),
    [("bigram", 0, 0), ("head", 1, 1), ("multihead", 1, 4), ("layernorm", 2, 4)],
)
def test_a_reading_of_a_lecture_model_has_all_its_heads_by_layer(architecture, n_layers, n_heads):
    model, params = lecture_model(architecture)
    tokens_T = jnp.array([3, 1, 4, 1, 5])
    next_probs_TV, weights = jax.jit(partial(session.read_text, model))(params, tokens_T)
    logits_BTV, _ = jax.jit(model.apply)({"params": params}, tokens_T[None])
    np.testing.assert_allclose(next_probs_TV, jax.nn.softmax(logits_BTV[0]), atol=1e-6)
    assert [weights_HTT.shape for weights_HTT in weights] == n_layers * [(n_heads, 5, 5)]
    for weights_HTT in weights:
        np.testing.assert_allclose(weights_HTT.sum(-1), 1, atol=1e-6)
        assert not np.triu(weights_HTT, 1).any()


def lecture_model(architecture, **changes):
    shape = {"block_size": 8, "vocab_size": 11, "n_embd": 12} | layers_of(architecture, 2, 4)
    model = steps.make_model(ModelConfig(**shape | changes))
    return model, steps.init_params(model, jax.random.key(0))


def test_layers_and_heads_are_in_their_order_past_the_tenth():
    """By name alone h_10 would come before h_2, and Head_10 before Head_2."""
    model, params = lecture_model("residual", n_layer=11, n_head=12)
    tokens_T = jnp.array([3, 1, 4, 1, 5])
    read_text = partial(session.read_text, model)  # eager: faster than compiling 132 heads
    _, weights = read_text(params, tokens_T)
    first = params["layers_0"]["sa"]
    x_BTD = params["token_embedding_table"]["embedding"][tokens_T][None]
    x_BTD = x_BTD + params["position_embedding_table"]["embedding"][None, :5]
    for n in range(12):
        head = Head(head_size=1)
        _, kept = head.apply({"params": first[f"Head_{n}"]}, x_BTD, True, mutable=[WEIGHTS])
        (weights_BTS,) = kept[WEIGHTS]["weights_BTS"]
        np.testing.assert_allclose(weights[0][n], weights_BTS[0], atol=1e-6)
    swapped = params | {"layers_2": params["layers_10"], "layers_10": params["layers_2"]}
    _, again = read_text(swapped, tokens_T)
    same = [bool((a == b).all()) for a, b in zip(weights, again, strict=True)]
    assert same[:2] == [True, True]
    assert not any(same[2:])


def test_padding_at_the_end_changes_nothing_before_it(model_config):
    model = GPT(model_config)
    params = steps.init_params(model, jax.random.key(0))
    read_text = jax.jit(partial(session.read_text, model))
    probs_TV, weights = read_text(params, jnp.array([3, 1, 4]))
    padded_probs_TV, padded_weights = read_text(params, jnp.array([3, 1, 4, 0, 9]))
    np.testing.assert_allclose(padded_probs_TV[:3], probs_TV, atol=1e-6)
    np.testing.assert_allclose(padded_weights[1][:, :3, :3], weights[1], atol=1e-6)


def test_training_keeps_no_weights(model_config):
    """They are kept only on request."""
    model = GPT(model_config)
    params = steps.init_params(model, jax.random.key(0))
    assert set(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))) >= {
        "params"
    }
    assert set(params) == {"wte", "wpe", "h_0", "h_1", "ln_f"}
