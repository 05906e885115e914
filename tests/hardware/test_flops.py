"""Counts of parameters, FLOPs and bytes, against initialised models and XLA's own counts."""

import dataclasses
from collections import Counter
from functools import partial
from types import SimpleNamespace

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
    TrainConfig,
    with_vocab_size,
)
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware.flops import (
    forward_flops_per_token,
    headline_params,
    n_params,
    parts,
    steps_per_call,
    train_flops_per_token,
)
from nanogpt_jax.hardware.memory import (
    check_memory,
    estimate_memory,
    needed_bytes,
    optimizer_bytes,
)
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer

PARTS = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "mlp"}
PARTS |= {"lm_head": "head", "shift_1": "token shift", "shift_2": "token shift"}
NEWER = [{"activation": "relu2"}, *({name: value} for name, value in MODERN.items()), MODERN]
NEWER += [{"token_shift": True}, {"attention_window": 1}]
OPENAI_GPT2 = [  # preset, (n_layer, n_head, n_embd), parameters
    ("gpt2", (12, 12, 768), 124_439_808),
    ("gpt2-medium", (24, 16, 1024), 354_823_168),
    ("gpt2-large", (36, 20, 1280), 774_030_080),
    ("gpt2-xl", (48, 25, 1600), 1_557_611_200),
]
PRESET_SIZES = [  # preset, parameters, size in its original's words
    ("small", 804_096, "0.80M"),
    ("small-fast", 105_856, "0.11M"),
    ("shakespeare-laptop", 795_904, "0.80M"),
    ("shakespeare", 10_745_088, "10.65M"),
    ("lecture-colab", 209_729, "0.21M"),
    ("lecture-scaled", 10_788_929, "10.79M"),
]


def abstract_params(config: ModelConfig) -> dict:
    """Return the shapes of a model's parameters, without making them."""
    return jax.eval_shape(partial(steps.init_params, steps.make_model(config)), jax.random.key(0))


