"""Products and sums in the forms that chips compute fast; the results are the same up to rounding.

The letters of array names are explained in model.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_einsum(spec: str, x, y):
    """Return einsum(spec, x, y), summed up and returned in float32 whatever the operands' type.

    Its gradient is rounded to their type before it is multiplied: products with a float32 operand
    are slower, twice on an A100, eight times on a T4.
    """
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _float32_einsum_fwd(spec: str, x, y):
    return float32_einsum(spec, x, y), (x, y)


def _float32_einsum_bwd(spec: str, operands, gradient):
    _, transpose = jax.vjp(partial(jnp.einsum, spec), *operands)
    return transpose(gradient.astype(operands[0].dtype))


float32_einsum.defvjp(_float32_einsum_fwd, _float32_einsum_bwd)


def flat_dot_general(lhs, rhs, dimension_numbers=None, precision=None, product=lax.dot):
    """Contract the last axis of `lhs` with the first of `rhs`, as one plain matrix product.

    A weight's gradient would otherwise contract the two axes B and T at once, which XLA does slowly
    on CPU: flattening them makes the whole training step 1.6 times faster there.
    """
    del dimension_numbers, precision  # Dense always asks for just this contraction
    out = product(lhs.reshape(-1, lhs.shape[-1]), rhs)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


# The head's: in float32 whatever the operands' type.
float32_dot_general = partial(flat_dot_general, product=partial(float32_einsum, "ND,DV->NV"))


@jax.custom_vjp
def pick(logits_BTV, targets_BT):
    """Return the targets' logits_BT; its gradient avoids a scatter, which takes two more passes."""
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


def _pick_fwd(logits_BTV, targets_BT):
    return pick(logits_BTV, targets_BT), (targets_BT, jnp.arange(logits_BTV.shape[-1])[None, None])


def _pick_bwd(residuals, gradient_BT):
    targets_BT, tokens_11V = residuals
    is_target_BTV = tokens_11V == targets_BT[..., None]
    return jnp.where(is_target_BTV, gradient_BT[..., None], 0), None


pick.defvjp(_pick_fwd, _pick_bwd)


def exact_gelu(x):
    """Return GELU of 16-bit numbers; `jax.nn.gelu` uses erfc, which costs several times as much."""
    x_32 = x.astype(jnp.float32)
    return (0.5 * x_32 * (1 + lax.erf(x_32 * 0.5**0.5))).astype(x.dtype)
