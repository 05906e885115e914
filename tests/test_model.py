"""The GPT: its parameters, its logits against NumPy, its cache against no cache."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt_jax.attention import drop, init_cache
from nanogpt_jax.config.presets import MODERN
from nanogpt_jax.hardware.products import flat_dot_general
from nanogpt_jax.model import GPT, Compute
from nanogpt_jax.steps import init_params, token_losses

B, T, V = 3, 8, 11
SHIFT = {"token_shift": True}
# Each part that is newer than GPT-2, alone and all together.
NEWER = [{"activation": "relu2"}, *({name: value} for name, value in MODERN.items()), MODERN]
NEWER += [SHIFT, {"attention_window": 4}]


def name_of(fields):
    if fields == MODERN:
        return "modern"
    if fields == {"bias": True, **MODERN}:
        return "modern, bias=True"
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "gpt2"


newer_parts = pytest.mark.parametrize("fields", NEWER, ids=name_of)
# For what only the cache or only the head can break: each kind costs a compilation.
some_kinds = pytest.mark.parametrize(
    "fields", [{}, {"positions": "rotary"}, MODERN, SHIFT], ids=name_of
)
heads = pytest.mark.parametrize("fields", [{}, {"tied_head": False}, MODERN | SHIFT], ids=name_of)


@pytest.fixture
def model(model_config):
    return GPT(model_config)


def rough_params(model):
    """Parameters far from zero, so that every part of the model matters."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(0.3, 0.3, x.shape).astype(np.float32), abstract)


@partial(jax.jit, static_argnums=0)
def apply(model, params, tokens_BT, cache=None):
    return model.apply({"params": params}, tokens_BT, cache)


def logits(model, params, tokens_BT):
    return apply(model, params, tokens_BT)[0]


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, V, shape)


