"""Named configurations: `python train.py --config NAME`. Each says what to expect of it.

Measured figures, with machine and versions, stand in the README's Results.
"""

import dataclasses
from pathlib import Path

from nanogpt_jax.config.cli import parse_args, read_settings, split_settings
from nanogpt_jax.config.schema import (
    GPT2,
    SCRATCH,
    ComputeConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from nanogpt_jax.errors import InputError, did_you_mean

# OpenAI's four, so that a shape is known without a network. Source: Radford et al., "Language
# models are unsupervised multitask learners", 2019, table 2; heads from the files themselves.
GPT2_SHAPES = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


def tiny() -> TrainConfig:
    """Smoke test: 0.03M parameters, 60 steps, a few seconds on any CPU. Writes noise."""
    return TrainConfig(
        config="tiny",
        batch_size=8,
        max_iters=60,
        eval_interval=30,
        log_interval=5,
        model=ModelConfig(block_size=32, n_layer=2, n_head=2, n_embd=32),
        optim=OptimConfig(learning_rate=1e-2, min_lr=1e-3, warmup_iters=10, beta2=0.99),
    )


def small() -> TrainConfig:
    """nanoGPT's CPU recipe: 0.80M parameters, 2000 steps. Loss 1.90; a minute on 2 CPU cores."""
    return TrainConfig(
        config="small",
        batch_size=12,
        max_iters=2000,
        eval_interval=250,
        model=ModelConfig(block_size=64, n_layer=4, n_head=4, n_embd=128),
        # beta2 is above the usual 0.95 because a step sees only 768 tokens
        optim=OptimConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99),
    )


# What is newer than GPT-2 and pays: the README's "The same loss, sooner" has each part's share.
MODERN = {
    "activation": "swiglu",
    "positions": "rotary",
    "norm": "rmsnorm",
    "qk_norm": True,
    "tied_head": False,
    "zero_init": True,
}


def small_fast() -> TrainConfig:
    """To small's loss in a tenth of its time: 0.11M parameters, 320 steps. Loss 1.87; seconds."""
    return TrainConfig(
        config="small-fast",
        batch_size=12,
        max_iters=320,
        eval_interval=320,
        eval_first=False,  # an evaluation takes as long as 40 steps
        # An eighth of small's parameters: more of them learn more from a step, but not in a second.
        model=ModelConfig(block_size=64, n_layer=2, n_head=2, n_embd=64, **MODERN),
        optim=OptimConfig(
            optimizer="muon",
            learning_rate=0.02,
            muon_momentum=0.85,  # below the usual 0.95, since there are few steps
            # A straight line down from the first step to the last.
            schedule="wsd",
            cooldown=1.0,
            min_lr=0.0,
            warmup_iters=0,
            weight_decay=0.0,
            grad_clip=0.0,
        ),
    )


def shakespeare() -> TrainConfig:
    """nanoGPT's baby GPT: 10.65M parameters, 5000 steps. Loss 1.47; wants a GPU or TPU."""
    return TrainConfig(
        config="shakespeare",
        batch_size=64,
        max_iters=5000,
        eval_interval=250,
        model=ModelConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
        optim=OptimConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99),
    )


def shakespeare_fast() -> TrainConfig:
    """To shakespeare's loss sooner: 7.38M parameters, 1500 steps. Not timed yet; wants a GPU."""
    fast = small_fast()
    return dataclasses.replace(
        fast,
        config="shakespeare-fast",
        batch_size=64,
        max_iters=1500,
        eval_interval=250,
        eval_first=True,
        # Chosen by proxy, on a CPU: a sixteenth of the size, of the text and of the tokens read,
        # so that the text is seen as often. There 0.2 was the best dropout, a narrower model no
        # worse than one of shakespeare's width, and a half of the rate with more momentum better.
        model=ModelConfig(block_size=256, n_layer=6, n_head=5, n_embd=320, dropout=0.2, **MODERN),
        optim=dataclasses.replace(fast.optim, learning_rate=0.01, muon_momentum=0.95),
    )


