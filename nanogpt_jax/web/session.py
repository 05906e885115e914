"""A trained model to play with: it writes on from a text, and shows what it makes of one."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nanogpt_jax import generate
from nanogpt_jax.config import SampleConfig
from nanogpt_jax.corpora import CharTokenizer, Tokenizer
from nanogpt_jax.web.inspection import read_text


class Sight(NamedTuple):
    """A text of T tokens as the model sees it, for people to look at."""

    tokens: list[str]  # its last block_size tokens as texts: the model sees no more
    text_of: Callable[[list[int]], str]  # of ids
    surprise_T: np.ndarray  # nats: -log of the probability that a token had; the first: nan
    next_probs_TV: np.ndarray  # of the token after each position
    weights: tuple[jax.Array, ...]  # of attention, (H, S, S) a layer; past T there is padding

    def likeliest(self, position: int, n: int) -> list[tuple[str, float]]:
        """Return the n tokens that the model finds likeliest after a position, best first."""
        probs_V = self.next_probs_TV[position]
        likeliest = np.argsort(-probs_V, stable=True)[:n]
        return [(self.text_of([v]), float(probs_V[v])) for v in likeliest if probs_V[v] > 0]

    def probability_of_next(self, position: int) -> float | None:
        """Return how probable the token was that came after a position; None: none came."""
        if position == len(self.tokens) - 1:
            return None
        return float(np.exp(-self.surprise_T[position + 1]))

    def attention(self, layer: int, head: int | None) -> np.ndarray:
        """Return weights_TT, query by key, of a layer's head; None: the mean of its heads."""
        weights_HSS = np.asarray(self.weights[layer])
        weights_SS = weights_HSS.mean(axis=0) if head is None else weights_HSS[head]
        T = len(self.tokens)
        return weights_SS[:T, :T]


class Player:
    """A model, its parameters and its compiled programs; each compiles once for all texts."""

    def __init__(self, model: nn.Module, params, tokenizer: Tokenizer):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self._prefill = jax.jit(partial(generate.prefill, model), static_argnames="exact_window")
        # Apart from reading, so that another temperature compiles a few operations, not the model.
        self._draw = jax.jit(generate.draw, static_argnames="sampling")
        self._read = jax.jit(partial(generate.read, model), donate_argnames="generation")
        self._read_text = jax.jit(partial(read_text, model))

    @property
    def default_start(self) -> str:
        """What is read where no start text is given."""
        return self.tokenizer.default_start

    @property
    def unit(self) -> str:
        """What one of its tokens is called."""
        return "character" if isinstance(self.tokenizer, CharTokenizer) else "token"

    def n_tokens(self, text: str) -> int:
        """Return how many tokens a text has; raises as `write` does."""
        return len(self.tokenizer.encode_prompt(text))

    @property
    def n_heads(self) -> list[int]:
        """Attention heads of each layer that has attention."""
        tokens_S = jax.ShapeDtypeStruct((self.model.config.block_size,), jnp.int32)
        reading = jax.eval_shape(self._read_text, self.params, tokens_S)
        return [weights_HSS.shape[0] for weights_HSS in reading.weights]

    def write(self, text: str, config: SampleConfig, made: int = 0) -> Iterator[str]:
        """Yield the text of config.max_new_tokens tokens that go on from a text, one by one.

        They are those of `python sample.py --stream`, in its first sample.

        Args:
            text: what the model reads first.
            config: how tokens are drawn.
            made: how many of the text were drawn before: of a text that was stopped and goes on,
                each token is drawn with the random numbers that it would have had. So a text of
                characters goes on as if it never had stopped, until the context is first full.

        Raises:
            InputError: the text is empty, or has characters that the model never saw.
        """
        window_BS, length = self._window(text)
        sampling = generate.Sampling(config.temperature, config.top_k, config.top_p)
        keys_B = generate.row_keys(config.seed, range(1))
        generation = self._prefill(
            self.params, window_BS, length, exact_window=config.exact_window
        )._replace(made=jnp.int32(made))
        text_of = self.tokenizer.stream_decoder()
        for left in range(config.max_new_tokens, 0, -1):
            tokens_B = self._draw(generation, keys_B, sampling=sampling)
            generation = self._read(self.params, generation, tokens_B)
            yield text_of(np.asarray(tokens_B), final=left == 1)

    def look(self, text: str) -> Sight:
        """Read the end of a text, as much as the model sees at once.

        Raises:
            InputError: the text is empty, or has characters that the model never saw.
        """
        window_BS, length = self._window(text)
        next_probs_SV, weights = self._read_text(self.params, window_BS[0])
        next_probs_TV = np.asarray(next_probs_SV)[:length]
        tokens_T = window_BS[0, :length]
        had_T1 = next_probs_TV[np.arange(length - 1), tokens_T[1:]]
        with np.errstate(divide="ignore"):  # one the model held impossible: infinite
            surprise_T = np.concatenate([[np.nan], -np.log(had_T1)])
        tokens = [self.tokenizer.decode([i]) for i in tokens_T]
        return Sight(tokens, self.tokenizer.decode, surprise_T, next_probs_TV, weights)

    def _window(self, text: str):
        return generate.start_window(self.tokenizer, text, 1, self.model.config.block_size)