def flat_names(params):
    return {
        "/".join(part.key for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def naive_gpt(params, tokens_T, config):
    """The forward pass of one sequence in float64; attention position by position."""
    params = jax.tree.map(partial(np.asarray, dtype=np.float64), params)

    def rms_norm(x_TD):
        return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-6)

    def norm(x_TD, p):
        if config.norm == "rmsnorm":
            return rms_norm(x_TD)
        centred_TD = x_TD - x_TD.mean(-1, keepdims=True)
        variance_T1 = (centred_TD**2).mean(-1, keepdims=True)
        return centred_TD / np.sqrt(variance_T1 + 1e-5) * p["scale"] + p.get("bias", 0)

    def dense(x_TD, p):
        return x_TD @ p["kernel"] + p.get("bias", 0)

    def rotate(x_TK):
        """Pairs of features are complex numbers."""
        half = x_TK.shape[-1] // 2
        angles_TK = np.outer(np.arange(len(x_TK)), 10_000 ** (-np.arange(half) / half))
        z_TK = (x_TK[:, :half] + 1j * x_TK[:, half:]) * np.exp(1j * angles_TK)
        return np.concatenate([z_TK.real, z_TK.imag], axis=-1)

    def shift(x_TD, block, i):
        if not config.token_shift:
            return x_TD
        previous_TD = np.concatenate([0 * x_TD[:1], x_TD[:-1]])
        return x_TD + block[f"shift_{i}"]["scale"] * previous_TD

    def attend(x_TD, p):
        q_TD, k_TD, v_TD = np.split(dense(x_TD, p["c_attn"]), 3, axis=-1)
        y_TD = np.zeros_like(x_TD)
        for head in np.split(np.arange(x_TD.shape[-1]), config.n_head):
            q_TK, k_TK = q_TD[:, head], k_TD[:, head]
            if config.qk_norm:
                q_TK, k_TK = rms_norm(q_TK), rms_norm(k_TK)
            if config.positions == "rotary":
                q_TK, k_TK = rotate(q_TK), rotate(k_TK)
            for t in range(len(x_TD)):
                seen = slice(max(0, t + 1 - (config.attention_window or t + 1)), t + 1)
                scores = k_TK[seen] @ q_TK[t] / np.sqrt(len(head))
                weights = np.exp(scores) / np.exp(scores).sum()
                y_TD[t, head] = weights @ v_TD[seen, head]
        return dense(y_TD, p["c_proj"])

    x_TD = params["wte"]["embedding"][tokens_T]
    if config.positions == "learned":
        x_TD = x_TD + params["wpe"]["embedding"][: len(tokens_T)]
    embedding_TD = x_TD
    for i in range(sum(name.startswith("h_") for name in params)):
        block = params[f"h_{i}"]
        x_TD = x_TD + block.get("embedding_scale", 0) * embedding_TD
        x_TD = x_TD + attend(shift(norm(x_TD, block.get("ln_1")), block, 1), block["attn"])
        up_TF = dense(shift(norm(x_TD, block.get("ln_2")), block, 2), block["mlp"]["c_fc"])
        x_TD = x_TD + dense(ACTIVATIONS[config.activation](up_TF), block["mlp"]["c_proj"])
    x_TD = norm(x_TD, params.get("ln_f"))
    tied = config.tied_head
    return x_TD @ (params["wte"]["embedding"].T if tied else params["lm_head"]["kernel"])


def gelu_exact(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def swiglu(x):
    gate, value = np.split(x, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * value


ACTIVATIONS = {
    "gelu": gelu_exact,
    "gelu_tanh": gelu_tanh,
    "relu2": lambda x: np.where(x > 0, x * x, 0),
    "swiglu": swiglu,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True},
        {"activation": "gelu_tanh"},
        {"bias": True, "activation": "gelu_tanh"},
        *NEWER,
        {"bias": True, **MODERN},
    ],
    ids=name_of,
)
def test_logits_equal_a_plain_numpy_gpt(model_config, fields):
    model = GPT(dataclasses.replace(model_config, **fields))
    params, tokens_BT = rough_params(model), random_tokens(B, T)
    logits_BTV, cache = apply(model, params, tokens_BT)
    assert cache is None
    assert logits_BTV.dtype == jnp.float32
    for b in range(B):
        expected_TV = naive_gpt(params, tokens_BT[b], model.config)
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


GPT2_SHAPES = {
    "wte/embedding": (11, 12),
    "wpe/embedding": (8, 12),
    "h/ln_1/scale": (12,),
    "h/attn/c_attn/kernel": (12, 36),
    "h/attn/c_proj/kernel": (12, 12),
    "h/ln_2/scale": (12,),
    "h/mlp/c_fc/kernel": (12, 48),
    "h/mlp/c_proj/kernel": (48, 12),
    "ln_f/scale": (12,),
}
NONE_OF_NORMS = dict.fromkeys(("h/ln_1/scale", "h/ln_2/scale", "ln_f/scale"))
OTHER_SHAPES = {  # what a field's value changes; None: does not exist
    ("positions", "rotary"): {"wpe/embedding": None},
    ("norm", "rmsnorm"): NONE_OF_NORMS,
    ("tied_head", False): {"lm_head/kernel": (12, 11)},
    ("token_shift", True): {"h/shift_1/scale": (12,), "h/shift_2/scale": (12,)},
    # 8/3 of 12 features, and as many gates: as many weights as 4 x 12 features without.
    ("activation", "swiglu"): {"h/mlp/c_fc/kernel": (12, 64), "h/mlp/c_proj/kernel": (32, 12)},
}


@newer_parts
@pytest.mark.parametrize("bias", [False, True])
def test_a_newer_part_changes_only_its_own_parameters(model_config, fields, bias):
    model = GPT(dataclasses.replace(model_config, bias=bias, **fields))
    shapes = {name: leaf.shape for name, leaf in flat_names(rough_params(model)).items()}
    expected = dict(GPT2_SHAPES)
    for field in fields.items():
        expected |= OTHER_SHAPES.get(field, {})
    expected = {name: shape for name, shape in expected.items() if shape is not None}
    if bias:
        has_bias = {
            name: shape
            for name, shape in expected.items()
            if name.startswith(("h/ln", "h/attn", "h/mlp", "ln"))
        }
        for name, shape in has_bias.items():
            expected[name.rpartition("/")[0] + "/bias"] = shape[-1:]
    in_blocks = {
        f"h_{i}{name[1:]}": shape
        for name, shape in expected.items()
        for i in range(2)
        if name.startswith("h/")
    }
    others = {name: shape for name, shape in expected.items() if not name.startswith("h/")}
    assert shapes == in_blocks | others


def test_token_shift_starts_at_zero(model_config):
    tokens_BT, key = random_tokens(B, T), jax.random.key(0)
    models = [GPT(dataclasses.replace(model_config, **fields)) for fields in ({}, SHIFT)]
    without, with_shift = (model.init_with_output(key, tokens_BT)[0][0] for model in models)
    np.testing.assert_allclose(with_shift, without, atol=1e-6)


def test_bias_adds_a_bias_to_every_dense_and_layer_norm(model_config):
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
    """Scaling the embedding of a token that is not read scales only its logit."""
    params = rough_params(model)
    tokens_BT = random_tokens(B, T) % (V - 1)
    scaled = jax.tree.map(lambda x: x, params)
    scaled["wte"]["embedding"] = (
        params["wte"]["embedding"] * np.where(np.arange(V) == V - 1, 3, 1)[:, None]
    )
    before_BTV, after_BTV = (logits(model, p, tokens_BT) for p in (params, scaled))
    np.testing.assert_allclose(after_BTV[..., V - 1], 3 * before_BTV[..., V - 1], rtol=1e-5)
    np.testing.assert_allclose(after_BTV[..., :-1], before_BTV[..., :-1], atol=1e-6)


@pytest.mark.parametrize("fields", [{"zero_init": True}, MODERN], ids=name_of)
def test_with_zero_init_the_blocks_add_nothing_at_first(model_config, fields):
    model = GPT(dataclasses.replace(model_config, bias=True, **fields))
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    zeros = {name for name, leaf in flat_names(params).items() if not leaf.any()}
    kernels = {name for name in zeros if name.endswith("kernel")}
    own_head = set() if model.config.tied_head else {"lm_head/kernel"}
    projections = {f"h_{i}/{part}/c_proj/kernel" for i in range(2) for part in ("attn", "mlp")}
    assert kernels == projections | own_head
    assert all(name.endswith(("kernel", "bias")) for name in zeros)  # no embedding, no scale
    other = jax.tree.map(lambda x: x, params)
    for i in range(2):  # what a block computes does not matter yet
        other[f"h_{i}"]["mlp"]["c_fc"]["kernel"] = 3 * params[f"h_{i}"]["mlp"]["c_fc"]["kernel"]
        other[f"h_{i}"]["attn"]["c_attn"]["kernel"] = jnp.ones((12, 36))
    stream = jax.jit(
        lambda p: model.apply({"params": p}, random_tokens(B, T), method="hidden_states")[0]
    )
    before_BTD, after_BTD = stream(params), stream(other)
    np.testing.assert_array_equal(before_BTD, after_BTD)
    assert np.abs(before_BTD).max() > 0.1


def test_a_zero_untied_head_starts_with_an_exactly_uniform_guess(model_config):
    model = GPT(dataclasses.replace(model_config, **MODERN))
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    losses_BT = jax.jit(partial(token_losses, model))(params, random_tokens(B, T + 1))
    np.testing.assert_allclose(losses_BT, math.log(V), rtol=1e-6)


def test_an_untied_head_is_initialised_like_the_embedding(model_config):
    fields = {"n_layer": 1, "n_embd": 128, "vocab_size": 500, "tied_head": False}
    config = dataclasses.replace(model_config, **fields)
    kernel_DV = jax.jit(partial(init_params, GPT(config)))(jax.random.key(0))["lm_head"]["kernel"]
    assert np.std(kernel_DV) == pytest.approx(0.02, rel=0.03)


@heads
def test_the_padding_of_a_vocabulary_has_no_probability(model_config, fields):
    config = dataclasses.replace(model_config, **fields)
    padded = dataclasses.replace(config, known_tokens=V - 2)
    params, tokens_BT = rough_params(GPT(config)), random_tokens(B, T) % (V - 2)
    whole_BTV, known_BTV = (logits(GPT(c), params, tokens_BT) for c in (config, padded))
    assert (known_BTV[..., V - 2 :] == -np.inf).all()
    np.testing.assert_array_equal(known_BTV[..., : V - 2], whole_BTV[..., : V - 2])


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("part", [0, 1], ids=["q", "k"])
def test_qk_norm_ignores_the_size_of_queries_and_keys(model_config, positions, part):
    config = dataclasses.replace(model_config, positions=positions)
    model, without = GPT(dataclasses.replace(config, qk_norm=True)), GPT(config)
    params, tokens_BT = rough_params(model), random_tokens(B, T)
    larger = jax.tree.map(lambda x: x, params)
    columns = np.where(np.arange(36) // 12 == part, 10, 1).astype(np.float32)
    for i in range(2):
        larger[f"h_{i}"]["attn"]["c_attn"]["kernel"] = (
            params[f"h_{i}"]["attn"]["c_attn"]["kernel"] * columns[None]
        )
    before_BTV, after_BTV = (logits(model, p, tokens_BT) for p in (params, larger))
    np.testing.assert_allclose(after_BTV, before_BTV, atol=1e-4)
    assert (
        np.abs(logits(without, larger, tokens_BT) - logits(without, params, tokens_BT)).max() > 0.1
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@heads
def test_16_bit_logits_are_float32_and_close_to_exact_ones(model_config, fields, dtype):
    """If they were rounded to 16 bits, a cast there and back would not change them."""
    config = dataclasses.replace(model_config, **fields)
    params, tokens_BT = rough_params(GPT(config)), random_tokens(B, T)
    exact_BTV = logits(GPT(config), params, tokens_BT)
    logits_BTV = logits(GPT(config, Compute(dtype=jnp.dtype(dtype))), params, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    assert (logits_BTV != logits_BTV.astype(dtype).astype(jnp.float32)).any()
    np.testing.assert_allclose(logits_BTV, exact_BTV, atol=0.15)
    assert (logits_BTV != exact_BTV).any()


@pytest.mark.slow
def test_remat_and_loss_chunks_change_nothing_in_a_modern_gpt(model_config):
    newer = MODERN | SHIFT
    config = dataclasses.replace(model_config, known_tokens=V - 1, n_layer=1, **newer)
    params = rough_params(GPT(config))
    batch_BT1 = random_tokens(B, T + 1) % (V - 1)

    def loss_and_grads(model):
        def loss(params):
            return token_losses(model, params, batch_BT1).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    plain = loss_and_grads(GPT(config))
    for compute in (Compute(remat=True), Compute(loss_chunks=4)):
        other = loss_and_grads(GPT(config, compute))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), other, plain)
    assert all(grad.any() for grad in jax.tree.leaves(plain[1]))


def splits_of(length, fields):
    """Lengths of parts: every split in two for GPT-2, fewer lengths for others, to compile less."""
    yield from ([1] * length, [3, 1, 2, 2])
    if not fields:
        yield from ([at, length - at] for at in range(1, length))


@some_kinds
def test_cache_equals_no_cache_however_the_text_is_split(model_config, fields):
    model = GPT(dataclasses.replace(model_config, **fields))
    params, tokens_BT = rough_params(model), random_tokens(B, T)
    whole_BTV, _ = apply(model, params, tokens_BT)
    for chunks in splits_of(T, fields):
        cache, at, parts = init_cache(model.config, B), 0, []
        for n in chunks:
            part_BTV, cache = apply(model, params, tokens_BT[:, at : at + n], cache)
            parts.append(part_BTV)
            at += n
            assert cache.length == at
        parts_BTV = np.concatenate(parts, axis=1)
        np.testing.assert_allclose(parts_BTV, whole_BTV, atol=1e-5, err_msg=str(chunks))


@some_kinds
def test_a_later_token_does_not_change_earlier_logits(model_config, fields):
    model = GPT(dataclasses.replace(model_config, **fields))
    params, tokens_BT = rough_params(model), random_tokens(B, T)
    before_BTV = logits(model, params, tokens_BT)
    for changed in range(1, T):
        other_BT = tokens_BT.copy()
        other_BT[:, changed] = (other_BT[:, changed] + 1) % V
        difference_BTV = np.abs(logits(model, params, other_BT) - before_BTV)
        assert difference_BTV[:, :changed].max() < 1e-6
        assert (difference_BTV[:, changed:].max((0, 2)) > 1e-4).all()


def test_rows_do_not_depend_on_each_other(model):
    params, tokens_BT = rough_params(model), random_tokens(B, T)
    logits_BTV, turned_BTV = (logits(model, params, x_BT) for x_BT in (tokens_BT, tokens_BT[::-1]))
    np.testing.assert_allclose(turned_BTV[::-1], logits_BTV, atol=1e-6)


def test_one_compilation_serves_every_position_of_the_cache(model):
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)
    step = jax.jit(model.apply)
    cache = init_cache(model.config, B)
    for t in range(T):
        _, cache = step(params, tokens_BT[:, t : t + 1], cache)
    assert step._cache_size() == 1


def test_flat_dense_equals_flax_dense_with_its_gradients():
    x_BTD = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

    def value_and_grads(dense):
        kernel_DF = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
        params = {"params": {"kernel": kernel_DF, "bias": np.ones(5, np.float32)}}

        def loss(params, x_BTD):
            return jnp.sin(dense.apply(params, x_BTD)).sum()

        return dense.apply(params, x_BTD), jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x_BTD)

    ours = value_and_grads(nn.Dense(5, dot_general=flat_dot_general))
    flax = value_and_grads(nn.Dense(5))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, flax)


