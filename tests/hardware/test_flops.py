import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from conftest import layers_of

from nanogpt_jax import steps
from nanogpt_jax.config import (
    LECTURE_MODELS,
    MODERN,
    PRESETS,
    ComputeConfig,
    ModelConfig,
    with_vocab_size,
)
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware.flops import (
    check_memory,
    estimate_memory,
    forward_flops_per_token,
    least_training_bytes,
    n_params,
    headline_params,
    optimizer_bytes,
    parts,
    train_flops_per_token,
)
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer

PARTS = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "mlp"}
PARTS |= {"lm_head": "head"}
NEWER = [{"activation": "relu2"}, *({name: value} for name, value in MODERN.items()), MODERN]
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
@pytest.mark.parametrize("newer", [{}, *NEWER], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 6},
        {"block_size": 5, "vocab_size": 3, "n_layer": 3, "n_head": 2, "n_embd": 16},
        {"block_size": 64, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128},
    ],
    ids=str,
)
def test_parameter_counts_are_those_of_an_initialised_gpt(shape, newer, bias):
    config = ModelConfig(**shape, **newer, bias=bias)
    counted = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        names = {key.key for key in path}
        part = next((PARTS[name] for name in PARTS if name in names), "layer norm")
        counted[part] += leaf.size
    grouped = Counter()
    for part in parts(config):
        grouped[part.name.partition(":")[0]] += part.n_params
    assert +grouped == counted  # + leaves out parts without parameters, as a tied head is
    assert n_params(config) == counted.total()


@pytest.mark.parametrize("rung", LECTURE_MODELS)
def test_a_rung_of_the_lecture_has_the_parameters_that_are_counted(rung):
    config = ModelConfig(block_size=5, vocab_size=7, n_embd=6, **layers_of(rung))
    made = jax.eval_shape(partial(steps.init_params, steps.make_model(config)), jax.random.key(0))
    assert n_params(config) == sum(leaf.size for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize(("preset", "shape", "expected"), OPENAI_GPT2)
def test_openai_gpt2_has_its_published_shape_and_number_of_parameters(preset, shape, expected):
    """With biases and the unpadded vocabulary, which the presets, after nanoGPT, do not have."""
    config = dataclasses.replace(PRESETS[preset]().model, bias=True, vocab_size=50257)
    assert (config.n_layer, config.n_head, config.n_embd) == shape
    assert n_params(config) == expected


@pytest.mark.parametrize(
    ("preset", "expected", "is_told_as"),
    [
        ("small", 804_096, "0.80M"),
        ("small-fast", 105_600, "0.11M"),
        ("shakespeare", 10_745_088, "10.65M"),
        ("lecture-colab", 209_729, "0.21M"),
        ("lecture-scaled", 10_788_929, "10.79M"),
    ],
)
def test_presets_have_their_originals_size(preset, expected, is_told_as):
    """nanoGPT leaves the position embedding out of the number it prints, the lecture does not."""
    config = with_vocab_size(PRESETS[preset]()).model
    assert n_params(config) == expected
    assert f"{headline_params(config) / 1e6:.2f}M" == is_told_as


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


@pytest.mark.parametrize(
    "newer", [{"activation": "swiglu"}, {"tied_head": False}, MODERN], ids=["swiglu", "head", "all"]
)
@pytest.mark.parametrize("vocab_size", [64, 16384])
def test_forward_flops_of_newer_parts_are_those_that_xla_counts(newer, vocab_size):
    config = ModelConfig(
        block_size=64, vocab_size=vocab_size, n_layer=2, n_head=1, n_embd=768, **newer
    )
    tokens_BT = jax.ShapeDtypeStruct((1, config.block_size), jnp.int32)
    logits_of = jax.jit(lambda params, tokens_BT: GPT(config).apply({"params": params}, tokens_BT))
    compiled = logits_of.lower(abstract_params(config), tokens_BT).compile()
    per_token = compiled.cost_analysis()["flops"] / config.block_size
    assert forward_flops_per_token(config) == pytest.approx(per_token, rel=0.02)


@pytest.mark.parametrize("n_embd", [3, 48, 64, 768])
def test_swiglu_has_no_more_weights_than_gelu_and_hardly_less(n_embd):
    gelu, swiglu = (
        n_params(ModelConfig(vocab_size=1, n_head=1, n_embd=n_embd, activation=activation))
        for activation in ("gelu", "swiglu")
    )
    assert 0.97 * gelu < swiglu <= gelu


@pytest.mark.parametrize(("positions", "n_told"), [("learned", 1), ("rotary", 0)])
def test_only_a_position_embedding_that_is_there_is_left_out_of_the_number_told(positions, n_told):
    config = ModelConfig(block_size=64, vocab_size=65, n_embd=24, positions=positions)
    assert n_params(config) - headline_params(config) == n_told * 64 * 24


def test_a_training_step_takes_the_flops_xla_counts_for_loss_and_gradient():
    config = ModelConfig(block_size=256, vocab_size=4096, n_layer=2, n_head=1, n_embd=1024)
    batch_BT1 = jax.ShapeDtypeStruct((2, config.block_size + 1), jnp.int32)

    def mean_loss(params, batch_BT1):
        return steps.token_losses(GPT(config), params, batch_BT1).mean()

    compiled = jax.jit(jax.grad(mean_loss)).lower(abstract_params(config), batch_BT1).compile()
    per_token = compiled.cost_analysis()["flops"] / (2 * config.block_size)
    assert train_flops_per_token(config) == pytest.approx(per_token, rel=0.02)


def compiled_gradient(config: ModelConfig, batch_size: int):
    """Return the compiled program of loss and gradient; nothing is run."""
    model = steps.make_model(config)
    abstract = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    batch_BT1 = jax.ShapeDtypeStruct((batch_size, config.block_size + 1), jnp.int32)

    def mean_loss(params, batch_BT1):
        return steps.token_losses(model, params, batch_BT1).mean()

    return jax.jit(jax.value_and_grad(mean_loss)).lower(abstract, batch_BT1).compile()


def test_shakespeares_step_takes_the_flops_xla_counts():
    """Without dropout: its random bits are elementwise work too, and 1.3 % of the whole."""
    config = dataclasses.replace(with_vocab_size(PRESETS["shakespeare"]()).model, dropout=0.0)
    counted = compiled_gradient(config, 1).cost_analysis()["flops"] / config.block_size
    assert train_flops_per_token(config) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("rung", sorted({*LECTURE_MODELS} - {"bigram"}))
def test_a_rungs_step_takes_the_flops_xla_counts(rung):
    config = ModelConfig(block_size=128, vocab_size=512, n_embd=1024, **layers_of(rung, 1))
    counted = compiled_gradient(config, 1).cost_analysis()["flops"] / config.block_size
    assert train_flops_per_token(config) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("small", {}), ("shakespeare", {"dropout": 0.0, "n_layer": 2}), ("gpt2", {"n_layer": 1})],
)
def test_activations_are_estimated_within_a_factor_of_two(preset, changes):
    config = dataclasses.replace(with_vocab_size(PRESETS[preset]()).model, **changes)
    compute = ComputeConfig(dtype="float32")
    estimated = estimate_memory(config, compute, batch_size=2)["activations"]
    needed = compiled_gradient(config, 2).memory_analysis().temp_size_in_bytes
    assert needed / 2 < estimated < 2 * needed


