"""The models of "Let's build GPT: from scratch, in code, spelled out", in the lecture's order.

Each model is built from the parts of those before it; read two side by side. Three things follow
the lecture, not GPT-2: PyTorch's default initialization, attention scaled by the width of the
embedding (later the lecture scales by the size of a head, but all losses that it shows are from
before), and heads as separate modules.

Array names end in their axes: B is a sequence of the batch, T a position, S a position attended to,
D a feature (the lecture's C), K a feature of a head, V a token; the lecture's `wei` is weights_BTS.
Every model is called like model.py's GPT, `deterministic` as after PyTorch's `model.eval()`; no
model has a cache. `sow` records the attention weights for those who want to look at them.
Source: the lecture, and github.com/karpathy/ng-video-lecture.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanogpt_jax.attention import WEIGHTS
from nanogpt_jax.config import ModelConfig
from nanogpt_jax.hardware.products import flat_dot_general
from nanogpt_jax.model import Compute, Dropout

Dense = partial(nn.Dense, dot_general=flat_dot_general)  # for speed, as in the GPT
# Like torch.nn.Embedding, whose rows start as N(0, 1), and torch.nn.LayerNorm.
Embedding = partial(nn.Embed, embedding_init=nn.initializers.normal(1.0))
LayerNorm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class Linear(nn.Module):
    """Like torch.nn.Linear: weights and biases start uniform within 1 / sqrt(inputs)."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BTD):
        bound = x_BTD.shape[-1] ** -0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return Dense(self.features, self.use_bias, kernel_init=uniform, bias_init=uniform)(x_BTD)


class LectureModel(nn.Module):
    """What all models of the lecture share: GPT's interface, without a cache, in float32."""

    config: ModelConfig
    compute: Compute = Compute()

    def __call__(self, tokens_BT, cache=None, *, deterministic: bool = True):
        x_BTD, cache = self.hidden_states(tokens_BT, cache, deterministic=deterministic)
        return self.head(x_BTD), cache


class Bigram(LectureModel):
    """Predict the next token from the last one alone: a table of logits."""

    def setup(self):
        V = self.config.vocab_size
        assert V is not None, "the corpus fills in the size of the vocabulary"
        self.token_embedding_table = Embedding(V, V)

    def hidden_states(self, tokens_BT, cache=None, *, deterministic: bool = True):
        return self.token_embedding_table(tokens_BT), cache

    def head(self, logits_BTV):
        return logits_BTV


class Head(nn.Module):
    """One head of self-attention."""

    head_size: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD, deterministic: bool):
        T, D = x_BTD.shape[1:]
        k_BSK = Linear(self.head_size, use_bias=False, name="key")(x_BTD)
        q_BTK = Linear(self.head_size, use_bias=False, name="query")(x_BTD)
        scores_BTS = q_BTK @ k_BSK.swapaxes(1, 2) * D**-0.5
        scores_BTS = jnp.where(jnp.tril(jnp.ones((1, T, T), bool)), scores_BTS, -jnp.inf)
        weights_BTS = jax.nn.softmax(scores_BTS)
        self.sow(WEIGHTS, "weights_BTS", weights_BTS)
        weights_BTS = Dropout(self.dropout)(weights_BTS, deterministic)
        v_BSK = Linear(self.head_size, use_bias=False, name="value")(x_BTD)
        return weights_BTS @ v_BSK


class OneHead(LectureModel):
    """Position embeddings, and one head of attention through which tokens communicate."""

    def setup(self):
        V, D, T = self.config.vocab_size, self.config.n_embd, self.config.block_size
        assert V is not None, "the corpus fills in the size of the vocabulary"
        self.token_embedding_table = Embedding(V, D)
        self.position_embedding_table = Embedding(T, D)
        self.layers = self.make_layers()
        self.lm_head = Linear(V)

    def make_layers(self) -> Sequence[nn.Module]:  # between the embeddings and the head
        return [Head(self.config.n_embd)]

    def hidden_states(self, tokens_BT, cache=None, *, deterministic: bool = True):
        positions_T = jnp.arange(tokens_BT.shape[1])
        positions_TD = self.position_embedding_table(positions_T)
        x_BTD = self.token_embedding_table(tokens_BT) + positions_TD[None]
        for layer in self.layers:
            x_BTD = layer(x_BTD, deterministic)
        return x_BTD, cache

    def head(self, x_BTD):
        return self.lm_head(x_BTD)