def test_dropout_is_where_gpt2_has_it(model_config, monkeypatch):
    """On the embedding, the attention weights, and both projections of each block."""
    model = GPT(dataclasses.replace(model_config, dropout=0.5))
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)
    drawn = []

    def spy(array, rate, key):
        drawn.append((rate, array.shape))
        return drop(array, rate, key)

    monkeypatch.setattr("nanogpt_jax.attention.drop", spy)
    monkeypatch.setattr("nanogpt_jax.model.drop", spy)
    rngs = {"dropout": jax.random.key(0)}
    jax.eval_shape(partial(model.apply, deterministic=False, rngs=rngs), params, tokens_BT)
    stream, weights = (0.5, (B, T, 12)), (0.5, (B, 2, T, T))
    assert drawn == [stream, weights, stream, stream, weights, stream, stream]


def test_dropout_depends_only_on_its_key_and_is_off_by_default(model_config):
    plain = dataclasses.replace(model_config, n_layer=1)
    model = GPT(dataclasses.replace(plain, dropout=0.5))
    params, tokens_BT = {"params": rough_params(model)}, random_tokens(B, T)

    @jax.jit
    def dropped(key):
        return model.apply(params, tokens_BT, deterministic=False, rngs={"dropout": key})[0]

    first_BTV, again_BTV, other_BTV = (dropped(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first_BTV, again_BTV)
    assert (first_BTV != other_BTV).any()
    without, by_default = (logits(gpt, params["params"], tokens_BT) for gpt in (GPT(plain), model))
    np.testing.assert_array_equal(by_default, without)
    assert (first_BTV != without).any()


def test_more_tokens_than_block_size_are_refused(model):
    with pytest.raises(AssertionError, match="9 tokens, but block_size is 8"):
        model.apply({"params": rough_params(model)}, random_tokens(B, T + 1))
