"""What a model makes of a text: its surprise at each token, its forecasts, its attention."""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from nanogpt_jax.attention import WEIGHTS
from nanogpt_jax.model import GPT


class Reading(NamedTuple):
    """A text of T tokens as a model saw it."""

    next_probs_TV: jax.Array  # of the token after each position
    weights: tuple[jax.Array, ...]  # of attention, (H, T, T) a layer: query by key


def read_text(model: GPT, params, tokens_T) -> Reading:
    """Read a text of at most block_size tokens in one pass, and keep what is otherwise thrown away.

    Args:
        model: with its attention in plain XLA; a fused kernel never has its weights in memory.
    """
    variables = {"params": params}
    (logits_BTV, _), kept = model.apply(variables, tokens_T[None], mutable=[WEIGHTS])
    weights = {
        path: leaf[0][0]  # sow keeps a tuple of what it was given; the batch is of one row
        for path, leaf in flax.traverse_util.flatten_dict(kept.get(WEIGHTS, {})).items()
    }
    layers = sorted(weights, key=lambda path: int(path[0].removeprefix("h_")))
    return Reading(
        jax.nn.softmax(logits_BTV[0].astype(jnp.float32)), tuple(weights[p] for p in layers)
    )
