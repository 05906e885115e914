"""The GPT, as Flax Linen modules used functionally: `init` makes parameters, `apply` uses them.

Arrays of rank 2 and more carry their shape in their name, a letter for each axis:

    A  micro-batch of an update        H  attention head
    B  sequence of a batch             K  feature of a head
    T  position, of a query            F  feature of the hidden layer
    S  position, of a key or cache     V  token of the vocabulary
    D  feature of the residual stream

Submodules carry GPT-2's names, so that importing its weights is a table of names.
Source: nanoGPT's model.py and Radford et al., "Language models are unsupervised multitask
learners", 2019.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanogpt_jax.attention import WEIGHTS, KVCache, attention, attention_weights, drop, rotate
from nanogpt_jax.config import ROW_AXES, ModelConfig
from nanogpt_jax.hardware.products import exact_gelu, flat_dot_general, float32_dot_general

INIT_STD = 0.02
LAYER_NORM_EPSILON = 1e-5  # PyTorch's default; Flax's is 1e-6
RMS_NORM_EPSILON = 1e-6


class Compute(NamedTuple):
    """How a model computes. Hashable, so it is a constant of the compiled program."""

    dtype: Any = jnp.float32  # of activations and matrix products
    attention: str = "xla"  # or cudnn, splash
    remat: bool = False
    loss_chunks: int = 1
    mesh: Mesh | None = None  # None: one device


class Model(Protocol):
    """What training and sampling need of a model: GPT is one, and so are the lecture's."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def compute(self) -> Compute: ...
    def init(self, rngs, *args, **kwargs) -> Any: ...
    def apply(self, variables, *args, **kwargs) -> Any: ...
    def clone(self, **updates) -> Any: ...


def shard_activations(x_BTD, mesh: Mesh | None):
    """Keep each row of the residual stream on the device that holds the row's tokens.

    Otherwise the compiler may follow a sharded embedding and give each device a part of D.
    """
    if mesh is None:
        return x_BTD
    return lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, PartitionSpec(ROW_AXES)))


def _dense(config: ModelConfig, dtype, features: int, name: str, std: float = INIT_STD):
    return nn.Dense(
        features,
        use_bias=config.bias,
        dtype=dtype,
        kernel_init=nn.initializers.normal(std),
        dot_general=flat_dot_general,
        name=name,
    )


def _projection(config: ModelConfig, dtype, name: str):
    # The residual stream sums 2 n_layer of these: its variance should not grow with depth.
    std = 0.0 if config.zero_init else INIT_STD / (2 * config.n_layer) ** 0.5
    return _dense(config, dtype, config.n_embd, name, std)


def _rms_norm(dtype, name: str | None = None) -> nn.RMSNorm:
    """Source: Zhang and Sennrich, "Root mean square layer normalization", 2019."""
    return nn.RMSNorm(RMS_NORM_EPSILON, dtype, use_scale=False, name=name)


def _norm(config: ModelConfig, dtype, name: str | None = None) -> nn.LayerNorm | nn.RMSNorm:
    if config.norm == "rmsnorm":
        return _rms_norm(dtype, name)
    # Mean and variance are in float32 whatever the dtype. The fast variance, E[x^2] - E[x]^2, loses
    # digits if the mean is large.
    return nn.LayerNorm(
        LAYER_NORM_EPSILON, dtype, use_bias=config.bias, use_fast_variance=False, name=name
    )


class Dropout(nn.Module):
    """Drop elements at a rate, unless the call is deterministic."""

    rate: float

    def __call__(self, x_BTD, deterministic: bool):
        if deterministic or self.rate == 0:
            return x_BTD
        return drop(x_BTD, self.rate, self.make_rng("dropout"))


class TokenShift(nn.Module):
    """Add the previous position, times a learned vector that starts at 0.

    Source: Peng et al., "RWKV: reinventing RNNs for the Transformer era", 2023, which interpolates.
    """

    @nn.compact
    def __call__(self, x_BTD, before_BND):
        """The last of before_BND comes before the first of x_BTD; None: nothing does."""
        scale_D = self.param("scale", nn.initializers.zeros, x_BTD.shape[-1:])
        first_B1D = jnp.zeros_like(x_BTD[:, :1]) if before_BND is None else before_BND[:, -1:]
        previous_BTD = jnp.concatenate([first_B1D, x_BTD[:, :-1]], axis=1)
        return x_BTD + (scale_D[None, None] * previous_BTD).astype(x_BTD.dtype)


