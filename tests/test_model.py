"""The GPT: its parameters, its numbers against NumPy, its cache against no cache."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanogpt_jax.attention import init_cache
from nanogpt_jax.model import GPT, flat_dot_general
from nanogpt_jax.steps import init_params

B, T, V = 3, 8, 11


@pytest.fixture
def model(model_config):
    return GPT(model_config)


def rough_params(model):
    """Parameters far from the start's near-zero ones, so that every part of the model matters."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0.3, 0.3, x.shape).astype(np.float32), abstract)


def logits(model, params, tokens_BT):
    return jax.jit(model.apply)({"params": params}, tokens_BT)[0]


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, V, shape)


def flat_names(params):
    return {
        "/".join(part.key for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def naive_gpt(params, tokens_T, n_head, gelu):
    """GPT-2's forward pass of one sequence, in float64, position by position where it can be."""
    params = jax.tree.map(partial(np.asarray, dtype=np.float64), params)

    def norm(x_TD, p):
        centred_TD = x_TD - x_TD.mean(-1, keepdims=True)
        variance_T1 = (centred_TD**2).mean(-1, keepdims=True)
        return centred_TD / np.sqrt(variance_T1 + 1e-5) * p["scale"] + p.get("bias", 0)

    def dense(x_TD, p):
        return x_TD @ p["kernel"] + p.get("bias", 0)

    def attend(x_TD, p):
        q_TD, k_TD, v_TD = np.split(dense(x_TD, p["c_attn"]), 3, axis=-1)
        y_TD = np.zeros_like(x_TD)
        for head in np.split(np.arange(x_TD.shape[-1]), n_head):
            for t in range(len(x_TD)):
                scores = k_TD[: t + 1, head] @ q_TD[t, head] / np.sqrt(len(head))
                weights = np.exp(scores) / np.exp(scores).sum()
                y_TD[t, head] = weights @ v_TD[: t + 1, head]
        return dense(y_TD, p["c_proj"])

    wte_VD, wpe_TD = params["wte"]["embedding"], params["wpe"]["embedding"]
    x_TD = wte_VD[tokens_T] + wpe_TD[: len(tokens_T)]
    for i in range(sum(name.startswith("h_") for name in params)):
        block = params[f"h_{i}"]
        x_TD = x_TD + attend(norm(x_TD, block["ln_1"]), block["attn"])
        hidden_TF = gelu(dense(norm(x_TD, block["ln_2"]), block["mlp"]["c_fc"]))
        x_TD = x_TD + dense(hidden_TF, block["mlp"]["c_proj"])
    return norm(x_TD, params["ln_f"]) @ wte_VD.T


def gelu_exact(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("activation", "gelu"), [("gelu", gelu_exact), ("gelu_tanh", gelu_tanh)])
def test_logits_equal_a_plain_numpy_gpt(model_config, bias, activation, gelu):
    model = GPT(dataclasses.replace(model_config, bias=bias, activation=activation))
    params, tokens_BT = rough_params(model), random_tokens(B, T)
    logits_BTV, cache = jax.jit(model.apply)({"params": params}, tokens_BT)
    assert cache is None
    assert logits_BTV.dtype == jnp.float32
    for b in range(B):
        expected_TV = naive_gpt(params, tokens_BT[b], model_config.n_head, gelu)
        np.testing.assert_allclose(logits_BTV[b], expected_TV, atol=2e-5)


def test_parameters_carry_gpt2s_names_and_shapes(model):
    shapes = {name: leaf.shape for name, leaf in flat_names(rough_params(model)).items()}
    block = {
        "ln_1/scale": (12,),
        "attn/c_attn/kernel": (12, 36),
        "attn/c_proj/kernel": (12, 12),
        "ln_2/scale": (12,),
        "mlp/c_fc/kernel": (12, 48),
        "mlp/c_proj/kernel": (48, 12),
    }
    assert shapes == {
        "wte/embedding": (11, 12),
        "wpe/embedding": (8, 12),
        **{f"h_{i}/{name}": shape for i in range(2) for name, shape in block.items()},
        "ln_f/scale": (12,),
    }


def test_biases_are_added_to_every_dense_and_layer_norm_on_request(model_config):
    model = GPT(dataclasses.replace(model_config, bias=True))
    names = set(flat_names(rough_params(model)))
    parents = {name.rpartition("/")[0] for name in names} - {"wte", "wpe"}
    assert {f"{parent}/bias" for parent in parents} == {n for n in names if n.endswith("/bias")}


def test_init_is_nanogpts(model_config):
    """Kernels N(0, 0.02), residual projections smaller by sqrt(2 n_layer), scales 1, biases 0."""
    config = dataclasses.replace(
        model_config, n_layer=3, n_embd=128, vocab_size=500, block_size=200, bias=True
    )
    params = jax.jit(partial(init_params, GPT(config)))(jax.random.key(2))
    for name, leaf in flat_names(params).items():
        if name.endswith("/scale"):
            assert (leaf == 1).all(), name
        elif name.endswith("/bias"):
            assert (leaf == 0).all(), name
        else:
            std = 0.02 / math.sqrt(6) if name.endswith("c_proj/kernel") else 0.02
            assert np.std(leaf) == pytest.approx(std, rel=0.03), name
            assert abs(np.mean(leaf)) < 0.05 * std, name


def test_the_head_is_the_token_embedding(model):
    """Scaling one token's embedding, if the token is not read, scales just its logit."""
    params = rough_params(model)
    tokens_BT = random_tokens(B, T) % (V - 1)
    scaled = jax.tree.map(lambda x: x, params)
    scaled["wte"]["embedding"] = (
        params["wte"]["embedding"] * np.where(np.arange(V) == V - 1, 3, 1)[:, None]
    )
    before_BTV, after_BTV = (logits(model, p, tokens_BT) for p in (params, scaled))
    np.testing.assert_allclose(after_BTV[..., V - 1], 3 * before_BTV[..., V - 1], rtol=1e-5)
    np.testing.assert_allclose(after_BTV[..., :-1], before_BTV[..., :-1], atol=1e-6)


def test_loss_at_the_start_is_that_of_a_blind_guess(model_config):
    config = dataclasses.replace(model_config, vocab_size=65, n_embd=128, block_size=64)
    model = GPT(config)
    tokens_BT1 = np.random.default_rng(0).integers(0, 65, (8, 65))
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    logits_BTV = logits(model, params, tokens_BT1[:, :-1])
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT1[:, 1:])
    assert losses_BT.mean() == pytest.approx(math.log(65), abs=0.1)


def chunkings(length):
    """All ways to cut `length` in two, and a few in more."""
    yield from ([at, length - at] for at in range(1, length))
    yield from ([length], [1] * length, [3, 1, 2, 2], [2, 5, 1])


def test_cache_equals_no_cache_however_the_text_is_cut(model):
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)
    apply = jax.jit(model.apply)
    whole_BTV, _ = apply(params, tokens_BT)
    for chunks in chunkings(T):
        cache, at, parts = init_cache(model.config, B), 0, []
        for n in chunks:
            part_BTV, cache = apply(params, tokens_BT[:, at : at + n], cache)
            parts.append(part_BTV)
            at += n
            assert cache.length == at
        parts_BTV = np.concatenate(parts, axis=1)
        np.testing.assert_allclose(parts_BTV, whole_BTV, atol=1e-5, err_msg=str(chunks))


