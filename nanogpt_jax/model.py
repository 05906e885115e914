"""The GPT, as Flax Linen modules used functionally: `init` makes parameters, `apply` uses them.

Arrays of rank 2 and more carry their shape in their name, a letter for each axis:

    A  micro-batch of an update        H  attention head
    B  sequence of a batch             K  feature of a head
    T  position, of a query            F  feature of the hidden layer (4 D)
    S  position, of a key or cache     V  token of the vocabulary
    D  feature of the residual stream

Submodules carry GPT-2's names, so that importing its weights is a table of names.
Source: nanoGPT's model.py and Radford et al., "Language models are unsupervised multitask
learners", 2019.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nanogpt_jax.attention import KVCache, attention
from nanogpt_jax.config import ModelConfig

INIT_STD = 0.02
LAYER_NORM_EPSILON = 1e-5  # PyTorch's default; Flax's is 1e-6


def _flat_dot_general(lhs, rhs, dimension_numbers, precision=None, **kwargs):
    """Contract the last axis of `lhs` with the first of `rhs`, as one plain matrix product.

    The result is that of `lax.dot_general`; but a weight's gradient would contract the two axes B
    and T at once, which XLA does slowly on CPU. Flattening them first makes the whole training step
    1.6 times faster there, and is free elsewhere.
    """
    del dimension_numbers  # Dense always asks for just this contraction
    out = lax.dot(lhs.reshape(-1, lhs.shape[-1]), rhs, precision=precision, **kwargs)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


def _dense(config: ModelConfig, features: int, name: str, std: float = INIT_STD) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=config.bias,
        kernel_init=nn.initializers.normal(std),
        dot_general=_flat_dot_general,
        name=name,
    )


def _layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    # The fast variance is E[x^2] - E[x]^2, which loses digits where the mean is large.
    return nn.LayerNorm(
        LAYER_NORM_EPSILON, use_bias=config.bias, use_fast_variance=False, name=name
    )


class CausalSelfAttention(nn.Module):
    """Multi-head attention, each position over itself and those before it."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, cache, deterministic: bool):
        """Return (y_BTD, (k_BSHK, v_BSHK)); cache is (length, k_BSHK, v_BSHK) or None."""
        config = self.config
        B, T, D = x_BTD.shape
        heads = (B, T, config.n_head, D // config.n_head)
        qkv = jnp.split(_dense(config, 3 * D, "c_attn")(x_BTD), 3, axis=-1)
        q_BTHK, k_BSHK, v_BSHK = (part_BTD.reshape(heads) for part_BTD in qkv)
        start = 0
        if cache is not None:
            start, cached_k_BSHK, cached_v_BSHK = cache
            k_BSHK = lax.dynamic_update_slice_in_dim(cached_k_BSHK, k_BSHK, start, axis=1)
            v_BSHK = lax.dynamic_update_slice_in_dim(cached_v_BSHK, v_BSHK, start, axis=1)
        drops = config.dropout > 0 and not deterministic
        key = self.make_rng("dropout") if drops else None
        y_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, start, config.dropout, key)
        # The residual stream sums 2 n_layer such outputs: its variance shall not grow with depth.
        std = INIT_STD / (2 * config.n_layer) ** 0.5
        y_BTD = _dense(config, D, "c_proj", std)(y_BTHK.reshape(B, T, D))
        return nn.Dropout(config.dropout)(y_BTD, deterministic), (k_BSHK, v_BSHK)


class MLP(nn.Module):
    """Two Dense layers with a GELU between, at each position by itself."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, deterministic: bool):
        """Return y_BTD."""
        config = self.config
        D = x_BTD.shape[-1]
        x_BTF = _dense(config, 4 * D, "c_fc")(x_BTD)
        x_BTF = jax.nn.gelu(x_BTF, approximate=config.activation == "gelu_tanh")
        std = INIT_STD / (2 * config.n_layer) ** 0.5
        y_BTD = _dense(config, D, "c_proj", std)(x_BTF)
        return nn.Dropout(config.dropout)(y_BTD, deterministic)


class Block(nn.Module):
    """Attention, then MLP, each reading the normalised stream and adding to the stream itself."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, cache, deterministic: bool):
        """Return (x_BTD, (k_BSHK, v_BSHK))."""
        config = self.config
        h_BTD = _layer_norm(config, "ln_1")(x_BTD)
        y_BTD, kv = CausalSelfAttention(config, name="attn")(h_BTD, cache, deterministic)
        x_BTD = x_BTD + y_BTD
        h_BTD = _layer_norm(config, "ln_2")(x_BTD)
        return x_BTD + MLP(config, name="mlp")(h_BTD, deterministic), kv


class GPT(nn.Module):
    """Tokens in, logits of the token after each of them out. The loss is not the model's affair."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, cache: KVCache | None = None, *, deterministic: bool = True):
        """Return (logits_BTV, cache), the logits in float32.

        Args:
            tokens_BT: ids from 0 to vocab_size - 1. An id outside gives NaN, not an error: data is
                checked where it is opened.
            cache: None, or the tokens seen before these ones; it comes back with these added. Its
                length and T together are block_size at the most, or live entries are overwritten.
            deterministic: without dropout; otherwise `rngs={"dropout": key}` is needed.
        """
        config = self.config
        _, T = tokens_BT.shape
        assert T <= config.block_size, f"{T} tokens, but block_size is {config.block_size}"
        init = nn.initializers.normal(INIT_STD)
        wte = nn.Embed(config.vocab_size, config.n_embd, embedding_init=init, name="wte")
        wpe = nn.Embed(config.block_size, config.n_embd, embedding_init=init, name="wpe")

        start = 0 if cache is None else cache.length
        x_BTD = wte(tokens_BT) + wpe(start + jnp.arange(T))[None]
        x_BTD = nn.Dropout(config.dropout)(x_BTD, deterministic)
        new_kv = []
        for i in range(config.n_layer):
            layer_cache = None if cache is None else (start, cache.k_BSHK[i], cache.v_BSHK[i])
            x_BTD, kv = Block(config, name=f"h_{i}")(x_BTD, layer_cache, deterministic)
            new_kv.append(kv)
        x_BTD = _layer_norm(config, "ln_f")(x_BTD)
        # The head's weights are the token embedding's, transposed.
        logits_BTV = _flat_dot_general(x_BTD, wte.embedding.T, None)
        if cache is not None:
            ks, vs = zip(*new_kv, strict=True)
            cache = KVCache(start + T, ks, vs)
        return logits_BTV, cache
