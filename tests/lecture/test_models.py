"""The lecture's models against its formulas, written out in NumPy for one sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import layers_of

from nanogpt_jax import decoding, steps
from nanogpt_jax.config import LECTURE, LECTURE_MODELS, MODERN, ModelConfig, parse_train_config
from nanogpt_jax.errors import InputError
from nanogpt_jax.lecture import models as rungs
from nanogpt_jax.model import GPT

B, T, V, D, H = 2, 6, 11, 12, 3
CAUSAL = ["head", "multihead", "feedforward", "deep", "residual", "layernorm"]


def make(rung, **changes):
    shape = {"block_size": 8, "vocab_size": V, "n_embd": D} | layers_of(rung, 2, H)
    return rungs.make_model(ModelConfig(**shape | changes))


def tokens(*shape):
    return np.random.default_rng(0).integers(0, V, shape)


def init(model, seed=0):
    return jax.jit(lambda key: steps.init_params(model, key))(jax.random.key(seed))


def logits(model, params, tokens_BT, **kwargs):
    return np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t, **kwargs)[0])(
        params, tokens_BT
    ))  # fmt: skip


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


def written_out(rung, params, tokens_T):
    """The logits of a sequence, as the lecture's code says them."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    if rung == "bigram":
        return p["token_embedding_table"]["embedding"][tokens_T]
    x = p["token_embedding_table"]["embedding"][tokens_T]
    x = x + p["position_embedding_table"]["embedding"][: len(tokens_T)]
    for i in range({"deep": 4, "residual": 2, "layernorm": 2, "feedforward": 2}.get(rung, 1)):
        layer = p[f"layers_{i}"]
        if rung == "head":
            x = head(x, layer)
        elif rung == "multihead" or (rung in ("feedforward", "deep") and i % 2 == 0):
            x = multi_head(x, layer)
        elif rung in ("feedforward", "deep"):
            x = feed_forward(x, layer)
        elif rung == "residual":
            x = x + multi_head(x, layer["sa"])
            x = x + feed_forward(x, layer["ffwd"])
        else:
            x = x + multi_head(norm(x, layer["ln1"]), layer["sa"])
            x = x + feed_forward(norm(x, layer["ln2"]), layer["ffwd"])
    x = norm(x, p["ln_f"]) if rung == "layernorm" else x
    return dense(x, p["lm_head"])


@pytest.mark.parametrize("rung", LECTURE_MODELS)
def test_logits_are_those_of_the_lectures_formulas(rung):
    model = make(rung)
    params, tokens_BT = init(model), tokens(B, T)
    expected = np.stack([written_out(rung, params, row) for row in tokens_BT])
    np.testing.assert_allclose(logits(model, params, tokens_BT), expected, atol=1e-5)


def test_every_name_of_a_rung_has_its_model():
    assert rungs.RUNGS.keys() == set(LECTURE_MODELS)
    assert isinstance(rungs.make_model(ModelConfig(vocab_size=V)), GPT)


@pytest.mark.parametrize("rung", CAUSAL)
def test_a_rung_does_not_see_what_comes(rung):
    model = make(rung)
    params, tokens_BT = init(model), tokens(B, T)
    changed_BT = tokens_BT.copy()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % V
    before, after = (logits(model, params, x) for x in (tokens_BT, changed_BT))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert np.abs(before[:, -1] - after[:, -1]).max() > 1e-3


def test_parameters_start_as_pytorchs_do():
    """Linear: uniform within 1 / sqrt(inputs), biases too; embeddings N(0, 1)."""
    params = init(make("layernorm", n_embd=60, vocab_size=500))
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
    """Half of what comes out, the rest doubled; of the weights a query has, any."""
    x_BTD = jnp.array(np.random.default_rng(0).normal(size=(32, 8, 48)), jnp.float32)
    for part in rungs.MultiHead(2, dropout=0.5), rungs.FeedForward(dropout=0.5):
        variables = part.init(jax.random.key(0), x_BTD, True)
        dropped = part.apply(variables, x_BTD, False, rngs={"dropout": jax.random.key(1)})
        assert abs(np.mean(np.asarray(dropped) == 0) - 0.5) < 0.1
        assert not np.any(np.asarray(part.apply(variables, x_BTD, True)) == 0)

    head = rungs.Head(8, dropout=0.5)
    variables = head.init(jax.random.key(0), x_BTD, True)
    dropped = head.apply(variables, x_BTD, False, rngs={"dropout": jax.random.key(1)})
    first_BK = np.asarray(dropped)[:, 0]  # the first position has one weight, kept or not
    whole_BK = 2 * np.asarray(head.apply(variables, x_BTD, True))[:, 0]
    was_kept_B = np.any(first_BK != 0, axis=-1)
    assert set(was_kept_B) == {True, False}
    np.testing.assert_allclose(first_BK[was_kept_B], whole_BK[was_kept_B], rtol=1e-5)


@pytest.mark.parametrize(
    ("rung", "changes", "named"),
    [
        ("head", {"n_layer": 2}, "n_layer"),
        ("head", {"n_head": 2}, "n_head"),
        ("residual", {"dropout": 0.5}, "dropout"),
        ("layernorm", {"bias": False}, "bias"),
        ("layernorm", {"activation": "gelu_tanh"}, "activation"),
        *(("layernorm", {name: value}, name) for name, value in MODERN.items()),
    ],
)
def test_what_a_rung_does_not_have_is_refused_rather_than_ignored(rung, changes, named):
    with pytest.raises(
        InputError, match=rf"^{named} must be .* in the lecture's {rung}, as .*, got"
    ):
        ModelConfig(**{"architecture": rung, "bias": True, "n_layer": 1, "n_head": 1} | changes)


@pytest.mark.parametrize("rung", ["bigram", "layernorm"])
def test_a_rung_writes_on_past_its_context(rung):
    """Always from the last block_size tokens, as the lecture's generate does."""
    model = make(rung)
    params, n_tokens = init(model), 12
    written = decoding.generate(
        model,
        params,
        np.zeros((1, 8), np.int32),
        jnp.int32(1),
        decoding.row_keys(0, range(1)),
        n_tokens,
        decoding.Sampling(temperature=0),
    )
    text = [0]
    for _ in range(n_tokens):
        text.append(int(written_out(rung, params, np.array(text[-8:]))[-1].argmax()))
    assert np.asarray(written)[0].tolist() == text[1:]


@pytest.mark.parametrize("flag", ["--dtype=bfloat16", "--attention=cudnn", "--remat=true"])
def test_what_a_rung_cannot_be_is_refused(flag):
    from nanogpt_jax.hardware import devices

    config = parse_train_config(["--config=lecture-head", flag])
    with pytest.raises(InputError, match=flag[2:].partition("=")[0]):
        devices.choose(config.compute, config.model, jax.devices()[0])


def test_each_rung_of_the_ladder_is_a_preset():
    assert [preset().model.architecture for preset in LECTURE][:7] == list(LECTURE_MODELS)