def test_a_later_token_leaves_earlier_logits_alone(model):
    apply = jax.jit(model.apply)
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)
    before_BTV, _ = apply(params, tokens_BT)
    for changed in range(1, T):
        other_BT = tokens_BT.copy()
        other_BT[:, changed] = (other_BT[:, changed] + 1) % V
        difference_BTV = np.abs(apply(params, other_BT)[0] - before_BTV)
        assert difference_BTV[:, :changed].max() < 1e-6
        assert (difference_BTV[:, changed:].max((0, 2)) > 1e-4).all()


def test_rows_do_not_depend_on_each_other(model):
    params, tokens_BT = rough_params(model), random_tokens(B, T)
    logits_BTV, turned_BTV = (logits(model, params, x_BT) for x_BT in (tokens_BT, tokens_BT[::-1]))
    np.testing.assert_allclose(turned_BTV[::-1], logits_BTV, atol=1e-6)


def test_one_compilation_serves_every_position_of_the_cache(model):
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)
    apply = jax.jit(model.apply)
    cache = init_cache(model.config, B)
    for t in range(T):
        _, cache = apply(params, tokens_BT[:, t : t + 1], cache)
    assert apply._cache_size() == 1


def test_flat_dense_equals_flax_dense_with_its_gradients():
    x_BTD = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

    def value_and_grads(dense):
        params = dense.init(jax.random.key(0), x_BTD)

        def loss(params, x_BTD):
            return jnp.sin(dense.apply(params, x_BTD)).sum()

        return dense.apply(params, x_BTD), jax.grad(loss, argnums=(0, 1))(params, x_BTD)

    ours = value_and_grads(nn.Dense(5, dot_general=flat_dot_general))
    flax = value_and_grads(nn.Dense(5))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, flax)


def test_dropout_is_where_gpt2_has_it(model_config, monkeypatch):
    """On the embedding, the attention's weights, and both projections of each block."""
    model = GPT(dataclasses.replace(model_config, dropout=0.5))
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)
    drawn = []
    bernoulli = jax.random.bernoulli

    def spy(key, p, shape):
        drawn.append((float(p), tuple(shape)))
        return bernoulli(key, p, shape)

    monkeypatch.setattr(jax.random, "bernoulli", spy)
    rngs = {"dropout": jax.random.key(0)}
    model.apply(params, tokens_BT, deterministic=False, rngs=rngs)
    stream, weights = (0.5, (B, T, 12)), (0.5, (B, 2, T, T))
    assert drawn == [stream, weights, stream, stream, weights, stream, stream]


def test_dropout_is_a_function_of_its_key_and_off_by_default(model_config):
    model = GPT(dataclasses.replace(model_config, dropout=0.5))
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)

    @jax.jit
    def dropped(key):
        return model.apply(params, tokens_BT, deterministic=False, rngs={"dropout": key})[0]

    first_BTV, again_BTV, other_BTV = (dropped(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first_BTV, again_BTV)
    assert (first_BTV != other_BTV).any()
    without = GPT(model_config).apply(params, tokens_BT)[0]
    np.testing.assert_array_equal(model.apply(params, tokens_BT)[0], without)


def test_more_tokens_than_the_block_are_refused(model):
    with pytest.raises(AssertionError, match="9 tokens, but block_size is 8"):
        model.apply({"params": rough_params(model)}, random_tokens(B, T + 1))
