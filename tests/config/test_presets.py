import json
import re

import pytest

from nanogpt_jax.config import MODERN, PRESETS, parse_train_config, to_flat_dict, with_vocab_size
from nanogpt_jax.config.presets import ABOUT
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import headline_params, n_params, run_flops

# What nanoGPT's own command line or configuration file sets; see its README and config folder.
ADAMW = {"weight_decay": 0.1, "beta1": 0.9, "grad_clip": 1.0, "decay_lr": True, "bias": False}
CHARACTERS = ADAMW | {
    "learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100, "beta2": 0.99,
    "gradient_accumulation_steps": 1, "activation": "gelu", "seed": 1337,
}  # fmt: skip
GPT2 = ADAMW | {
    "learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 2000, "beta2": 0.95,
    "max_iters": 600_000, "batch_size": 16, "gradient_accumulation_steps": 30, "block_size": 1024,
    "vocab_size": 50304, "dropout": 0.0, "eval_interval": 1000, "eval_iters": 200,
    "dataset": "openwebtext", "activation": "gelu", "seed": 1337,
}  # fmt: skip
PRETRAINED = {
    "block_size": 1024, "bias": True, "activation": "gelu_tanh", "dropout": 0.0, "seed": 1337,
}  # fmt: skip
EVALUATION = PRETRAINED | {
    "dataset": "openwebtext", "batch_size": 8, "eval_iters": 500, "eval_only": True,
}  # fmt: skip
OF_NANOGPT = {
    "small": CHARACTERS | {
        "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12,
        "max_iters": 2000, "eval_interval": 250, "dropout": 0.0,
    },
    "shakespeare": CHARACTERS | {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64,
        "max_iters": 5000, "eval_interval": 250, "dropout": 0.2,
    },
    "gpt2": GPT2 | {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": GPT2 | {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": GPT2 | {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": GPT2 | {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    # nanoGPT starts from gpt2-xl; it evaluates on 40 random windows, we on all 36.
    "finetune-shakespeare": PRETRAINED | {
        "init_from": "gpt2", "dataset": "shakespeare", "batch_size": 1, "eval_interval": 5,
        "gradient_accumulation_steps": 32, "max_iters": 20, "learning_rate": 3e-5,
        "decay_lr": False, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    },
    "eval-gpt2": EVALUATION | {"init_from": "gpt2"},
    "eval-gpt2-medium": EVALUATION | {"init_from": "gpt2-medium"},
    "eval-gpt2-large": EVALUATION | {"init_from": "gpt2-large"},
    "eval-gpt2-xl": EVALUATION | {"init_from": "gpt2-xl"},
}  # fmt: skip


def test_a_gpt2_update_has_as_many_sequences_as_nanogpts():
    assert GPT2["batch_size"] * GPT2["gradient_accumulation_steps"] == 12 * 40


# What the lecture's code sets: PyTorch's AdamW, a constant rate, no clipping.
LECTURE = {
    "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "grad_clip": 0.0, "decay_lr": False,
    "learning_rate": 1e-3, "max_iters": 5000, "eval_interval": 500, "batch_size": 32,
    "block_size": 8, "n_embd": 32, "dropout": 0.0, "seed": 1337, "gradient_accumulation_steps": 1,
}  # fmt: skip
THREE = {"n_layer": 3, "n_head": 4}
OF_THE_LECTURE = {
    "lecture-bigram": LECTURE | {"learning_rate": 1e-2, "max_iters": 3000},
    "lecture-head": LECTURE | {"n_layer": 1, "n_head": 1},
    "lecture-multihead": LECTURE | {"n_layer": 1, "n_head": 4},
    "lecture-feedforward": LECTURE | {"n_layer": 1, "n_head": 4},
    "lecture-deep": LECTURE | THREE,
    "lecture-residual": LECTURE | THREE,
    "lecture-layernorm": LECTURE | THREE,
    "lecture-colab": LECTURE | {
        "n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 32, "batch_size": 16,
    },
    "lecture-scaled": LECTURE | {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64,
        "dropout": 0.2, "learning_rate": 3e-4,
    },
}  # fmt: skip
EXPECTED = OF_NANOGPT | OF_THE_LECTURE


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_has_the_values_of_its_original(name):
    flat = to_flat_dict(parse_train_config(["--config", name]))
    assert {key: flat[key] for key in EXPECTED[name]} == EXPECTED[name]


FAST = [name for name in PRESETS if name.endswith("-fast")]


def test_every_preset_but_the_smoke_test_and_our_own_recipes_is_compared_with_its_original():
    assert PRESETS.keys() - EXPECTED.keys() == {"tiny", "shakespeare-laptop", *FAST}
    assert FAST


@pytest.mark.parametrize("name", FAST)
def test_a_fast_preset_has_the_task_of_its_slow_one_and_costs_less(name):
    """The same text, context and tokens per step; fewer steps, and no larger model."""
    fast, slow = (with_vocab_size(PRESETS[n]) for n in (name, name.removesuffix("-fast")))
    for field in "dataset", "tokenizer", "batch_size", "gradient_accumulation_steps", "seed":
        assert getattr(fast, field) == getattr(slow, field)
    assert fast.model.block_size == slow.model.block_size
    assert fast.tokens_per_iter == slow.tokens_per_iter
    assert n_params(fast.model) <= n_params(slow.model)
    assert fast.max_iters < slow.max_iters
    assert fast.eval_iters == slow.eval_iters  # the whole split of small: losses can be compared
    assert fast.compute == slow.compute


def test_the_preset_for_laptops_has_the_task_of_shakespeare_and_takes_a_hundredth_of_its_flops():
    laptop, large = (with_vocab_size(PRESETS[f"shakespeare{end}"]) for end in ("-laptop", ""))
    assert (laptop.dataset, laptop.eval_iters, laptop.seed) == (large.dataset, 0, large.seed)
    assert sum(run_flops(laptop, 111_540)) < sum(run_flops(large, 111_540)) / 100


def test_a_step_of_small_fast_sees_768_tokens():
    assert PRESETS["small-fast"].tokens_per_iter == 768


def test_the_learning_rate_decays_over_the_whole_run_in_every_preset():
    assert {preset.optim.lr_decay_iters for preset in PRESETS.values()} == {None}


def test_gpt2_updates_have_half_a_million_tokens():
    assert parse_train_config(["--config=gpt2"]).tokens_per_iter == 491_520


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_own_name_in_its_config(name):
    """It names the run's folder."""
    assert PRESETS[name].config == name


@pytest.mark.parametrize("name", PRESETS)
def test_the_help_gives_the_usual_number_of_parameters(name):
    """nanoGPT does not count the position embedding, the lecture does."""
    n_params = headline_params(with_vocab_size(PRESETS[name]).model)
    doc = ABOUT[name]
    if exact := re.search(r"(\d+,\d+) parameters", doc):
        assert exact[1] == f"{n_params:,}"
        return
    shown, decimals = re.search(r"(\d+\.?(\d*))M", doc).groups()
    assert shown == f"{n_params / 1e6:.{len(decimals)}f}"


def test_small_is_the_default():
    assert parse_train_config([]) == PRESETS["small"]


def test_a_flag_before_or_after_the_preset_changes_one_field():
    for argv in (["--config=small", "--n_layer=2"], ["--n_layer=2", "--config", "small"]):
        small, config = to_flat_dict(PRESETS["small"]), to_flat_dict(parse_train_config(argv))
        assert {key for key in small if small[key] != config[key]} == {"n_layer"}


@pytest.mark.parametrize(
    ("misspelt", "near"),
    [
        ("smal", "small"),
        ("shakespear", "shakespeare"),
        ("Shakespeare", "shakespeare"),
        ("shakespeare_char", "shakespeare"),
        ("gpt2_xl", "gpt2-xl"),
        ("gpt2medium", "gpt2-medium"),
    ],
)
def test_a_misspelt_preset_answers_with_the_near_match_and_all_presets(misspelt, near):
    with pytest.raises(InputError, match=f"no preset.*'{misspelt}'.*Did you mean {near}") as error:
        parse_train_config(["--config", misspelt])
    assert all(name in str(error.value) for name in PRESETS)


def test_a_json_file_that_names_an_unknown_preset_is_refused(tmp_path):
    """Otherwise it would silently train a different model."""
    path = tmp_path / "mine.json"
    path.write_text('{"config": "smal", "max_iters": 10}')
    with pytest.raises(InputError, match=r"'smal'.*Did you mean small"):
        parse_train_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("n_layer", 2), ("n_head", 1), ("n_embd", 64), ("bias", True), ("activation", "gelu")),
        *MODERN.items(),
        ("positions", "learned"),
        ("token_shift", True),
        ("attention_window", 4),
    ],
)
def test_a_flag_that_the_weights_determine_is_refused(flag, value):
    """Otherwise it would be silently ignored."""
    argv = ["--config=tiny", "--init_from=gpt2", f"--{flag}={value}"]
    with pytest.raises(
        InputError, match=f"the weights of gpt2 bring their own --{flag}: leave that out"
    ):
        parse_train_config(argv)


def test_flags_that_the_weights_do_not_determine_are_accepted():
    argv = ["--init_from=gpt2", "--dropout=0.1", "--token_noise=0.2", "--block_size=256"]
    model = parse_train_config([*argv, "--vocab_size=50304"]).model
    assert (model.dropout, model.token_noise) == (0.1, 0.2)
    assert (model.block_size, model.vocab_size) == (256, 50304)


def test_the_config_of_a_run_that_began_with_weights_is_accepted(tmp_path):
    config = PRESETS["finetune-shakespeare"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_flat_dict(config)))
    assert parse_train_config(["--config", str(path)]).model == config.model
