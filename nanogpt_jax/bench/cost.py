"""Estimate what a run costs: python -m nanogpt_jax cost --config NAME [--any_field value ...]

Counts parameters, FLOPs and memory from the configuration alone, and prints the hours, kilowatt
hours and dollars that the run takes on known chips. Needs no chip and no JAX, and runs nothing.

    --mfu 0.4      share of the chips' peak that the run is assumed to reach: nanoGPT reached 0.37
                   for GPT-2 124M on an A100; models as small as `small` reach far less anywhere
    --reference    print the GPTs that this field grew from, published totals next to the count
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import corpora
from nanogpt_jax.bench import published
from nanogpt_jax.config import PRESETS, TrainConfig, parse_train_config, with_vocab_size
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import (
    amount,
    chip_named,
    duration,
    estimate_memory,
    forward_flops_per_token,
    headline_params,
    is_float32,
    n_params,
    parts,
    run_flops,
    size_in_words,
    train_flops_per_token,
)

TABLE = ("T4", "RTX 3070 Ti", "RTX 4090", "L4", "A100 40GB", "H100", "H200", "TPU v5e", "TPU v6e")


@dataclass(frozen=True)
class CostConfig(TrainConfig):
    """A run, and how to price it."""

    mfu: float = 0.4
    """Model FLOPs utilization to assume: the share of the chip's peak, above 0 and at most 1."""
    reference: bool = False
    """Print the published GPTs instead."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu must be above 0 and at most 1 (0.4 is 40 %), got {self.mfu}")


def main(argv: list[str]) -> None:
    """Print what a run costs, or the published GPTs."""
    config = with_vocab_size(parse_train_config(argv, __doc__ or "", CostConfig))
    assert isinstance(config, CostConfig)
    print(*(reference_lines() if config.reference else cost_lines(config)), sep="\n")


def cost_lines(config: CostConfig) -> list[str]:
    """Return a run's parameters, FLOPs, memory and costs, as lines to print."""
    model = config.model
    val_tokens, evaluated = validation_tokens(config)
    flops, per_token = run_flops(config, val_tokens), train_flops_per_token(model)
    six_n = 6 * headline_params(model)
    lines = [f"{'':27}{'parameters':>14}{'FLOPs a token, forward':>26}"]
    lines += [f"{part.name:27}{part.n_params:14,}{part.forward_flops:26,}" for part in parts(model)]
    lines += [f"{'all':27}{n_params(model):14,}{forward_flops_per_token(model):26,}", ""]
    if not flops.total:
        return [*lines, "It has no matrix products, so there are no FLOPs to count."]
    lines += [
        f"a token of training   {per_token:,} FLOPs, three times forward; 6 N = {six_n:,} "
        f"({six_n / per_token - 1:+.1%}) with N = {size_in_words(model)}",
        f"the run               {amount(flops.train)} FLOPs: {config.max_iters:,} steps of "
        f"{config.tokens_per_iter:,} tokens",
        f"its evaluations       {amount(flops.evaluate)} FLOPs: {evaluated}",
        "",
        "memory of a step on one device; activations are an estimate, in "
        + ("float32:" if is_float32(model, config.compute) else "16 bits (--dtype float32: more):"),
    ]
    memory = estimate_memory(model, config.compute, config.batch_size, config.optim.optimizer)
    memory["all"] = sum(memory.values())
    lines += [f"  {name:12}{size / 2**20:12,.1f} MiB" for name, size in memory.items()]
    lines += [
        "",
        f"at an MFU of {config.mfu:.0%} (--mfu); python -m nanogpt_jax bench measures the real one"
        + ("" if n_params(model) > 1e8 else ", far lower for a model as small as this"),
        f"{'chip':12}{'peak TFLOP/s':>14}{'time':>12}{'kWh':>12}{'US$':>12}",
    ]
    for name in TABLE:
        chip = chip_named(name)
        seconds = flops.total / (config.mfu * chip.flops)
        hours = seconds / 3600
        kwh = amount(hours * chip.watts / 1000) if chip.watts else "-"
        dollars = amount(hours * chip.dollars_per_hour) if chip.dollars_per_hour else "-"
        fits = "" if memory["all"] < chip.memory_bytes else "  does not fit unchanged"
        lines.append(
            f"{name:12}{chip.flops / 1e12:14.1f}{duration(seconds):>12}{kwh:>12}{dollars:>12}{fits}"
        )
    lines += ["peak: dense 16-bit products; kWh: of the board alone; sources: hardware/chips.py"]
    if is_float32(model, config.compute):
        lines += ["This run multiplies in float32, whose peaks are lower: pass a lower --mfu."]
    return lines


