"""Named configurations: `python train.py --config NAME`."""

import dataclasses
from pathlib import Path
from typing import Any

from nanogpt_jax.config.cli import configure, read_settings, split_flags
from nanogpt_jax.config.fields import replace_fields
from nanogpt_jax.config.schema import (
    REGULARIZATION,
    SCRATCH,
    Architecture,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from nanogpt_jax.errors import InputError, did_you_mean

# Each preset's line in --help. Losses are validation losses measured here unless it says otherwise.
ABOUT = {
    "tiny": "smoke test: 0.03M parameters, 60 steps; a few seconds on any CPU; generates noise",
    "small": "nanoGPT's CPU recipe: 0.80M parameters, 2000 steps; loss 1.90, a minute on 2 cores",
    "small-fast": "the same loss in a tenth of the time: 0.11M parameters, 260 steps; loss 1.85",
    "shakespeare-laptop": "nanoGPT's GPU loss on a CPU: 0.80M parameters, 2400 steps; loss 1.45",
    "shakespeare": "nanoGPT's baby GPT: 10.65M parameters, 5000 steps; loss 1.47 on a GPU or TPU",
    "shakespeare-fast": "a lower loss, sooner: 7.38M parameters, 1500 steps; loss 1.45, GPU or TPU",
    "gpt2": "nanoGPT's GPT-2: 124M parameters, 600,000 steps; its loss: 2.85, 4 days on 8 A100s",
    "gpt2-medium": "the same recipe for the shape of GPT-2 medium: 354M parameters",
    "gpt2-large": "the same recipe for the shape of GPT-2 large: 772M parameters",
    "gpt2-xl": "the same recipe for the shape of GPT-2 XL: 1555M parameters",
    "finetune-shakespeare": "finetune OpenAI's GPT-2, 124M parameters, in 20 steps; GPU or TPU",
    "eval-gpt2": "evaluate OpenAI's GPT-2, 124M parameters, on OpenWebText; nanoGPT's loss: 3.12",
    "eval-gpt2-medium": "evaluate GPT-2 medium, 354M parameters; nanoGPT's loss: 2.84",
    "eval-gpt2-large": "evaluate GPT-2 large, 773M parameters; nanoGPT's loss: 2.67",
    "eval-gpt2-xl": "evaluate GPT-2 XL, 1556M parameters; nanoGPT's loss: 2.54",
    "lecture-bigram": "the lecture's bigram model: 4,225 parameters; loss 2.49, seconds on a CPU",
    "lecture-head": "one head of self-attention: 7,553 parameters; loss 2.39, seconds on a CPU",
    "lecture-multihead": "four smaller heads: 7,553 parameters; loss 2.28, seconds on a CPU",
    "lecture-feedforward": "with a feed-forward layer: 8,609 parameters; loss 2.26, seconds on CPU",
    "lecture-deep": "three such blocks, worse at first: 16,865 parameters; loss 2.30",
    "lecture-residual": "with residual connections: 41,921 parameters; loss 2.09, seconds on a CPU",
    "lecture-layernorm": "with LayerNorm: 42,369 parameters; loss 2.08, seconds on a CPU",
    "lecture-colab": "the lecture's Colab: 0.21M parameters; loss 1.80, a minute on 2 cores",
    "lecture-scaled": "its last model: 10.79M parameters; the lecture's loss: 1.48; GPU or TPU",
}

# Source: Radford et al., "Language models are unsupervised multitask learners", 2019, table 2;
# n_head from the files on the Hugging Face Hub.
GPT2_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
GPT2_REVISIONS = {  # of openai-community/NAME on the Hub
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
# Newer than GPT-2, and better; nanogpt_jax/README.md says what each part contributes.
# fmt: off
MODERN: dict[str, Any] = {
    "activation": "swiglu", "positions": "rotary", "norm": "rmsnorm", "qk_norm": True,
    "tied_head": False, "zero_init": True,
}

TINY = TrainConfig(
    config="tiny", batch_size=8, max_iters=60, eval_interval=30, log_interval=5,
    model=ModelConfig(block_size=32, n_layer=2, n_head=2, n_embd=32),
    optim=OptimConfig(learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, beta2=0.99),
)
SMALL = TrainConfig(
    config="small", batch_size=12, max_iters=2000, eval_interval=250,
    model=ModelConfig(block_size=64, n_layer=4, n_head=4, n_embd=128),
    # beta2 is above the usual 0.95 because a batch has only 768 tokens
    optim=OptimConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99),
)
SMALL_FAST = TrainConfig(
    config="small-fast", batch_size=12, max_iters=260, eval_interval=260,
    eval_first=False,  # an evaluation takes as long as 40 steps
    # An eighth of small's parameters: a larger model learns more per step, less per second.
    model=ModelConfig(block_size=64, n_layer=2, n_head=2, n_embd=64, token_shift=True, **MODERN),
    optim=OptimConfig(
        optimizer="muon", learning_rate=0.02, weight_decay=0.0, grad_clip=0.0,
        muon_momentum=0.85,  # below the usual 0.95 because there are few steps
        schedule="wsd", cooldown=1.0, warmup_iters=0, min_lr=0.0,  # linear decay over all steps
    ),
)
SHAKESPEARE = TrainConfig(
    config="shakespeare", batch_size=64, max_iters=5000, eval_interval=250,
    model=ModelConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
    optim=SMALL.optim,
)
SHAKESPEARE_FAST = TrainConfig(
    config="shakespeare-fast", batch_size=64, max_iters=1500, eval_interval=250,
    model=ModelConfig(block_size=256, n_layer=6, n_head=5, n_embd=320, dropout=0.2, **MODERN),
    optim=dataclasses.replace(SMALL_FAST.optim, learning_rate=0.01, muon_momentum=0.95),
)
SHAKESPEARE_LAPTOP = TrainConfig(
    config="shakespeare-laptop", batch_size=8, max_iters=2400, eval_interval=800, eval_first=False,
    # Each character is read five times: without noise, the loss would rise towards the end.
    model=ModelConfig(
        block_size=256, attention_window=64, n_layer=4, n_head=4, n_embd=128, token_shift=True,
        token_noise=0.04, **MODERN,
    ),
    optim=dataclasses.replace(SHAKESPEARE_FAST.optim, weight_decay=0.2),
)
# nanoGPT's recipe for GPT-2 on OpenWebText, in its four shapes.
GPT2 = [
    TrainConfig(
        config=name, dataset="openwebtext", max_iters=600_000, eval_interval=1000, eval_iters=200,
        # 480 sequences per update, nanoGPT's 40 x 12, but 16 devices can share them
        batch_size=16, gradient_accumulation_steps=30,
        # GPT-2's vocabulary of 50257 is padded to a multiple of 64: faster on GPU and TPU.
        model=ModelConfig(vocab_size=50304, block_size=1024, **shape),
        optim=OptimConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000, beta2=0.95),
    )
    for name, shape in GPT2_SHAPES.items()
]
# OpenAI's weights, evaluated on the validation split of OpenWebText.
EVAL_GPT2 = [
    TrainConfig(
        config=f"eval-{name}", init_from=name, dataset="openwebtext",
        batch_size=8, eval_iters=500, eval_only=True,
        model=ModelConfig(vocab_size=50304, bias=True, activation="gelu_tanh", **shape),
    )
    for name, shape in GPT2_SHAPES.items()
]
FINETUNE_SHAKESPEARE = TrainConfig(
    config="finetune-shakespeare", init_from="gpt2", dataset="shakespeare",
    max_iters=20, eval_interval=5, log_interval=1,
    # 32,768 tokens per update; Shakespeare has 9 times as many
    batch_size=1, gradient_accumulation_steps=32,
    model=EVAL_GPT2[0].model,
    optim=OptimConfig(learning_rate=3e-5, min_lr=3e-5, decay_lr=False),  # the weights are good
)


