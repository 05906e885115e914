"""A trained model behind the page: what it makes of a text."""

import re
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import nanogpt_jax
from nanogpt_jax import decoding
from nanogpt_jax.attention import WEIGHTS
from nanogpt_jax.corpora import CharTokenizer
from nanogpt_jax.model import Model


def read_text(model: Model, params, tokens_T) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return next_probs_TV and, of each layer with attention, weights_HTT, query by key.

    Reads at most block_size tokens in one pass. No position depends on a later one, so the text may
    be padded at its end. Attention must be in plain XLA: fused kernels never store the weights.
    """
    (T,) = tokens_T.shape
    variables = {"params": params}
    (logits_BTV, _), sown = model.apply(variables, tokens_T[None], mutable=[WEIGHTS])

    def numbers(path: tuple[str, ...]) -> list[int]:  # h_10 comes after h_9
        return [int(number) for number in re.findall(r"_(\d+)", "/".join(path))]

    by_head = sorted(flatten_dict(sown.get(WEIGHTS, {})).items(), key=lambda kv: numbers(kv[0]))
    # The GPT sows weights_BHTS, all heads of a layer at once; the lecture's models sow weights_BTS,
    # one head at a time. Each leaf is a tuple with one array of batch size 1.
    weights = tuple(
        jnp.concatenate([leaf[0].reshape(-1, T, T) for _, leaf in heads])
        for _, heads in groupby(by_head, key=lambda kv: kv[0][0])
    )
    return jax.nn.softmax(logits_BTV[0].astype(jnp.float32)), weights


class Insight(NamedTuple):
    """What a model makes of the last T tokens of a text, ready to be shown."""

    tokens: list[str]
    decode: Callable[[list[int]], str]
    probs_T: np.ndarray  # of each token, given those before it; nan for the first
    next_probs_TV: np.ndarray  # of the token after each position
    weights: tuple[jax.Array, ...]  # of attention, (H, S, S) per layer; after T comes padding

    def likeliest(self, position: int, n: int) -> list[tuple[str, float]]:
        """Return the n likeliest tokens after a position with their probabilities, best first."""
        probs_V = self.next_probs_TV[position]
        likeliest = np.argsort(-probs_V, stable=True)[:n]
        return [(self.decode([v]), float(probs_V[v])) for v in likeliest if probs_V[v] > 0]

    def attention(self, layer: int, head: int | None) -> np.ndarray:
        """Return weights_TT, query by key, of one head of a layer; None: the mean of its heads."""
        weights_HSS = np.asarray(self.weights[layer])
        weights_SS = weights_HSS.mean(axis=0) if head is None else weights_HSS[head]
        T = len(self.tokens)
        return weights_SS[:T, :T]


class Session:
    """A loaded model and what the page asks of it; each function compiles once for all texts."""

    def __init__(self, run: nanogpt_jax.TrainedModel):
        self.run = run
        self.tokenizer, _ = run.encode(None)
        self.unit = "character" if isinstance(self.tokenizer, CharTokenizer) else "token"
        self._read_text = jax.jit(partial(read_text, run.model))
        tokens_S = jax.ShapeDtypeStruct((run.config.block_size,), jnp.int32)
        _, weights = jax.eval_shape(self._read_text, run.params, tokens_S)
        self.n_heads = [weights_HSS.shape[0] for weights_HSS in weights]  # by layer

    def look(self, text: str) -> Insight:
        """Read the last block_size tokens of a text."""
        _, tokens = self.run.encode(text)
        window_BS, length = decoding.start_window(tokens[None], self.run.config.block_size)
        next_probs_SV, weights = self._read_text(self.run.params, window_BS[0])
        next_probs_TV = np.asarray(next_probs_SV)[:length]
        tokens_T = window_BS[0, :length]
        probs_T = np.append(np.nan, next_probs_TV[np.arange(length - 1), tokens_T[1:]])
        texts = [self.tokenizer.decode([token]) for token in tokens_T]
        return Insight(texts, self.tokenizer.decode, probs_T, next_probs_TV, weights)
