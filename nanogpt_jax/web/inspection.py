"""What a model makes of a text: its surprise at each token, its forecasts, its attention."""

import re
from itertools import groupby
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from nanogpt_jax.attention import WEIGHTS


class Reading(NamedTuple):
    """A text of T tokens as a model saw it."""

    next_probs_TV: jax.Array  # of the token after each position
    weights: tuple[jax.Array, ...]  # (H, T, T), query by key, of each layer that has attention


def read_text(model: nn.Module, params, tokens_T) -> Reading:
    """Read a text of at most block_size tokens in one pass, and keep what is otherwise thrown away.

    What stands at a position depends on nothing after it, so a text may be padded at its end.

    Args:
        model: the GPT or a rung, with its attention in plain XLA; a fused kernel never has its
            weights in memory.
    """
    (T,) = tokens_T.shape
    variables = {"params": params}
    (logits_BTV, _), kept = model.apply(variables, tokens_T[None], mutable=[WEIGHTS])
    sown = sorted(flatten_dict(kept.get(WEIGHTS, {})).items(), key=lambda item: _numbers(item[0]))
    weights = tuple(
        # The GPT sows a layer's heads at once, weights_BHTS, a rung each by itself, weights_BTS;
        # sow keeps a tuple of what it was given; the batch is of one row.
        jnp.concatenate([leaf[0].reshape(-1, T, T) for _, leaf in heads])
        for _, heads in groupby(sown, key=lambda item: item[0][0])
    )
    return Reading(jax.nn.softmax(logits_BTV[0].astype(jnp.float32)), weights)


def _numbers(path: tuple[str, ...]) -> list[int]:
    """Return a module's place as numbers, so that h_10 comes after h_9, and Head_1 after Head_0."""
    return [int(number) for number in re.findall(r"_(\d+)", "/".join(path))]