def lecture(architecture: Architecture, **changes) -> TrainConfig:
    """A model of "Let's build GPT" with the lecture's own hyperparameters.

    One difference: biases and LayerNorm scales have no weight decay, as in all presets. PyTorch's
    default, which the lecture uses, shrinks them by a twentieth over 5000 steps.
    """
    usual = TrainConfig(
        batch_size=32, max_iters=5000, eval_interval=500, log_interval=50,
        model=ModelConfig(bias=True, block_size=8, n_layer=1, n_head=1, n_embd=32),
        optim=OptimConfig(
            learning_rate=1e-3, min_lr=1e-3, decay_lr=False, warmup_iters=0,
            weight_decay=0.01, beta2=0.999, grad_clip=0.0,
        ),
    )
    own = {"config": f"lecture-{architecture}", "architecture": architecture}
    return replace_fields(usual, own | changes)


LECTURE = (
    lecture("bigram", max_iters=3000, learning_rate=1e-2, min_lr=1e-2),
    lecture("head"),
    lecture("multihead", n_head=4),
    lecture("feedforward", n_head=4),
    lecture("deep", n_layer=3, n_head=4),
    lecture("residual", n_layer=3, n_head=4),
    lecture("layernorm", n_layer=3, n_head=4),
    lecture(
        "layernorm", config="lecture-colab", batch_size=16,
        block_size=32, n_layer=4, n_head=4, n_embd=64,
    ),
    lecture(
        "layernorm", config="lecture-scaled", batch_size=64, learning_rate=3e-4, min_lr=3e-4,
        block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
    ),
)
PRESETS = {preset.config: preset for preset in (
    TINY, SMALL, SMALL_FAST, SHAKESPEARE_LAPTOP, SHAKESPEARE, SHAKESPEARE_FAST,
    *GPT2, FINETUNE_SHAKESPEARE, *EVAL_GPT2, *LECTURE,
)}
# fmt: on
# Pretrained weights determine all but these fields of the model.
WEIGHTS_FIELDS = vars(ModelConfig()).keys() - {"block_size", "vocab_size", *REGULARIZATION}


