"""What a model makes of a text is what its logits and its attention say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax import inspection, steps
from nanogpt_jax.model import GPT


def test_a_reading_has_the_models_forecasts_and_the_weights_of_each_layer(model_config):
    model = GPT(model_config)
    params = steps.init_params(model, jax.random.key(0))
    tokens_T = jnp.array([3, 1, 4, 1, 5])
    reading = jax.jit(partial(inspection.read_text, model))(params, tokens_T)
    logits_BTV, _ = model.apply({"params": params}, tokens_T[None])
    np.testing.assert_allclose(reading.next_probs_TV, jax.nn.softmax(logits_BTV[0]), atol=1e-6)
    assert len(reading.weights) == model_config.n_layer
    for weights_HTT in reading.weights:
        assert weights_HTT.shape == (model_config.n_head, 5, 5)
        np.testing.assert_allclose(weights_HTT.sum(-1), 1, atol=1e-6)
        assert not np.triu(weights_HTT, 1).any()


def test_training_keeps_no_weights(model_config):
    """They are left only where someone asks."""
    model = GPT(model_config)
    params = steps.init_params(model, jax.random.key(0))
    assert set(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))) >= {"params"}
    assert set(params) == {"wte", "wpe", "h_0", "h_1", "ln_f"}
