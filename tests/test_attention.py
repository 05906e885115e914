"""Attention, rotary positions and the fused kernels, against plain loops and formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from nanogpt_jax.attention import (
    attention,
    drop,
    init_cache,
    random_bits,
    rotate,
)
from nanogpt_jax.hardware.fused import fused_attention
from nanogpt_jax.hardware.products import float32_einsum
from nanogpt_jax.sharding import make_mesh


def random_qkv(B=2, T=5, S=5, H=3, K=4):
    rng = np.random.default_rng(0)
    shapes = (B, T, H, K), (B, S, H, K), (B, S, H, K)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def naive_attention(q_BTHK, k_BSHK, v_BSHK, start=0, window=100):
    B, T, H, K = q_BTHK.shape
    y_BTHK = np.zeros(q_BTHK.shape)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                seen = range(max(0, start + t + 1 - window), start + t + 1)
                scores = [np.dot(q_BTHK[b, t, h], k_BSHK[b, s, h]) / np.sqrt(K) for s in seen]
                total = sum(np.exp(scores))
                for s, score in zip(seen, scores, strict=True):
                    y_BTHK[b, t, h] += np.exp(score) / total * v_BSHK[b, s, h]
    return y_BTHK


def attention_weights(T, S, start=0, **more):
    """The weights themselves: with q = 0 all visible keys count equally, and v is the identity."""
    q_BTHK = jnp.zeros((1, T, 1, S))
    v_BSHK = jnp.eye(S)[None, :, None]
    return np.asarray(attention(q_BTHK, jnp.ones_like(v_BSHK), v_BSHK, start, **more))[0, :, 0]


def test_attention_equals_a_loop_over_queries_and_keys():
    qkv = random_qkv()
    np.testing.assert_allclose(attention(*qkv), naive_attention(*qkv), atol=1e-6)


def test_a_query_sees_the_keys_up_to_its_own_position():
    seen_TS = [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    counts_T1 = np.array([[1], [2], [3], [4]])
    np.testing.assert_allclose(attention_weights(4, 4) * counts_T1, seen_TS, atol=1e-6)


def test_a_query_past_the_start_sees_the_cache_up_to_itself():
    seen_TS = [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
    ]
    counts_T1 = np.array([[3], [4]])
    np.testing.assert_allclose(attention_weights(2, 6, start=2) * counts_T1, seen_TS, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 3, 6])
def test_unused_entries_of_a_cache_have_no_influence(start):
    q_BTHK, k_BSHK, v_BSHK = random_qkv(T=2, S=8)
    y_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, start)
    np.testing.assert_allclose(y_BTHK, naive_attention(q_BTHK, k_BSHK, v_BSHK, start), atol=1e-6)
    k_BSHK[:, start + 2 :] = 1e4
    v_BSHK[:, start + 2 :] = -1e4
    np.testing.assert_array_equal(attention(q_BTHK, k_BSHK, v_BSHK, start), y_BTHK)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 12])  # 5: no whole number of pieces
def test_a_query_sees_only_the_last_keys_of_a_window(window):
    qkv = random_qkv(T=12, S=12)
    expected = naive_attention(*qkv, window=window)
    np.testing.assert_allclose(attention(*qkv, window=window), expected, atol=1e-6)
    q_BTHK, k_BSHK, v_BSHK = random_qkv(T=2, S=12)
    expected = naive_attention(q_BTHK, k_BSHK, v_BSHK, 7, window)
    np.testing.assert_allclose(attention(q_BTHK, k_BSHK, v_BSHK, 7, window), expected, atol=1e-6)


def test_a_window_in_a_full_cache_begins_again_at_its_first_entry():
    seen_TS = [[3, 0, 0, 3, 3]]  # position 15 is entry 0, those before it are 3 and 4
    np.testing.assert_allclose(attention_weights(1, 5, start=15, window=3) * 9, seen_TS, atol=1e-5)


def test_dropout_reaches_every_piece_of_a_window():
    whole_TS = attention_weights(12, 12, window=4)
    dropped_TS = attention_weights(
        12, 12, window=4, dropout_rate=0.25, dropout_key=jax.random.key(0)
    )
    is_zero, is_kept = dropped_TS == 0, np.isclose(dropped_TS, whole_TS / 0.75)
    assert (is_zero | is_kept).all()
    assert (is_zero & (whole_TS > 0)).reshape(3, -1).any(axis=1).all()


def test_large_scores_do_not_overflow():
    q_BTHK, k_BSHK, v_BSHK = random_qkv()
    y_BTHK = attention(1e6 * q_BTHK, 1e6 * k_BSHK, v_BSHK)
    assert np.isfinite(y_BTHK).all()
    np.testing.assert_allclose(y_BTHK[:, 0], v_BSHK[:, 0], atol=1e-6)


def test_dropout_zeroes_weights_and_scales_up_the_rest():
    whole_TS = attention_weights(8, 8)
    dropped_TS = attention_weights(8, 8, dropout_rate=0.25, dropout_key=jax.random.key(0))
    is_zero, is_kept = dropped_TS == 0, np.isclose(dropped_TS, whole_TS / 0.75)
    assert (is_zero | is_kept).all()
    assert 0 < (is_zero & (whole_TS > 0)).sum() < 18


def test_dropout_keeps_the_expectation():
    def dropped_weights(key):
        q_BTHK = jnp.zeros((1, 4, 1, 4))
        v_BSHK = jnp.eye(4)[None, :, None]
        return attention(q_BTHK, v_BSHK, v_BSHK, 0, 0, 0.25, key)[0, :, 0]

    keys = jax.random.split(jax.random.key(1), 4000)
    mean_TS = jax.jit(jax.vmap(dropped_weights))(keys).mean(0)
    np.testing.assert_allclose(mean_TS, attention_weights(4, 4), atol=0.05)


def standardized_masks(n_keys, rate=0.2, shape=(4, 2, 64, 256)):
    """What dropout keeps, for successive keys, with mean 0 and variance 1 if it is independent."""
    keys = jax.random.split(jax.random.key(3), n_keys)
    kept = np.stack([drop(jnp.ones(shape), rate, key) > 0 for key in keys])
    return (kept - (1 - rate)) / np.sqrt(rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_dropout_has_the_rate_that_was_asked_for(rate):
    mask = standardized_masks(60, rate)
    assert abs(mask.mean()) * np.sqrt(mask.size) < 4  # standard errors, of 1e-4
    assert mask.size > 7e6


def test_dropped_elements_are_independent():
    """Of their neighbours on each axis, of the other half of a hash, of other keys."""
    mask_NBHTS = standardized_masks(30)
    pairs = {
        axis: np.take(mask_NBHTS, range(1, n), axis) for axis, n in enumerate(mask_NBHTS.shape)
    }
    for axis, later in pairs.items():
        earlier = np.take(mask_NBHTS, range(mask_NBHTS.shape[axis] - 1), axis)
        assert abs((earlier * later).mean()) * np.sqrt(later.size) < 4, axis
    halves = mask_NBHTS[..., :128] * mask_NBHTS[..., 128:]
    assert abs(halves.mean()) * np.sqrt(halves.size) < 4
    for axis in (-1, -2):  # sums of rows and of columns vary as those of independent elements
        sums = mask_NBHTS.sum(axis)
        variance = (sums**2).mean() / mask_NBHTS.shape[axis]
        assert abs(variance - 1) * np.sqrt(sums.size / 2) < 4


def test_random_bits_of_an_odd_length_and_of_another_generators_key():
    for key in (jax.random.key(0), jax.random.key(0, impl="rbg")):
        bits = np.asarray(random_bits(key, (50, 21)))
        assert bits.shape == (50, 21)
        assert 60_000 < bits.max() < 2**16
        assert len(np.unique(bits)) > 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_float32_product_sums_in_float32_and_has_the_gradient_of_its_operands_type(dtype):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((40, 300), (300, 50)))
    upstream = rng.normal(size=(40, 50)).astype(np.float32)
    out, transpose = jax.vjp(partial(float32_einsum, "ND,DV->NV"), x, y)
    assert out.dtype == jnp.float32
    exact_x, exact_y = (np.asarray(array, np.float64) for array in (x, y))
    np.testing.assert_allclose(out, exact_x @ exact_y, atol=1e-4)
    gradients = transpose(upstream)
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for gradient, expected in zip(
        gradients, (upstream @ exact_y.T, exact_x.T @ upstream), strict=True
    ):
        assert gradient.dtype == dtype
        error = np.linalg.norm(np.asarray(gradient, np.float64) - expected)
        assert error < tolerance * np.linalg.norm(expected)


def test_dropout_is_off_without_a_key_or_without_a_rate():
    whole_TS = attention_weights(4, 4)
    np.testing.assert_array_equal(attention_weights(4, 4, dropout_rate=0.5), whole_TS)
    np.testing.assert_array_equal(attention_weights(4, 4, dropout_key=jax.random.key(0)), whole_TS)


def test_an_empty_cache_has_room_for_the_block_in_every_layer(model_config):
    cache = init_cache(model_config, batch_size=3)
    assert cache.length == 0
    assert [k_BHKS.shape for k_BHKS in cache.k_BHKS] == 2 * [(3, 2, 6, 8)]
    assert [v_BHKS.shape for v_BHKS in cache.v_BHKS] == 2 * [(3, 2, 6, 8)]


# Rotary positions


def scores(q_BTHK, k_BSHK):
    return np.einsum("BTHK,BSHK->BHTS", *(np.asarray(x, np.float64) for x in (q_BTHK, k_BSHK)))


@pytest.mark.parametrize("start", [0, 5, 1000])
@pytest.mark.parametrize("K", [2, 6, 64])
def test_rotating_is_multiplying_complex_numbers(K, start):
    x_BTHK, _, _ = random_qkv(K=K)
    speeds = 10_000.0 ** (-np.arange(K // 2) / (K // 2))
    turns_TK = np.exp(1j * np.outer(start + np.arange(5), speeds))[None, :, None]
    z_BTHK = (x_BTHK[..., : K // 2] + 1j * x_BTHK[..., K // 2 :]) * turns_TK
    expected_BTHK = np.concatenate([z_BTHK.real, z_BTHK.imag], axis=-1)
    atol = 1e-5 if start < 10 else 1e-3  # float32 angles
    np.testing.assert_allclose(rotate(x_BTHK, start), expected_BTHK, atol=atol)


def test_heads_of_every_even_size_can_be_rotated():
    """The number of frequencies is counted, not derived from rounded fractions."""
    for K in range(2, 260, 2):
        shape = jax.ShapeDtypeStruct((1, 2, 1, K), jnp.float32)
        assert jax.eval_shape(rotate, shape).shape == shape.shape, K


@pytest.mark.parametrize("start", [1, 7, 1000])
def test_scores_depend_only_on_the_distance(start):
    q_BTHK, k_BTHK, _ = random_qkv(K=8)
    expected_BHTS = scores(rotate(q_BTHK), rotate(k_BTHK))
    shifted_BHTS = scores(rotate(q_BTHK, start), rotate(k_BTHK, start))
    atol = 1e-5 if start < 10 else 1e-2  # float32 angles
    np.testing.assert_allclose(shifted_BHTS, expected_BHTS, atol=atol)
    # With the keys one position further on, the scores differ.
    assert (
        np.abs(scores(rotate(q_BTHK, start), rotate(k_BTHK, start + 1)) - expected_BHTS).max() > 0.1
    )


def test_equal_distances_give_equal_scores():
    """With one query and one key at all positions, each diagonal of the scores is constant."""
    q_BTHK, k_BTHK, _ = (np.repeat(x[:, :1], 5, axis=1) for x in random_qkv(K=8))
    scores_BHTS = scores(rotate(q_BTHK, 7), rotate(k_BTHK, 7))
    np.testing.assert_allclose(scores_BHTS[..., 1:, 1:], scores_BHTS[..., :-1, :-1], atol=1e-5)
    assert np.abs(scores_BHTS[..., 1:, 0] - scores_BHTS[..., :1, 0]).min() > 1e-4


def test_the_first_position_is_not_rotated():
    x_BTHK, _, _ = random_qkv()
    np.testing.assert_array_equal(rotate(x_BTHK)[:, 0], x_BTHK[:, 0])
    assert (rotate(x_BTHK)[:, 1:] != x_BTHK[:, 1:]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rotating_keeps_lengths_and_dtype(dtype):
    x_BTHK = jnp.asarray(random_qkv(K=16)[0], dtype)
    rotated_BTHK = rotate(x_BTHK, 12345)
    assert rotated_BTHK.dtype == x_BTHK.dtype
    lengths, expected = (
        jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (rotated_BTHK, x_BTHK)
    )
    np.testing.assert_allclose(lengths, expected, rtol=1e-6 if dtype == "float32" else 1e-2)


def test_one_compilation_serves_every_start():
    x_BTHK, _, _ = random_qkv()
    jitted = jax.jit(rotate)
    for start in (0, 3, 1000):
        expected_BTHK = rotate(x_BTHK, start)
        np.testing.assert_allclose(jitted(x_BTHK, jnp.int32(start)), expected_BTHK, atol=1e-3)
    assert jitted._cache_size() == 1


# 16-bit arrays


def test_bfloat16_attention_is_close_to_float32():
    qkv = random_qkv(T=64, S=64, K=16)
    y_BTHK = attention(*(jnp.asarray(x_BTHK, jnp.bfloat16) for x_BTHK in qkv))
    assert y_BTHK.dtype == jnp.bfloat16
    np.testing.assert_allclose(y_BTHK.astype(jnp.float32), attention(*qkv), atol=2e-2)


@pytest.mark.parametrize(("dtype", "large"), [("bfloat16", 32), ("float16", 512)])
def test_scores_are_float32_even_if_the_arrays_are_not(dtype, large):
    """1024 and 1025 are the same number in bfloat16, and 512 * 512 is infinite in float16."""
    q_BTHK = jnp.array([[large, 1], [large, 1]], dtype)[None, :, None]
    k_BSHK = jnp.array([[large, 0], [large, 1]], dtype)[None, :, None]
    v_BSHK = jnp.array([[0, 0], [1, 1]], dtype)[None, :, None]
    second = 1 / (1 + np.exp(-1 / np.sqrt(2)))
    y_BTHK = attention(q_BTHK, k_BSHK, v_BSHK).astype(jnp.float32)
    np.testing.assert_allclose(y_BTHK[0, :, 0, 0], [0, second], atol=2e-2)


# Fused kernels


def value_and_grads(work, qkv, weights_BTHK):
    """(y_BTHK, gradients by q, k and v of a weighted sum of it)."""

    def loss(*qkv):
        y_BTHK = work(*qkv).astype(jnp.float32)
        return (y_BTHK * weights_BTHK).sum(), y_BTHK

    (_, y_BTHK), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return y_BTHK, *(grad_BTHK.astype(jnp.float32) for grad_BTHK in grads)


@pytest.mark.parametrize(
    ("dtype", "T", "K", "atol", "sizes"),
    [("float32", 128, 32, 1e-5, None), ("bfloat16", 256, 64, 2e-2, (2, 1, 2))],
    ids=["one device", "mesh"],
)
def test_splash_equals_plain_attention_in_values_and_gradients(dtype, T, K, atol, sizes):
    qkv = random_qkv(T=T, S=T, H=2, K=K)
    weights_BTHK = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    expected = value_and_grads(attention, qkv, weights_BTHK)
    mesh = sizes and make_mesh(sizes)
    splash = partial(fused_attention, kernel="splash", mesh=mesh, interpret=True)
    qkv = [jnp.asarray(x_BTHK, dtype) for x_BTHK in qkv]
    for got_BTHK, expected_BTHK in zip(
        value_and_grads(splash, qkv, weights_BTHK), expected, strict=True
    ):
        np.testing.assert_allclose(got_BTHK, expected_BTHK, atol=atol)


@pytest.mark.parametrize("sizes", [None, (2, 1, 2)], ids=["one device", "mesh"])
def test_cudnn_is_called_forward_and_backward(sizes, monkeypatch):
    """Lowering for an NVIDIA GPU needs none."""
    mesh = sizes and make_mesh(sizes)

    def loss(*qkv):
        return fused_attention(*qkv, kernel="cudnn", mesh=mesh).astype(jnp.float32).sum()

    x_BTHK = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(x_BTHK, x_BTHK, x_BTHK)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
