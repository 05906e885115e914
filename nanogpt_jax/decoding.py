"""Generate tokens: prefill, cached decoding, and the cache-free reference it is tested against.

The model sees at most block_size tokens. When the cache is full, the last half of the window is
kept and read again in one prefill, then decoding continues: one prefill per block_size / 2 tokens.
With rotary positions nothing is read again: only distances count, so the newest token overwrites
the oldest one in the cache. nanoGPT instead reads the last block_size tokens again for each token
(`exact_window`). But for rounding, all three give the same text until the window is first full.

The host decides what comes next: compiled programs that branch make a GPU wait for every token.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from nanogpt_jax.attention import KVCache, init_cache
from nanogpt_jax.model import Model

AT_ONCE = 32  # tokens of one compiled call, where nobody waits for each
MAX_NOISE = 2**26  # numbers drawn for them


class Sampling(NamedTuple):
    """How to draw the next token. Hashable: a constant of the compiled function."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # 1: all tokens


def row_keys(seed: int, rows: range) -> jax.Array:
    """Return one key per row: row n of a seed is the same text however many rows there are."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.array(rows))


def noise(keys_B, n_generated, V: int):
    """Return gumbel_BV, the noise of one token of each row; the likeliest token with it is drawn.

    Args:
        n_generated: new tokens before this one, the step of the random stream.
    """
    token_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, n_generated)
    return jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(token_keys_B)


def sample_token(logits_BV, gumbel_BV, sampling: Sampling):
    """Draw one token for each row: tokens_B.

    Ties with the last token that top_k or top_p keeps are kept too, as in nanoGPT.
    Source of top_p: Holtzman et al., "The curious case of neural text degeneration", 2020.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # Shifted, so that no logit overflows however small the temperature.
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    logits_BV = logits_BV / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # the mass of all likelier tokens
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
        least_B1 = kept_BV.min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jnp.argmax(logits_BV + gumbel_BV, axis=-1).astype(jnp.int32)


def start_window(tokens_BN: np.ndarray, T: int) -> tuple[np.ndarray, int]:
    """Return (window_BT, length): the last T tokens of each row, padded to T if there are fewer."""
    tokens_BN = tokens_BN[:, -T:]
    B, length = tokens_BN.shape
    window_BT = np.zeros((B, T), np.int32)
    window_BT[:, :length] = tokens_BN
    return window_BT, length


def prefill(
    model: Model, params, window_BT, length, exact_window: bool = False
) -> tuple[jax.Array, KVCache | None]:
    """Read a prompt: (logits_BV of the next token, cache; None with exact_window).

    Args:
        window_BT: int32, the prompt padded to T with any ids: one compilation for all prompts.
        length: tokens of the prompt, 1 to T.
    """
    B = window_BT.shape[0]
    cache = None if exact_window else init_cache(model.config, B, model.compute.dtype)
    variables = {"params": params}
    x_BTD, cache = model.apply(variables, window_BT, cache, method="hidden_states")
    last = partial(lax.dynamic_slice_in_dim, start_index=length - 1, slice_size=1, axis=1)
    if cache is not None:  # what the padding left in it is overwritten before it is seen
        cache = KVCache(jnp.int32(length), *cache[1:3], *jax.tree.map(last, cache[3:]))
    x_B1D = last(x_BTD)  # only that one's logits
    return model.apply(variables, x_B1D, method="head")[:, 0], cache


def read(model: Model, params, cache: KVCache, tokens_B) -> tuple[jax.Array, KVCache]:
    """Read one token of each row: (logits_BV of the next one, cache)."""
    logits_B1V, cache = model.apply({"params": params}, tokens_B[:, None], cache)
    return logits_B1V[:, 0], cache


def draw(logits_BV, keys_B, n_generated, sampling: Sampling):
    """Draw the next token of each row: tokens_B; n_generated as in `noise`."""
    return sample_token(logits_BV, noise(keys_B, n_generated, logits_BV.shape[-1]), sampling)