def gpt2(name: str = "gpt2") -> TrainConfig:
    """nanoGPT's GPT-2 recipe: 124M parameters, 0.5M tokens a step, 600,000 steps on OpenWebText."""
    return TrainConfig(
        config=name,
        dataset="openwebtext",
        batch_size=16,  # 480 sequences an update, as nanoGPT's 40 x 12, and can be shared by 16
        gradient_accumulation_steps=30,
        max_iters=600_000,
        eval_interval=1000,
        eval_iters=200,
        model=ModelConfig(
            vocab_size=50304,  # GPT-2's 50257, padded to a multiple of 64: faster on GPU and TPU
            block_size=1024,
            **GPT2_SHAPES[name],
        ),
        optim=OptimConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000, beta2=0.95),
        compute=ComputeConfig(loss_chunks=8),  # the logits of a batch would take 3.3 GB
    )


def gpt2_medium() -> TrainConfig:
    """The shape of GPT-2 medium, 354M parameters, in nanoGPT's GPT-2 recipe."""
    return gpt2("gpt2-medium")


def gpt2_large() -> TrainConfig:
    """The shape of GPT-2 large, 772M parameters, in nanoGPT's GPT-2 recipe."""
    return gpt2("gpt2-large")


def gpt2_xl() -> TrainConfig:
    """The shape of GPT-2 XL, 1555M parameters, in nanoGPT's GPT-2 recipe."""
    return gpt2("gpt2-xl")


def of_pretrained(name: str, **fields) -> TrainConfig:
    """Begin with OpenAI's weights, which bring their tokenizer; rows are padded for speed."""
    return TrainConfig(
        init_from=name,
        model=ModelConfig(vocab_size=50304, bias=True, activation="gelu_tanh", **GPT2_SHAPES[name]),
        **fields,
    )


def finetune_shakespeare() -> TrainConfig:
    """OpenAI's GPT-2, 124M parameters, finetuned on Shakespeare in 20 steps, as nanoGPT does."""
    return of_pretrained(
        "gpt2",
        config="finetune-shakespeare",
        dataset="shakespeare",
        batch_size=1,
        gradient_accumulation_steps=32,  # 32,768 tokens an update: Shakespeare has nine of these
        max_iters=20,
        eval_interval=5,
        log_interval=1,
        # small and constant: the weights are good already
        optim=OptimConfig(learning_rate=3e-5, min_lr=3e-5, decay_lr=False),
        compute=ComputeConfig(loss_chunks=8),
    )


def eval_gpt2(name: str = "gpt2") -> TrainConfig:
    """OpenAI's GPT-2, 124M parameters, on OpenWebText's validation split. Loss 3.12."""
    return of_pretrained(
        name,
        config=f"eval-{name}",
        dataset="openwebtext",
        batch_size=8,
        eval_iters=500,
        eval_only=True,
        compute=ComputeConfig(loss_chunks=8),
    )


def eval_gpt2_medium() -> TrainConfig:
    """The same of GPT-2 medium, 354M parameters. Loss 2.84."""
    return eval_gpt2("gpt2-medium")


def eval_gpt2_large() -> TrainConfig:
    """The same of GPT-2 large, 773M parameters. Loss 2.67."""
    return eval_gpt2("gpt2-large")


def eval_gpt2_xl() -> TrainConfig:
    """The same of GPT-2 XL, 1556M parameters. Loss 2.54."""
    return eval_gpt2("gpt2-xl")


def lecture(rung: str, learning_rate=1e-3, max_iters=5000, **changes) -> TrainConfig:
    """A step of "Let's build GPT", with the lecture's own hyperparameters.

    Only that AdamW's decay leaves out biases and LayerNorm's scales, as in all presets: the
    lecture's PyTorch default decays them too, which over 5000 steps shrinks them by a twentieth.
    """
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 8} | changes
    batch_size = shape.pop("batch_size", 32)
    return TrainConfig(
        config=f"lecture-{rung}",
        batch_size=batch_size,
        max_iters=max_iters,
        eval_interval=500,
        log_interval=50,
        model=ModelConfig(**{"architecture": rung, "bias": True} | shape),
        optim=OptimConfig(
            learning_rate=learning_rate,
            min_lr=learning_rate,
            warmup_iters=0,
            decay_lr=False,
            weight_decay=0.01,
            beta2=0.999,
            grad_clip=0.0,
        ),
    )


def lecture_bigram() -> TrainConfig:
    """Lecture: the next character from the last one alone. 4,225 parameters. Loss 2.49."""
    return lecture("bigram", learning_rate=1e-2, max_iters=3000)


def lecture_head() -> TrainConfig:
    """Lecture: one head of self-attention, 32 wide, context 8. 7,553 parameters. Loss 2.41."""
    return lecture("head")