def validation_tokens(config: TrainConfig) -> tuple[int, str]:
    """Return the size of the validation split, and what an evaluation reads, in words."""
    if config.eval_iters:
        return 2**62, f"{config.eval_iters} batches each"
    known = corpora.known_val_tokens(
        config.dataset, Path(config.data_dir), config.tokenizer, config.model.vocab_size
    )
    if known is not None:
        return known, f"the validation split's {known:,} tokens each"
    n = corpora.SHAKESPEARE_VAL_TOKENS
    stand_in = f", since {config.dataset} is not prepared here" if config.dataset else ""
    return n, f"tiny Shakespeare's {n:,} tokens of validation each{stand_in}"


def reference_lines() -> list[str]:
    """Return the published GPTs next to what their configurations give, as lines to print."""
    lines = [
        f"{'':26}{'parameters':>11}{'tokens':>9}{'published':>13}{'6 N tokens':>12}{'counted':>10}"
        f"{'ratio':>7}  source"
    ]
    for run in published.RUNS:
        size, tokens, total, six_n, counted, ratio = ("-",) * 6
        if run.flops:
            total = f"{amount(run.flops)} {'e' if run.is_estimate else ' '}"
        if run.model:
            size = amount(n_params(run.model))
            tokens = amount(run.tokens) if run.tokens else "-"
        if run.model and run.flops and not run.tokens:
            enough = run.flops / train_flops_per_token(run.model)
            tokens = f"~{enough:.0e}".replace("e+", "e")
        if run.model and run.tokens:
            flops = train_flops_per_token(run.model) * run.tokens
            six_n, counted = amount(6 * headline_params(run.model) * run.tokens), amount(flops)
            ratio = f"{flops / run.flops:.2f}" if run.flops else "-"
        lines.append(
            f"{run.name:26}{size:>11}{tokens:>9}{total:>13}{six_n:>12}{counted:>10}{ratio:>7}  "
            f"{run.source}"
        )
    return [
        *lines,
        "",
        "FLOPs of whole runs; e: estimated by others, since not published; ~: the tokens that they",
        "suffice for; counted: with attention's products, which 6 N leaves out (N without",
        "positions); ratio: counted to published.",
        "",
        *lecture_lines(),
    ]


def lecture_lines() -> list[str]:
    """Return what the lecture's last run needs, and what 15 minutes of an A100 can compute."""
    config = with_vocab_size(PRESETS["lecture-scaled"])
    # Every 500 steps, the lecture estimates its losses on 200 random batches of either split.
    config = dataclasses.replace(config, eval_iters=400)
    flops = run_flops(config, 2**62)
    a100 = chip_named("A100 40GB")
    seconds, tf32, float32 = 15 * 60, 156e12, 19.5e12  # NVIDIA's A100 data sheet
    assert a100.dollars_per_hour
    return [
        "The lecture's last model, `lecture-scaled`, took about 15 minutes of an A100: "
        f"{seconds / 3600 * a100.dollars_per_hour:.2f} US$ at {a100.dollars_per_hour} an hour.",
        f"At its peak of 156 TFLOP/s (TF32) the A100 computes {amount(seconds * tf32)} FLOPs in "
        "that time.",
        f"The run needs {amount(flops.train)} to train and {amount(flops.evaluate)} for its "
        f"sampled evaluations: {flops.total / (seconds * tf32):.1%} of that,",
        f"or {flops.total / (seconds * float32):.0%} of 19.5 TFLOP/s, the peak of plain float32, "
        "which is PyTorch's default.",
    ]