def flops_counted_by_xla(function, *arguments) -> float:
    """Return the FLOPs of a compiled function; nothing is run, so sizes may be real ones."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def forward_flops_counted_by_xla(config: ModelConfig) -> float:
    tokens_BT = jax.ShapeDtypeStruct((1, config.block_size), jnp.int32)

    def logits(params, tokens_BT):
        return GPT(config).apply({"params": params}, tokens_BT)

    counted = flops_counted_by_xla(logits, abstract_params(config), tokens_BT)
    return counted / config.block_size


def gradient(config: ModelConfig, batch_size: int = 1):
    """Return loss and gradient as a function, and the shapes of its arguments."""
    model = steps.make_model(config)

    def mean_loss(params, batch_BT1):
        return steps.token_losses(model, params, batch_BT1).mean()

    batch_BT1 = jax.ShapeDtypeStruct((batch_size, config.block_size + 1), jnp.int32)
    return jax.value_and_grad(mean_loss), abstract_params(config), batch_BT1


@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 6},
        {"block_size": 5, "vocab_size": 3, "n_layer": 3, "n_head": 2, "n_embd": 16},
    ],
    ids=str,
)
def test_parameter_counts_are_those_of_an_initialised_gpt(shape):
    for newer in [{}, *NEWER]:
        for bias in (True, False):
            config = ModelConfig(**shape, **newer, bias=bias)
            counted = Counter()
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
                names = {key.key for key in path}
                part = next((PARTS[name] for name in PARTS if name in names), "layer norm")
                counted[part] += leaf.size
            grouped = Counter()
            for part in parts(config):
                grouped[part.name.partition(":")[0]] += part.n_params
            # + leaves out parts without parameters, such as a tied head
            assert +grouped == counted, (newer, bias)
            assert n_params(config) == counted.total(), (newer, bias)


def test_parameter_counts_of_the_lectures_models_are_those_of_initialised_ones():
    for name in LECTURE_MODELS:
        config = ModelConfig(block_size=5, vocab_size=7, n_embd=6, **layers_of(name))
        made = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
        assert n_params(config) == made, name


@pytest.mark.parametrize(("preset", "shape", "expected"), OPENAI_GPT2)
def test_openai_gpt2_has_its_published_shape_and_number_of_parameters(preset, shape, expected):
    """With biases and the unpadded vocabulary, which the presets, after nanoGPT, do not have."""
    config = dataclasses.replace(PRESETS[preset].model, bias=True, vocab_size=50257)
    assert (config.n_layer, config.n_head, config.n_embd) == shape
    assert n_params(config) == expected


@pytest.mark.parametrize(("preset", "expected", "headline"), PRESET_SIZES)
def test_presets_have_their_originals_size(preset, expected, headline):
    """nanoGPT leaves the position embedding out of the size it prints; the lecture does not."""
    config = with_vocab_size(PRESETS[preset]).model
    assert n_params(config) == expected
    assert f"{headline_params(config) / 1e6:.2f}M" == headline


@pytest.mark.parametrize(("positions", "n_left_out"), [("learned", 1), ("rotary", 0)])
def test_the_headline_size_leaves_out_only_a_position_embedding(positions, n_left_out):
    config = ModelConfig(block_size=64, vocab_size=65, n_embd=24, positions=positions)
    assert n_params(config) - headline_params(config) == n_left_out * 64 * 24


@pytest.mark.parametrize("n_embd", [3, 48, 64, 768])
def test_swiglu_has_no_more_weights_than_gelu_and_hardly_fewer(n_embd):
    gelu, swiglu = (
        n_params(ModelConfig(vocab_size=1, n_head=1, n_embd=n_embd, activation=activation))
        for activation in ("gelu", "swiglu")
    )
    assert 0.97 * gelu < swiglu <= gelu


@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 64, "vocab_size": 64, "n_embd": 1024},
        {"block_size": 2048, "vocab_size": 64, "n_embd": 512},
        {"block_size": 64, "vocab_size": 65536, "n_embd": 512},
        {"block_size": 64, "vocab_size": 16384, "n_embd": 768, **MODERN},
    ],
    ids=["dense layers dominate", "attention dominates", "the head dominates", "newer parts"],
)
def test_forward_flops_are_those_that_xla_counts(shape):
    """Within 2 %: XLA counts elementwise work too."""
    config = ModelConfig(**shape, n_layer=1, n_head=1)
    counted = forward_flops_counted_by_xla(config)
    assert forward_flops_per_token(config) == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("newer", [{"activation": "swiglu"}, {"tied_head": False}, MODERN], ids=str)
@pytest.mark.parametrize("vocab_size", [64, 16384])
def test_forward_flops_of_each_newer_part_are_those_that_xla_counts(newer, vocab_size):
    shape = {"block_size": 64, "vocab_size": vocab_size, "n_layer": 2, "n_head": 1, "n_embd": 768}
    config = ModelConfig(**shape, **newer)
    counted = forward_flops_counted_by_xla(config)
    assert forward_flops_per_token(config) == pytest.approx(counted, rel=0.02)


def test_training_flops_are_those_that_xla_counts_for_loss_and_gradient():
    config = ModelConfig(block_size=128, vocab_size=4096, n_layer=1, n_head=1, n_embd=1024)
    counted = flops_counted_by_xla(*gradient(config)) / config.block_size
    assert train_flops_per_token(config) == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
def test_shakespeares_training_flops_are_those_that_xla_counts():
    """Without dropout: its random bits are elementwise work too, 1.3 % of the whole."""
    config = dataclasses.replace(with_vocab_size(PRESETS["shakespeare"]).model, dropout=0.0)
    counted = flops_counted_by_xla(*gradient(config)) / config.block_size
    assert train_flops_per_token(config) == pytest.approx(counted, rel=0.02)


SLOW_MODELS = sorted({*LECTURE_MODELS} - {"bigram", "residual"})


@pytest.mark.parametrize(
    "name", ["residual", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODELS)]
)
def test_training_flops_of_a_lecture_model_are_those_that_xla_counts(name):
    config = ModelConfig(block_size=128, vocab_size=512, n_embd=1024, **layers_of(name, 1))
    counted = flops_counted_by_xla(*gradient(config)) / config.block_size
    assert train_flops_per_token(config) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("small", {"n_layer": 2}),
        pytest.param("shakespeare", {"dropout": 0.0, "n_layer": 2}, marks=pytest.mark.slow),
        pytest.param("gpt2", {"n_layer": 1}, marks=pytest.mark.slow),
    ],
)
def test_activations_are_estimated_within_a_factor_of_two(preset, changes):
    model = dataclasses.replace(with_vocab_size(PRESETS[preset]).model, **changes)
    config = TrainConfig(model=model, compute=ComputeConfig(dtype="float32"), batch_size=2)
    estimated = estimate_memory(config)["activations"]
    function, *shapes = gradient(model, 2)
    compiled = jax.jit(function).lower(*shapes).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    assert needed / 2 < estimated < 2 * needed


def test_memory_is_saved_by_what_saves_it():
    model = PRESETS["gpt2"].model

    def estimate(**compute):
        return estimate_memory(TrainConfig(model=model, compute=ComputeConfig(**compute)))

    plain = estimate()
    assert plain["weights"] == plain["gradients"] == plain["optimizer"] / 2 == 4 * n_params(model)
    for saving in {"remat": True}, {"loss_chunks": 8}:
        assert estimate(**saving)["activations"] < plain["activations"]
    for costly in {"dtype": "float32"}, {"attention": "xla"}:
        assert estimate(**costly)["activations"] > plain["activations"]


@pytest.mark.parametrize(("peak", "expected"), [(0, 125), (300, 300)])
def test_a_compiled_function_needs_its_arrays_at_once_or_its_reported_peak(peak, expected):
    sizes = SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        temp_size_in_bytes=15,
        alias_size_in_bytes=80,
        peak_memory_in_bytes=peak,
    )
    assert needed_bytes(SimpleNamespace(memory_analysis=lambda: sizes)) == expected


@pytest.mark.parametrize(("n_devices", "memory"), [(1, 16 * 4225), (4, 4 * 4225), (1, None)])
def test_only_what_the_devices_cannot_hold_together_is_refused(n_devices, memory):
    bigram = ModelConfig(architecture="bigram", n_layer=1, n_head=1, bias=True, vocab_size=65)
    check_memory(bigram, 16 * 4225, memory, n_devices, "less")
    if memory is not None:
        with pytest.raises(InputError, match="use less"):
            check_memory(bigram, 16 * 4225, memory - 1, n_devices, "less")


@pytest.mark.parametrize("preset", ["tiny", "small-fast", "shakespeare-fast"])
def test_the_bytes_of_the_optimizer_are_those_of_its_arrays(preset):
    config = with_vocab_size(PRESETS[preset])
    tx = make_optimizer(config.optim, 10)
    state = jax.eval_shape(lambda params: tx.init(params), abstract_params(config.model))
    # Moments are all arrays but counters and the coefficients of Newton and Schulz.
    leaves = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32 and x.shape != (3,)]
    n_moments = sum(leaf.size for leaf in leaves)
    assert optimizer_bytes(config.model, config.optim.optimizer) == 4 * n_moments


def test_a_call_makes_several_updates_of_a_small_model_only_and_never_steps_over_an_evaluation():
    small = with_vocab_size(PRESETS["small"])
    assert steps_per_call(small) == 10
    assert steps_per_call(small, start_step=1234) == 2
    for fields in {"eval_interval": 5}, {"max_iters": 2005}:
        assert steps_per_call(dataclasses.replace(small, **fields)) == 5
    assert steps_per_call(dataclasses.replace(small, max_iters=2001)) == 1
    assert steps_per_call(with_vocab_size(PRESETS["shakespeare"])) == 1