class MultiHead(nn.Module):
    """Several smaller heads in parallel; from Residual on, followed by a projection."""

    n_head: int
    is_projected: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD, deterministic: bool):
        D = x_BTD.shape[-1]
        heads = [Head(D // self.n_head, self.dropout) for _ in range(self.n_head)]
        y_BTD = jnp.concatenate([head(x_BTD, deterministic) for head in heads], axis=-1)
        if self.is_projected:
            y_BTD = Linear(D, name="proj")(y_BTD)
            y_BTD = Dropout(self.dropout)(y_BTD, deterministic)
        return y_BTD


class SeveralHeads(OneHead):
    """Four heads of a quarter of the size each."""

    def make_layers(self):
        return [MultiHead(self.config.n_head, is_projected=False)]


class FeedForward(nn.Module):
    """A layer applied at each position by itself; from Residual on, two of them."""

    widening: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BTD, deterministic: bool):
        D = x_BTD.shape[-1]
        y_BTD = jax.nn.relu(Linear(self.widening * D)(x_BTD))
        if self.widening > 1:
            y_BTD = Linear(D, name="proj")(y_BTD)
        return Dropout(self.dropout)(y_BTD, deterministic)


class Thinking(OneHead):
    """Communication followed by computation: tokens exchange, then each thinks by itself."""

    def make_layers(self):
        return [MultiHead(self.config.n_head, is_projected=False), FeedForward(widening=1)]


class Deep(Thinking):
    """The same layers several times over, without residual connections: deep, and hard to train."""

    def make_layers(self):
        make_layers = super().make_layers
        return [layer for _ in range(self.config.n_layer) for layer in make_layers()]


class Block(nn.Module):
    """Communication and computation, each added to the residual stream."""

    n_head: int

    @nn.compact
    def __call__(self, x_BTD, deterministic: bool):
        x_BTD = x_BTD + MultiHead(self.n_head, name="sa")(x_BTD, deterministic)
        return x_BTD + FeedForward(name="ffwd")(x_BTD, deterministic)


class Residual(OneHead):
    """Blocks with residual connections: gradients pass unchanged from the last to the first."""

    def make_layers(self):
        return [Block(self.config.n_head) for _ in range(self.config.n_layer)]


class NormalizedBlock(nn.Module):
    """The same, but each part reads the normalized stream: the scale of x no longer matters."""

    n_head: int
    dropout: float

    @nn.compact
    def __call__(self, x_BTD, deterministic: bool):
        heads = MultiHead(self.n_head, dropout=self.dropout, name="sa")
        x_BTD = x_BTD + heads(LayerNorm(name="ln1")(x_BTD), deterministic)
        feed_forward = FeedForward(dropout=self.dropout, name="ffwd")
        return x_BTD + feed_forward(LayerNorm(name="ln2")(x_BTD), deterministic)


class Normalized(OneHead):
    """Layer norm before each part and at the end: with dropout and scaled up, the lecture's GPT."""

    def make_layers(self):
        config = self.config
        self.ln_f = LayerNorm()
        return [NormalizedBlock(config.n_head, config.dropout) for _ in range(config.n_layer)]

    def hidden_states(self, tokens_BT, cache=None, *, deterministic: bool = True):
        x_BTD, cache = super().hidden_states(tokens_BT, cache, deterministic=deterministic)
        return self.ln_f(x_BTD), cache


MODELS = {
    "bigram": Bigram,
    "head": OneHead,
    "multihead": SeveralHeads,
    "feedforward": Thinking,
    "deep": Deep,
    "residual": Residual,
    "layernorm": Normalized,
}
