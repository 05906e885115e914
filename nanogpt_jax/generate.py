"""Write text: prefill, cached decoding, and the cache-free reference it is tested against.

The model sees at most block_size tokens. When the cache is full, the last half of the window is
kept, read again in one prefill, and decoding goes on from there: one prefill in block_size / 2
tokens. With rotary positions nothing is read again: only distances count, wherever the window
begins, so the newest token takes the oldest one's place in the cache. nanoGPT instead reads the
last block_size tokens anew for each token (`exact_window`). All give the same text until the window
is first full.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nanogpt_jax.attention import KVCache, init_cache
from nanogpt_jax.corpora import Tokenizer
from nanogpt_jax.errors import InputError
from nanogpt_jax.model import GPT


class Sampling(NamedTuple):
    """How the next token is drawn. Hashable, so it is a constant of the compiled program."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # 1: all tokens


class DecodeState(NamedTuple):
    """The state of a text being written, arrays only."""

    window_BS: jax.Array  # int32 tokens that the model sees: the first `length` of S = block_size;
    length: jax.Array  # int32 scalar, 1 to S; both stay the start's where the cache slides
    made: jax.Array  # int32 scalar: new tokens so far, the step of the random stream
    logits_BV: jax.Array  # of the next token
    cache: KVCache | None  # None: every step reads the whole window (exact_window)


def row_keys(seed: int, rows: range) -> jax.Array:
    """Return a key for each row: row n of a seed is the same text however many are drawn."""
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.array(rows))


def sample_token(logits_BV, keys_B, sampling: Sampling):
    """Draw one token for each row: tokens_B.

    Tokens as likely as the last one kept by top_k or top_p are kept too, as in nanoGPT.
    Source of top_p: Holtzman et al., "The curious case of neural text degeneration", 2020.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    # Shifted, so that no logit overflows however small the temperature.
    logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    logits_BV = logits_BV / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # what likelier tokens already have
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
        least_B1 = kept_BV.min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def start_window(tokenizer: Tokenizer, start: str | None, n_rows: int, block_size: int):
    """Return (window_BS, length) of a start text: int32 (n_rows, block_size), equal rows; int32.

    Of a start longer than block_size the model sees the end.

    Args:
        start: None for the tokenizer's `default_start`.

    Raises:
        InputError: it is empty, or has characters that the model never saw.
    """
    if start is None:
        start = tokenizer.default_start
    if not start:
        raise InputError("start must have at least one character, but is empty")
    tokens = tokenizer.encode_prompt(start)[-block_size:]
    window_BS = np.zeros((n_rows, block_size), np.int32)
    window_BS[:, : len(tokens)] = tokens
    return window_BS, np.int32(len(tokens))


def prefill(model: GPT, params, window_BS, length, exact_window: bool = False) -> DecodeState:
    """Read a start text and return the state from which `decode` writes on.

    Args:
        window_BS: int32, the start padded to block_size with any ids: one compilation for all.
        length: how many of them are the start, 1 to block_size.
    """
    B = window_BS.shape[0]
    exact_window |= model.config.architecture != "gpt"  # the lecture's models have no cache
    cache = None if exact_window else init_cache(model.config, B, model.compute.dtype)
    variables = {"params": params}
    x_BSD, cache = model.apply(variables, window_BS, cache, method="hidden_states")
    if cache is not None:  # what the padding left behind is overwritten before it is seen
        cache = cache._replace(length=jnp.int32(length))
    x_B1D = lax.dynamic_slice_in_dim(x_BSD, length - 1, 1, axis=1)  # only that one's logits
    logits_BV = model.apply(variables, x_B1D, method="head")[:, 0]
    return DecodeState(window_BS, jnp.int32(length), jnp.int32(0), logits_BV, cache)


def draw(generation: DecodeState, keys_B, sampling: Sampling):
    """Draw the next token of each row: tokens_B."""
    token_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, generation.made)
    return sample_token(generation.logits_BV, token_keys_B, sampling).astype(jnp.int32)


def read(model: GPT, params, generation: DecodeState, tokens_B) -> DecodeState:
    """Append a token to each row, so that `draw` can draw the next one."""
    window_BS, length, made, _, cache = generation
    S = model.config.block_size
    tokens_B1 = tokens_B[:, None]
    if cache is not None and model.config.positions == "rotary":  # the cache slides by itself
        logits_B1V, cache = model.apply({"params": params}, tokens_B1, cache)
        return generation._replace(made=made + 1, logits_BV=logits_B1V[:, 0], cache=cache)

    def append(window_BS):
        return lax.dynamic_update_slice_in_dim(window_BS, tokens_B1, length, axis=1)

    def slide(keep):  # the last `keep` tokens, the new one among them, to the front
        kept_BS = jnp.concatenate([window_BS[:, S - keep + 1 :], tokens_B1], axis=1)
        return jnp.pad(kept_BS, ((0, 0), (0, S - keep)))

    if cache is None:
        full = length == S
        window_BS = lax.cond(full, lambda: slide(S), lambda: append(window_BS))
        generation = prefill(model, params, window_BS, jnp.minimum(length + 1, S), True)
        return generation._replace(made=made + 1)

    def read_one():
        logits_B1V, new_cache = model.apply({"params": params}, tokens_B1, cache)
        return DecodeState(append(window_BS), length + 1, made + 1, logits_B1V[:, 0], new_cache)

    def read_half():
        half = max(1, S // 2)
        return prefill(model, params, slide(half), half)._replace(made=made + 1)

    return lax.cond(length == S, read_half, read_one)


def decode(
    model: GPT, params, generation: DecodeState, keys_B, sampling: Sampling
) -> tuple[DecodeState, jax.Array]:
    """Draw the next token of each row and read it: (generation, tokens_B)."""
    tokens_B = draw(generation, keys_B, sampling)
    return read(model, params, generation, tokens_B), tokens_B


def generate(
    model: GPT,
    params,
    window_BS,
    length,
    keys_B,
    n_tokens: int,
    sampling: Sampling,
    exact_window: bool = False,
):
    """Write n_tokens after the start of each row, all in one program: tokens_BN.

    Args:
        window_BS, length: the start text, see `prefill`.
        keys_B: of the random streams, see `row_keys`.
    """

    def step(generation, _):
        return decode(model, params, generation, keys_B, sampling)

    generation = prefill(model, params, window_BS, length, exact_window)
    _, tokens_NB = lax.scan(step, generation, None, length=n_tokens)
    return tokens_NB.T