def _shifted(config: ModelConfig, x_BTD, cache, i: int):
    """Return what part i of a block reads: 1 is attention, 2 the MLP."""
    if not config.token_shift:
        return x_BTD
    before_BND = None if cache is None else cache[2 + i]  # after its length, keys and values
    return TokenShift(name=f"shift_{i}")(x_BTD, before_BND)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it."""

    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, cache, deterministic: bool):
        """Return (y_BTD, (k_BHKS, v_BHKS)); cache is (length, k_BHKS, v_BHKS, ...) or None."""
        config, compute = self.config, self.compute
        B, T, D = x_BTD.shape
        heads = (B, T, config.n_head, D // config.n_head)
        qkv = jnp.split(_dense(config, compute.dtype, 3 * D, "c_attn")(x_BTD), 3, axis=-1)
        q_BTHK, k_BSHK, v_BSHK = (part_BTD.reshape(heads) for part_BTD in qkv)
        start = 0 if cache is None else cache[0]
        if config.qk_norm:
            q_BTHK, k_BSHK = (_rms_norm(compute.dtype)(x_BTHK) for x_BTHK in (q_BTHK, k_BSHK))
        if config.positions == "rotary":
            q_BTHK, k_BSHK = (rotate(x_BTHK, start) for x_BTHK in (q_BTHK, k_BSHK))
        if cache is None and compute.attention != "xla":
            assert deterministic or config.dropout == 0, "fused kernels cannot drop weights"
            from nanogpt_jax.hardware.fused import fused_attention  # only where a chip has it

            y_BTHK = fused_attention(q_BTHK, k_BSHK, v_BSHK, compute.attention, compute.mesh)
        else:
            if cache is not None:
                slot = start % config.block_size  # a full cache drops its oldest token
                new = (x_BSHK.transpose(0, 2, 3, 1) for x_BSHK in (k_BSHK, v_BSHK))
                cache = [
                    lax.dynamic_update_slice_in_dim(cached_BHKS, new_BHKT, slot, axis=3)
                    for cached_BHKS, new_BHKT in zip(cache[1:3], new, strict=True)
                ]
                cache = lax.optimization_barrier(cache)
                k_BSHK, v_BSHK = (x_BHKS.transpose(0, 3, 1, 2) for x_BHKS in cache)
            drops = config.dropout > 0 and not deterministic
            key = self.make_rng("dropout") if drops else None
            window = config.attention_window
            y_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, start, window, config.dropout, key)
            if self.is_mutable_collection(WEIGHTS):  # the page shows them
                weights_BHTS = attention_weights(q_BTHK, k_BSHK, start, window)
                self.sow(WEIGHTS, "weights_BHTS", weights_BHTS)
        y_BTD = _projection(config, compute.dtype, "c_proj")(y_BTHK.reshape(B, T, D))
        return Dropout(config.dropout)(y_BTD, deterministic), cache


class MLP(nn.Module):
    """Two Dense layers with an activation between them, at each position by itself.

    Source of ReLU squared: So et al., "Primer", 2021; of SwiGLU, in which one half of the hidden
    layer gates the other: Shazeer, "GLU variants improve transformer", 2020.
    """

    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, deterministic: bool):
        config, dtype = self.config, self.compute.dtype
        x_BTF = _dense(config, dtype, config.mlp_in_features, "c_fc")(x_BTD)
        if config.activation == "swiglu":
            gate_BTF, x_BTF = jnp.split(x_BTF, 2, axis=-1)
            x_BTF = jax.nn.silu(gate_BTF) * x_BTF
        elif config.activation == "relu2":
            x_BTF = jnp.square(jax.nn.relu(x_BTF))
        else:
            gelu = partial(jax.nn.gelu, approximate=config.activation == "gelu_tanh")
            if dtype != jnp.float32:  # there, recomputing is cheaper than memory traffic
                gelu = jax.checkpoint(exact_gelu if config.activation == "gelu" else gelu)
            x_BTF = gelu(x_BTF)
        y_BTD = _projection(config, dtype, "c_proj")(x_BTF)
        return Dropout(config.dropout)(y_BTD, deterministic)


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised stream and adds to the stream itself."""

    config: ModelConfig
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD, cache, deterministic: bool):
        """Return (x_BTD, new), new being this block's part of KVCache; cache: (length, *part)."""
        config, compute = self.config, self.compute
        attend = CausalSelfAttention(config, compute, name="attn")
        mlp = MLP(config, compute, name="mlp")
        a_BTD = _norm(config, compute.dtype, "ln_1")(x_BTD)
        y_BTD, new = attend(_shifted(config, a_BTD, cache, 1), cache, deterministic)
        x_BTD = x_BTD + y_BTD
        m_BTD = _norm(config, compute.dtype, "ln_2")(x_BTD)
        x_BTD = x_BTD + mlp(_shifted(config, m_BTD, cache, 2), deterministic)
        if new is not None and config.token_shift:
            new = (*new, a_BTD, m_BTD)
        return x_BTD, new