def test_memory_is_saved_by_what_saves_it():
    config = with_vocab_size(PRESETS["gpt2"]()).model
    plain = estimate_memory(config, ComputeConfig(), 16)
    assert plain["weights"] == plain["gradients"] == plain["optimizer"] / 2 == 4 * n_params(config)
    for saving in {"remat": True}, {"loss_chunks": 8}:
        saved = estimate_memory(config, ComputeConfig(**saving), 16)
        assert saved["activations"] < plain["activations"]
    for costly in {"dtype": "float32"}, {"attention": "xla"}:
        assert (
            estimate_memory(config, ComputeConfig(**costly), 16)["activations"]
            > (plain["activations"])
        )


@pytest.mark.parametrize(("n_devices", "memory"), [(1, 16 * 4225), (4, 4 * 4225), (1, None)])
def test_what_devices_can_hold_together_is_not_refused(n_devices, memory):
    bigram = ModelConfig(architecture="bigram", n_layer=1, n_head=1, bias=True, vocab_size=65)
    needed = least_training_bytes(bigram)
    check_memory(bigram, needed, memory, n_devices, "less")
    if memory is not None:
        with pytest.raises(InputError, match="take less"):
            check_memory(bigram, needed, memory - 1, n_devices, "less")


@pytest.mark.parametrize("preset", ["tiny", "small-fast", "shakespeare-fast"])
def test_the_bytes_of_the_optimizer_are_those_of_its_arrays(preset):
    config = with_vocab_size(PRESETS[preset]())
    tx = make_optimizer(config.optim, 10)
    state = jax.eval_shape(lambda params: tx.init(params), abstract_params(config.model))
    # All but counters, and the coefficients of Newton and Schulz.
    n_means = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 3)
    assert optimizer_bytes(config.model, config.optim.optimizer) == 4 * n_means
