import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from nanogpt_jax import steps
from nanogpt_jax.accounting import (
    forward_flops_per_token,
    parameter_counts,
    train_flops_per_token,
)
from nanogpt_jax.config import ModelConfig
from nanogpt_jax.model import GPT
from nanogpt_jax.presets import PRESETS

PARTS = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "mlp"}
OPENAI_GPT2 = [  # preset, (n_layer, n_head, n_embd), parameters
    ("gpt2", (12, 12, 768), 124_439_808),
    ("gpt2-medium", (24, 16, 1024), 354_823_168),
    ("gpt2-large", (36, 20, 1280), 774_030_080),
    ("gpt2-xl", (48, 25, 1600), 1_557_611_200),
]


def abstract_params(config: ModelConfig) -> dict:
    """Return the shapes of an initialised GPT, without making it."""
    return jax.eval_shape(partial(steps.init_params, GPT(config)), jax.random.key(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 6},
        {"block_size": 5, "vocab_size": 3, "n_layer": 3, "n_head": 2, "n_embd": 14},
        {"block_size": 64, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128},
    ],
    ids=str,
)
def test_parameter_counts_are_those_of_an_initialised_gpt(shape, bias):
    config = ModelConfig(**shape, bias=bias)
    counted = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        names = {key.key for key in path}
        part = next((PARTS[name] for name in PARTS if name in names), "layer norm")
        counted[part] += leaf.size
    assert parameter_counts(config) == counted


@pytest.mark.parametrize(("preset", "shape", "n_params"), OPENAI_GPT2)
def test_openai_gpt2_has_its_published_shape_and_number_of_parameters(preset, shape, n_params):
    """With biases and the unpadded vocabulary, which the presets, after nanoGPT, do not have."""
    config = dataclasses.replace(PRESETS[preset]().model, bias=True, vocab_size=50257)
    assert (config.n_layer, config.n_head, config.n_embd) == shape
    assert sum(parameter_counts(config).values()) == n_params


@pytest.mark.parametrize(
    ("preset", "n_params", "nanogpt_prints"),
    [("small", 804_096, "0.80M"), ("shakespeare", 10_745_088, "10.65M")],
)
def test_presets_have_nanogpts_size(preset, n_params, nanogpt_prints):
    """nanoGPT leaves the position embedding out of the number it prints; the sum here has it."""
    counts = parameter_counts(dataclasses.replace(PRESETS[preset]().model, vocab_size=65))
    assert sum(counts.values()) == n_params
    without_positions = n_params - counts["position embedding"]
    assert f"{without_positions / 1e6:.2f}M" == nanogpt_prints


@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 64, "vocab_size": 64, "n_embd": 1024},
        {"block_size": 4096, "vocab_size": 64, "n_embd": 512},
        {"block_size": 64, "vocab_size": 65536, "n_embd": 512},
    ],
    ids=["dense layers dominate", "attention dominates", "the head dominates"],
)
def test_forward_flops_are_those_that_xla_counts(shape):
    """Within 2 %: XLA counts elementwise work too. Nothing is run, so sizes may be real ones."""
    config = ModelConfig(**shape, n_layer=2, n_head=1)
    batch_size = 2
    tokens_BT = jax.ShapeDtypeStruct((batch_size, config.block_size), jnp.int32)
    logits_of = jax.jit(lambda params, tokens_BT: GPT(config).apply({"params": params}, tokens_BT))
    compiled = logits_of.lower(abstract_params(config), tokens_BT).compile()
    per_token = compiled.cost_analysis()["flops"] / (batch_size * config.block_size)
    assert forward_flops_per_token(config) == pytest.approx(per_token, rel=0.02)


def test_a_training_step_takes_the_flops_xla_counts_for_loss_and_gradient():
    config = ModelConfig(block_size=256, vocab_size=4096, n_layer=2, n_head=1, n_embd=1024)
    batch_BT1 = jax.ShapeDtypeStruct((2, config.block_size + 1), jnp.int32)

    def mean_loss(params, batch_BT1):
        return steps.token_losses(GPT(config), params, batch_BT1).mean()

    compiled = jax.jit(jax.grad(mean_loss)).lower(abstract_params(config), batch_BT1).compile()
    per_token = compiled.cost_analysis()["flops"] / (2 * config.block_size)
    assert train_flops_per_token(config) == pytest.approx(per_token, rel=0.02)