class GPT(nn.Module):
    """Tokens in, logits of the token after each of them out. The loss is not in the model."""

    config: ModelConfig
    compute: Compute = Compute()

    def setup(self):
        config, dtype, V = self.config, self.compute.dtype, self.config.vocab_size
        assert V is not None, "the corpus fills in the size of the vocabulary"
        init = nn.initializers.normal(INIT_STD)
        # Rows are looked up in float32: a frequent token's gradient is a sum of very many.
        self.wte = nn.Embed(V, config.n_embd, embedding_init=init)
        if config.positions == "learned":
            self.wpe = nn.Embed(config.block_size, config.n_embd, embedding_init=init)
        self.dropout = Dropout(config.dropout)
        # With remat a block keeps only its inputs; argument 3 of its __call__ is deterministic.
        block = nn.remat(Block, static_argnums=(3,)) if self.compute.remat else Block
        self.h = [block(config, self.compute) for _ in range(config.n_layer)]
        self.ln_f = _norm(config, dtype)
        if not config.tied_head:
            self.lm_head = nn.Dense(
                V, use_bias=False, dtype=dtype, dot_general=float32_dot_general,
                kernel_init=nn.initializers.zeros if config.zero_init else init,
            )  # fmt: skip

    def __call__(self, tokens_BT, cache: KVCache | None = None, *, deterministic: bool = True):
        """Return (logits_BTV, cache), the logits in float32.

        Args:
            tokens_BT: ids from 0 to vocab_size - 1. An id outside gives NaN, not an error: data is
                checked when it is opened.
            cache: None, or the tokens seen before these; it is returned with these added. Its
                length plus T is at most block_size, or entries still in use are overwritten. With
                rotary positions, single tokens may follow a full cache without limit: each
                replaces the oldest.
            deterministic: without dropout; otherwise `rngs={"dropout": key}` is needed.
        """
        x_BTD, cache = self.hidden_states(tokens_BT, cache, deterministic=deterministic)
        return self.head(x_BTD), cache

    def hidden_states(self, tokens_BT, cache: KVCache | None = None, *, deterministic: bool = True):
        """Return (x_BTD, cache): the normalised residual stream, from which `head` reads."""
        T, block_size = tokens_BT.shape[1], self.config.block_size
        assert T <= block_size, f"{T} tokens, but block_size is {block_size}"
        start = 0 if cache is None else cache.length
        x_BTD = self.wte(tokens_BT)
        if self.config.positions == "learned":
            # `decode` may read past the end, in vain: no NaN, or JAX_DEBUG_NANS would stop there.
            x_BTD += self.wpe(jnp.minimum(start + jnp.arange(T), block_size - 1))[None]
        x_BTD = self.dropout(x_BTD.astype(self.compute.dtype), deterministic)
        x_BTD, new = shard_activations(x_BTD, self.compute.mesh), []
        for i, block in enumerate(self.h):
            layer_cache = cache and (start, *(arrays[i] for arrays in cache[1:] if arrays))
            x_BTD, of_layer = block(x_BTD, layer_cache, deterministic)
            x_BTD = shard_activations(x_BTD, self.compute.mesh)
            new.append(of_layer)
        if cache is not None:
            cache = KVCache(start + T, *zip(*new, strict=True))
        return self.ln_f(x_BTD), cache

    def head(self, x_BTD):
        """Return logits_BTV; a tied head's weights are the token embedding's, transposed.

        Those of a padded vocabulary's padding are -inf: it has no probability, so it changes no
        loss, gets no gradient and is never drawn.
        """
        if self.config.tied_head:
            embedding_VD = self.wte.embedding.astype(x_BTD.dtype)
            logits_BTV = float32_dot_general(x_BTD, embedding_VD.T)
        else:
            logits_BTV = self.lm_head(x_BTD)
        known, V = self.config.known_tokens, self.config.vocab_size
        if known is None or known == V:
            return logits_BTV
        return jnp.where(jnp.arange(V) < known, logits_BTV, -jnp.inf)
