"""Published training runs: shapes, tokens and FLOPs of the GPTs that this field grew from."""

from functools import partial
from typing import NamedTuple

from nanogpt_jax.config import ModelConfig


class PublishedRun(NamedTuple):
    """A training run as its makers, or others, report it."""

    name: str
    flops: float | None  # of the whole run; None: neither published nor estimated
    source: str
    model: ModelConfig | None = None  # None: the shape is not public
    tokens: float | None = None  # read in training; None: not public
    is_estimate: bool = False  # whether others than the makers estimated flops


gpt = partial(ModelConfig, vocab_size=50257, bias=True)
GPT3 = "Brown et al., 2020, tables 2.1 and D.1"
DAY_S = 86400
RUNS = (
    PublishedRun(
        "GPT-1 (2018)", 0.96e15 * DAY_S,
        "OpenAI: 0.96 petaflop/s-days (1 is 8.6e19); its tokens are not public",
        gpt(block_size=512, vocab_size=40478),
    ),
    PublishedRun(
        "GPT-2 1.5B (2019)", 1.5e21, "OpenAI published neither; Epoch AI says 1.9e21",
        gpt(n_layer=48, n_head=25, n_embd=1600), is_estimate=True,
    ),
    PublishedRun(
        "GPT-3 Small (2020)", 2.25e20, f"{GPT3}: 6 x 125e6 x 300e9", gpt(block_size=2048), 300e9
    ),
    PublishedRun(
        "GPT-3 175B (2020)", 3.14e23, f"{GPT3}: 6 x 174.6e9 x 300e9",
        gpt(block_size=2048, n_layer=96, n_head=96, n_embd=12288), 300e9,
    ),
    PublishedRun(
        "GPT-4 (2023)", 2.1e25, "Epoch AI: neither shape nor tokens are public", is_estimate=True
    ),
    PublishedRun(
        "nanoGPT's 124M (2023)", None, "its README: 4 days of 8 A100, 8.6e20 at their peak",
        ModelConfig(vocab_size=50304), 600_000 * 491_520,
    ),
    PublishedRun(
        "a day of an RTX 3070 Ti", 21.75e12 * DAY_S,
        "21.75 TFLOP/s in float32; in 16 bits twice that",
    ),
)  # fmt: skip
