"""Causal self-attention without parameters, and the cache of keys and values for decoding.

Array names end in their shape; the letters are explained in model.py.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax.config import ModelConfig
from nanogpt_jax.hardware.products import float32_einsum

ROTARY_BASE = 10_000
WEIGHTS = "attention_weights"  # the Flax collection in which a model leaves them, if asked to


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; goes into the model and comes out of it."""

    length: jax.Array  # int32 scalar: tokens seen; the next one is written there, modulo S
    k_BHKS: tuple[jax.Array, ...]  # one array a layer; entries from `length` on are unused
    v_BHKS: tuple[jax.Array, ...]
    #: with token_shift: inputs of attention and MLP, before the shift; only the newest counts
    attn_BND: tuple[jax.Array, ...] = ()
    mlp_BND: tuple[jax.Array, ...] = ()


def init_cache(config: ModelConfig, batch_size: int, dtype=jnp.float32) -> KVCache:
    """Return an empty cache with room for block_size tokens in each of batch_size rows."""
    shape = (batch_size, config.n_head, config.n_embd // config.n_head, config.block_size)
    shapes = [shape] * 2 + [(batch_size, 1, config.n_embd)] * 2 * config.token_shift
    arrays = [tuple(jnp.zeros(s, dtype) for _ in range(config.n_layer)) for s in shapes]
    return KVCache(jnp.int32(0), *arrays)


def rotate(x_BTHK, start=0):
    """Rotate queries or keys by their positions, so that a score depends on their distance.

    Features k and k + K/2 of a head are a point in a plane, which turns by ROTARY_BASE^(-2k/K) with
    each position.

    Args:
        start: position of the first one.

    Source: Su et al., "RoFormer", 2021.
    """
    _, T, _, K = x_BTHK.shape
    frequencies_K = ROTARY_BASE ** (-2 / K * np.arange(K // 2, dtype=np.float32))
    angles_TK = (start + jnp.arange(T))[:, None] * frequencies_K[None]
    cos_TK, sin_TK = jnp.cos(angles_TK)[None, :, None], jnp.sin(angles_TK)[None, :, None]
    x, y = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x * cos_TK - y * sin_TK, x * sin_TK + y * cos_TK], axis=-1)
    return rotated.astype(x_BTHK.dtype)


def random_bits(key, shape: tuple[int, ...]):
    """Return 16 random bits an element, as uint32, a function of the key and the position alone.

    On a CPU, threefry would take half the time of training with dropout; this hash takes a tenth as
    long. However the array is split over devices, its bits are the same.

    Source of the hash: Wellons, "Prospecting for hash functions", 2018 (lowbias32), used twice.
    """
    *rows, n = shape
    half = -(-n // 2)  # a hash has bits for two elements
    x = jnp.arange(math.prod(rows) * half, dtype=jnp.uint32).reshape(*rows, half)
    for word in jax.random.key_data(key)[-2:]:
        x ^= word
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        x ^= x >> 16
    return jnp.concatenate([x & 0xFFFF, x >> 16], axis=-1)[..., :n]


def drop(array, rate: float, key):
    """Drop elements at this rate and scale the rest up to keep the expected sum."""
    keep = random_bits(key, array.shape) >= round(rate * 2**16)
    return jnp.where(keep, array / (1 - rate), 0)


def attention_weights(q_BTHK, k_BSHK, start=0, window: int = 0):
    """Return weights_BHTS = softmax(q k^T / sqrt(K)), each query seeing the keys up to its own.

    In float32, whatever the type of the arrays.

    Args:
        start: position of the first query among the keys; the query in row t sees keys 0 to
            start + t, so unused entries of a cache are never read.
        window: it sees only the last so many of them; 0: all.

    Source: Vaswani et al., "Attention is all you need", 2017, section 3.2.1.
    """
    (_, T, _, K), S = q_BTHK.shape, k_BSHK.shape[1]
    scores_BHTS = float32_einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK)
    scores_BHTS = scores_BHTS / K**0.5
    distance_TS = start + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    visible_TS = distance_TS >= 0
    if window:  # modulo S, since a full cache begins again at its first entry
        visible_TS &= distance_TS % S < window
    hidden = jnp.finfo(scores_BHTS.dtype).min
    scores_BHTS = jnp.where(visible_TS[None, None], scores_BHTS, hidden)
    return jax.nn.softmax(scores_BHTS, axis=-1)


def attention(
    q_BTHK, k_BSHK, v_BSHK, start=0, window: int = 0, dropout_rate: float = 0.0, dropout_key=None
):
    """Return y_BTHK: at each position the values, averaged with its `attention_weights`.

    Args:
        start, window: see `attention_weights`.
        dropout_rate: of the weights, applied if a dropout_key is given.

    Source of the window: Beltagy et al., "Longformer", 2020.
    """
    T, S = q_BTHK.shape[1], k_BSHK.shape[1]
    if 0 < window < T == S and T % window == 0:  # whole sequences, in pieces as long as the window

        def rows(x_BTHK):
            return x_BTHK.reshape(-1, window, *x_BTHK.shape[2:])

        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        q, k, v = (x[:, :window] for x in (q_BTHK, k_BSHK, v_BSHK))
        first = attention(q, k, v, 0, 0, dropout_rate, keys[0])
        # Each other piece, as a row of its own, sees itself and the piece before it.
        pairs = ([rows(x[:, :-window]), rows(x[:, window:])] for x in (k_BSHK, v_BSHK))
        k, v = (jnp.concatenate(pair, axis=1) for pair in pairs)
        rest = attention(rows(q_BTHK[:, window:]), k, v, window, window, dropout_rate, keys[1])
        return jnp.concatenate([first, rest.reshape(q_BTHK[:, window:].shape)], axis=1)
    weights_BHTS = attention_weights(q_BTHK, k_BSHK, start, window)
    if dropout_key is not None and dropout_rate > 0:
        weights_BHTS = drop(weights_BHTS, dropout_rate, dropout_key)
    return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS.astype(v_BSHK.dtype), v_BSHK)