def with_vocab_size(config: TrainConfig) -> TrainConfig:
    """Return a configuration usable without its dataset: a vocab_size of None becomes 65."""
    return replace_fields(config, {"vocab_size": config.model.vocab_size or 65})


def parse_train_config(
    argv: list[str], about: str | None = None, cls: type[TrainConfig] = TrainConfig
) -> TrainConfig:
    """Return the configuration of `--config NAME|FILE.json [--any_field value ...]`.

    Flags override the file, and the file overrides the preset that it names. A command with fields
    of its own has a subclass of TrainConfig as `cls`.
    """
    settings = flags = split_flags(argv, cls)
    name = preset = flags.get("config", TrainConfig.config)
    where = ""
    if name.endswith(".json"):
        from_file = read_settings(Path(name), TrainConfig)
        preset, where = from_file.pop("config", TrainConfig.config), f"{name}: "
        if "max_iters" in from_file:  # a run's file: what its minutes came to
            from_file.pop("minutes", None)
        settings = from_file | flags
    if preset not in PRESETS:
        raise InputError(
            f"{where}there is no preset {preset!r}.{did_you_mean(preset, PRESETS)} Presets are "
            f"{', '.join(PRESETS)}; --config also takes a JSON file"
        )
    presets = "\n".join(f"  {name:20} {line}" for name, line in ABOUT.items())
    about = f"{about or ''}\nPresets:\n{presets}"
    config = configure(cls(**vars(PRESETS[preset])), settings, about)
    if config.init_from != SCRATCH and (given := flags.keys() & WEIGHTS_FIELDS):
        names = ", ".join(f"--{name}" for name in sorted(given))
        raise InputError(
            f"the weights of {config.init_from} bring their own {names}: leave that out"
        )
    return config