def decode(
    model: Model, params, cache: KVCache, tokens_B, keys_B, n_generated, n_tokens: int,
    sampling: Sampling,
) -> tuple[tuple[KVCache, jax.Array], jax.Array]:  # fmt: skip
    """Read a token of each row and draw the next, n_tokens times: ((cache, newest_B), tokens_BN).

    Args:
        tokens_B: the newest token of each row, which is not in the cache.
        n_generated: see `noise`.
    """

    def step(carry, gumbel_BV):
        cache, tokens_B = carry
        logits_BV, cache = read(model, params, cache, tokens_B)
        tokens_B = sample_token(logits_BV, gumbel_BV, sampling)
        return (cache, tokens_B), tokens_B

    # All noise at once: one by one it takes a quarter of the time of `small`'s tokens on a CPU.
    V = model.config.vocab_size
    assert V is not None, "a trained model has a vocabulary"
    gumbel_NBV = jax.vmap(partial(noise, keys_B, V=V))(n_generated + jnp.arange(n_tokens))
    carry, tokens_NB = lax.scan(step, (cache, tokens_B), gumbel_NBV)
    return carry, tokens_NB.T


def cast(params, dtype):
    """Return parameters whose matrices have the type of the products, cast once for all tokens."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim >= 2 else x, params)


_cast = jax.jit(cast, static_argnames="dtype")
_prefill = jax.jit(prefill, static_argnames=("model", "exact_window"))
_read = jax.jit(read, static_argnames="model", donate_argnames="cache")
_draw = jax.jit(draw, static_argnames="sampling")
_decode = jax.jit(
    decode, static_argnames=("model", "n_tokens", "sampling"), donate_argnames="cache"
)


def write(
    model: Model, params, prompt_BT: np.ndarray, keys_B, sampling: Sampling,
    exact_window: bool = False, n_generated: int = 0, at_once: int = 1,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Yield new tokens after the prompt of each row, without end: tokens_BN, with N up to at_once.

    Args:
        keys_B: of the random streams, see `row_keys`.
        n_generated: tokens at the prompt's end that were generated before, see `noise`.
        at_once: tokens of one compiled call. With 1, another `sampling` compiles a few operations
            and not the model.
    """
    S = model.config.block_size
    exact_window |= model.config.architecture != "gpt"  # the lecture's models have no cache
    slides = model.config.positions == "rotary" and not exact_window
    at_once = min(at_once, max(1, S // 2))
    if model.compute.dtype != jnp.float32:
        params = _cast(params, dtype=model.compute.dtype)
    window_BN, n_window = prompt_BT, S  # the text so far, and how much of it is read (again)
    cache, newest_B, n_room = None, None, 0  # n_room: tokens until the window is full
    while True:
        if cache is None or (n_room == 0 and not slides):
            window_BT, length = start_window(window_BN, n_window)
            logits_BV, cache = _prefill(model, params, window_BT, length, exact_window)
            newest_B = _draw(logits_BV, keys_B, n_generated, sampling)
            tokens_BN, n_room = to_host(newest_B)[:, None], S - length + 1  # the last is not read
            n_window = S if exact_window else max(1, S // 2)  # the latter is always full
        elif at_once == 1:
            logits_BV, cache = _read(model, params, cache, newest_B)
            newest_B = _draw(logits_BV, keys_B, n_generated, sampling)
            tokens_BN = to_host(newest_B)[:, None]
        else:
            (cache, newest_B), tokens_BN = _decode(
                model, params, cache, newest_B, keys_B, n_generated, at_once, sampling
            )
            tokens_BN = to_host(tokens_BN)
        if not slides:  # those past the window's end are wrong
            tokens_BN = tokens_BN[:, :n_room]
        yield tokens_BN
        n_generated, n_room = n_generated + tokens_BN.shape[1], n_room - tokens_BN.shape[1]
        window_BN = np.concatenate([window_BN, tokens_BN], axis=1)[:, -S:]


def generate(
    model: Model, params, prompt_BT: np.ndarray, keys_B, n_tokens: int,
    sampling: Sampling, exact_window: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return the first n_tokens that `write` yields: tokens_BN."""
    pieces, n_made = [], 0
    at_once = max(1, min(AT_ONCE, MAX_NOISE // len(keys_B) // (model.config.vocab_size or 1)))
    tokens = write(model, params, prompt_BT, keys_B, sampling, exact_window, 0, at_once)
    while n_made < n_tokens:
        pieces.append(next(tokens))
        n_made += pieces[-1].shape[1]
    return np.concatenate(pieces, axis=1)[:, :n_tokens]


def to_host(array: jax.Array) -> np.ndarray:
    """Return an array's values, on each of several hosts if they share it."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
