"""The lecture's models against its formulas, written out in NumPy for one sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import layers_of

from nanogpt_jax import decoding, steps
from nanogpt_jax.config import LECTURE, LECTURE_MODELS, MODERN, ModelConfig, parse_train_config
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import choose_compute
from nanogpt_jax.lecture import models
from nanogpt_jax.model import GPT

B, T, V, D, H = 2, 6, 11, 12, 3


@pytest.fixture(scope="module", autouse=True)
def compiled_fast():
    """Compile in a third of the time: what is compared here is not compared bit for bit."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make(name, **changes):
    shape = {"block_size": 8, "vocab_size": V, "n_embd": D} | layers_of(name, 2, H)
    return steps.make_model(ModelConfig(**shape | changes))


def tokens(*shape):
    return np.random.default_rng(0).integers(0, V, shape)


def random_params(model):
    """Parameters of any size: compiling their initialization takes longest."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: steps.init_params(model, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf: rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape).astype(np.float32), shapes
    )


def dense(x, p):
    return x @ p["Dense_0"]["kernel"] + p["Dense_0"].get("bias", 0)


def head(x_TD, p):
    """One head, position by position; its scores are divided by the root of the width D."""
    q, k, v = (dense(x_TD, p[name]) for name in ("query", "key", "value"))
    rows = []
    for t in range(len(x_TD)):
        scores = q[t] @ k[: t + 1].T / np.sqrt(x_TD.shape[-1])
        weights = np.exp(scores - scores.max())
        rows.append(weights / weights.sum() @ v[: t + 1])
    return np.stack(rows)


def multi_head(x_TD, p):
    y_TD = np.concatenate([head(x_TD, p[f"Head_{i}"]) for i in range(H)], axis=-1)
    return dense(y_TD, p["proj"]) if "proj" in p else y_TD


def feed_forward(x_TD, p):
    h = np.maximum(dense(x_TD, p["Linear_0"]), 0)
    return dense(h, p["proj"]) if "proj" in p else h


def norm(x_TD, p):
    centred = x_TD - x_TD.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def numpy_logits(name, params, tokens_T):
    """Return the logits of a sequence by the lecture's formulas."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    if name == "bigram":
        return p["token_embedding_table"]["embedding"][tokens_T]
    x = p["token_embedding_table"]["embedding"][tokens_T]
    x = x + p["position_embedding_table"]["embedding"][: len(tokens_T)]
    for i in range({"deep": 4, "residual": 2, "layernorm": 2, "feedforward": 2}.get(name, 1)):
        layer = p[f"layers_{i}"]
        if name == "head":
            x = head(x, layer)
        elif name == "multihead" or (name in ("feedforward", "deep") and i % 2 == 0):
            x = multi_head(x, layer)
        elif name in ("feedforward", "deep"):
            x = feed_forward(x, layer)
        elif name == "residual":
            x = x + multi_head(x, layer["sa"])
            x = x + feed_forward(x, layer["ffwd"])
        else:
            x = x + multi_head(norm(x, layer["ln1"]), layer["sa"])
            x = x + feed_forward(norm(x, layer["ln2"]), layer["ffwd"])
    x = norm(x, p["ln_f"]) if name == "layernorm" else x
    return dense(x, p["lm_head"])