def lecture_multihead() -> TrainConfig:
    """Lecture: four heads of 8 in its place. 7,553 parameters. Loss 2.28."""
    return lecture("multihead", n_head=4)


def lecture_feedforward() -> TrainConfig:
    """Lecture: and a feed-forward layer. 8,609 parameters. Loss 2.24."""
    return lecture("feedforward", n_head=4)


def lecture_deep() -> TrainConfig:
    """Lecture, in passing: three of these on each other do worse. 16,865 parameters."""
    return lecture("deep", n_head=4, n_layer=3)


def lecture_residual() -> TrainConfig:
    """Lecture: three blocks, with a way around each part. 41,921 parameters. Loss 2.08."""
    return lecture("residual", n_head=4, n_layer=3)


def lecture_layernorm() -> TrainConfig:
    """Lecture: and LayerNorm. 42,369 parameters. Loss 2.06."""
    return lecture("layernorm", n_head=4, n_layer=3)


def lecture_scaled() -> TrainConfig:
    """Lecture: all of it scaled up. 10.79M parameters. Loss 1.48; wants a GPU or TPU."""
    shape = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}
    rung = lecture("layernorm", learning_rate=3e-4, batch_size=64, **shape)
    return dataclasses.replace(rung, config="lecture-scaled")


def lecture_colab() -> TrainConfig:
    """Lecture's Colab: 64 wide, context 32. 0.21M parameters. Loss 1.82; a minute on a CPU."""
    rung = lecture("layernorm", batch_size=16, n_layer=4, n_head=4, n_embd=64, block_size=32)
    return dataclasses.replace(rung, config="lecture-colab")


LECTURE = (
    (lecture_bigram, lecture_head, lecture_multihead, lecture_feedforward, lecture_deep)
    + (lecture_residual, lecture_layernorm, lecture_colab, lecture_scaled)
)  # fmt: skip
_GPT2 = (gpt2, gpt2_medium, gpt2_large, gpt2_xl)
_PRETRAINED = (finetune_shakespeare, eval_gpt2, eval_gpt2_medium, eval_gpt2_large, eval_gpt2_xl)
_ALL = (tiny, small, small_fast, shakespeare, shakespeare_fast, *_GPT2, *_PRETRAINED, *LECTURE)
# What pretrained weights say themselves.
OF_WEIGHTS = {"architecture", "n_layer", "n_head", "n_embd", "bias", "known_tokens", *GPT2}
PRESETS = {preset.__name__.replace("_", "-"): preset for preset in _ALL}


def with_vocab_size(config: TrainConfig) -> TrainConfig:
    """Return a configuration for use without its dataset: vocab_size is tiny Shakespeare's 65,
    where the dataset would say it."""
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 65)
    return dataclasses.replace(config, model=model)


def parse_train_config(
    argv: list[str], about: str = "", cls: type[TrainConfig] = TrainConfig
) -> TrainConfig:
    """Return the configuration of `--config NAME|FILE.json [--any_field value ...]`.

    Args:
        cls: TrainConfig, or a class that adds a command's own fields to it.

    Raises:
        InputError: an unknown preset, flag or field, or a value that cannot be.
    """
    settings = split_settings(argv, cls)
    name = settings.get("config", TrainConfig.config)
    default = PRESETS[TrainConfig.config]()
    if name in PRESETS:
        default = PRESETS[name]()
    elif name.endswith(".json"):
        # Fields that the file leaves out come from the preset it names, if it names one.
        from_file = read_settings(Path(name), TrainConfig)
        base = from_file.pop("config", None)
        if base in PRESETS:
            default = PRESETS[base]()
        elif base is not None:
            hint = did_you_mean(base, PRESETS)
            raise InputError(f"{name}: config must be a preset, but there is no {base!r}.{hint}")
        settings = from_file | settings
    else:
        known = f"presets are {', '.join(PRESETS)}"
        hint = did_you_mean(name, PRESETS)
        raise InputError(f"there is no preset or JSON file {name!r}: {known}.{hint}")
    presets = "\n".join(f"  {key:20} {preset.__doc__}" for key, preset in PRESETS.items())
    default = cls(**vars(default))
    config = parse_args(cls, settings, default, f"{about}\n\nPresets:\n{presets}")
    given = split_settings(argv, cls).keys() & OF_WEIGHTS
    if given and config.init_from != SCRATCH:
        flags = ", ".join(f"--{name}" for name in sorted(given))
        raise InputError(f"the weights of {config.init_from} bring {flags}: leave it out")
    return config