@pytest.mark.parametrize("name", LECTURE_MODELS)
def test_logits_are_those_of_the_lectures_formulas_and_see_only_the_past(name):
    model = make(name)
    params, tokens_BT = random_params(model), tokens(B, T)
    changed_BT = tokens_BT.copy()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % V
    logits = jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT)[0])
    before, after = np.split(np.asarray(logits(params, np.stack([*tokens_BT, *changed_BT]))), 2)
    expected = np.stack([numpy_logits(name, params, row) for row in tokens_BT])
    np.testing.assert_allclose(before, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert np.abs(before[:, -1] - after[:, -1]).max() > 1e-3


def test_every_architecture_has_its_model():
    assert models.MODELS.keys() == set(LECTURE_MODELS)
    assert isinstance(steps.make_model(ModelConfig(vocab_size=V)), GPT)


def test_parameters_start_as_pytorchs_do():
    """Linear: uniform within 1 / sqrt(inputs), biases too; embeddings N(0, 1)."""
    model = make("layernorm", n_embd=60, vocab_size=500, n_layer=1, n_head=1)
    params = jax.jit(lambda key: steps.init_params(model, key))(jax.random.key(0))
    embedding = np.asarray(params["token_embedding_table"]["embedding"])
    assert abs(embedding.std() - 1) < 0.02
    up, down = (params["layers_0"]["ffwd"][name]["Dense_0"] for name in ("Linear_0", "proj"))
    for layer, n_inputs in (up, 60), (down, 240):
        for values in layer["kernel"], layer["bias"]:
            bound = n_inputs**-0.5
            assert 0.9 * bound < np.abs(values).max() <= bound
            assert abs(np.std(values) - bound / 3**0.5) < 0.1 * bound
    assert set(params["layers_0"]["sa"]["Head_0"]["query"]["Dense_0"]) == {"kernel"}  # no bias


def test_dropout_drops_weights_of_attention_projection_and_feed_forward():
    """Half of the outputs, the rest doubled; of a query's attention weights, any."""
    x_BTD = jnp.array(np.random.default_rng(0).normal(size=(32, 8, 48)), jnp.float32)

    def dropped_and_whole(part):
        @jax.jit
        def apply():
            variables = part.init(jax.random.key(0), x_BTD, True)
            rngs = {"dropout": jax.random.key(1)}
            dropped = part.apply(variables, x_BTD, False, rngs=rngs)
            return dropped, part.apply(variables, x_BTD, True)

        return map(np.asarray, apply())

    for part in models.MultiHead(1, dropout=0.5), models.FeedForward(dropout=0.5):
        dropped, whole = dropped_and_whole(part)
        assert abs(np.mean(dropped == 0) - 0.5) < 0.1
        assert not np.any(whole == 0)

    dropped, whole = dropped_and_whole(models.Head(8, dropout=0.5))
    first_BK = dropped[:, 0]  # the first position has one weight, kept or not
    whole_BK = 2 * whole[:, 0]
    was_kept_B = np.any(first_BK != 0, axis=-1)
    assert set(was_kept_B) == {True, False}
    np.testing.assert_allclose(first_BK[was_kept_B], whole_BK[was_kept_B], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("head", {"n_layer": 2}, "n_layer"),
        ("head", {"n_head": 2}, "n_head"),
        ("residual", {"dropout": 0.5}, "dropout"),
        ("layernorm", {"bias": False}, "bias"),
        ("layernorm", {"activation": "gelu_tanh"}, "activation"),
        *(("layernorm", {name: value}, name) for name, value in MODERN.items()),
    ],
)
def test_fields_that_a_model_does_not_have_are_refused_rather_than_ignored(name, changes, named):
    with pytest.raises(
        InputError, match=rf"^{named} must be .* for the lecture's {name} model, as .*, got"
    ):
        ModelConfig(**{"architecture": name, "bias": True, "n_layer": 1, "n_head": 1} | changes)


@pytest.mark.parametrize("name", ["bigram", "head"])
def test_a_model_generates_past_its_context(name):
    """It always reads the last block_size tokens, as the lecture's generate does."""
    model = make(name)
    params, n_tokens = random_params(model), 12
    greedy, keys_B = decoding.Sampling(temperature=0), decoding.row_keys(0, range(1))
    generated = decoding.generate(model, params, np.zeros((1, 1), int), keys_B, n_tokens, greedy)
    text = [0]
    for _ in range(n_tokens):
        text.append(int(numpy_logits(name, params, np.array(text[-8:]))[-1].argmax()))
    assert generated[0].tolist() == text[1:]


@pytest.mark.parametrize("flag", ["--dtype=bfloat16", "--attention=cudnn", "--remat=true"])
def test_ways_to_compute_that_the_models_lack_are_refused(flag):
    config = parse_train_config(["--config=lecture-head", flag])
    with pytest.raises(InputError, match=flag[2:].partition("=")[0]):
        choose_compute(config.compute, config.model, jax.devices()[0])


def test_each_model_is_a_preset():
    assert [preset.model.architecture for preset in LECTURE][:7] == list(LECTURE_MODELS)
