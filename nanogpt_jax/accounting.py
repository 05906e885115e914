"""What a run costs: python -m nanogpt_jax.accounting --config NAME [--any_field value ...]

Counts parameters, FLOPs and memory from the configuration alone, and says what the run takes on
known chips: hours, kilowatt hours, dollars. No chip and no JAX is needed, and nothing is run.

    --mfu 0.4      share of the chips' peak that the run is taken to reach: nanoGPT reached 0.37 for
                   GPT-2 124M on an A100; models as small as `small` stay far below that anywhere
    --reference    the GPTs that this field grew from, published totals beside the count
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import chips, references
from nanogpt_jax.chips import Chip
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.counts import (
    forward_flops_per_token,
    memory_bytes,
    n_params,
    n_params_as_told,
    parts,
    train_flops_per_token,
)
from nanogpt_jax.errors import InputError, run_command
from nanogpt_jax.presets import lecture_scaled, parse_train_config, with_vocab_size

SHAKESPEARE_VAL_TOKENS = 111_540
TABLE = ("T4", "RTX 3070 Ti", "RTX 4090", "L4", "A100 40GB", "H100", "H200", "TPU v5e", "TPU v6e")


@dataclass(frozen=True)
class CostConfig(TrainConfig):
    """A run, and how it is priced."""

    mfu: float = 0.4
    """Model FLOPs utilisation: the share of the chip's peak that is reached, above 0 to 1."""
    reference: bool = False
    """Show the published GPTs instead."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mfu <= 1:
            raise InputError(f"mfu must be above 0 and at most 1, got {self.mfu}")


@dataclass(frozen=True)
class RunFlops:
    """The FLOPs of a whole run, as its matrix products are counted."""

    train: int
    evaluate: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.train + self.evaluate


def run_flops(config: TrainConfig, val_tokens: int) -> RunFlops:
    """Return what a run computes from its first step to its last.

    Args:
        val_tokens: of the validation split, which each evaluation reads unless eval_iters is given.
    """
    batch_tokens = config.batch_size * config.model.block_size
    n_batches = -(-(val_tokens - 1) // batch_tokens)  # the last one is filled up
    if config.eval_iters:
        n_batches = min(n_batches, config.eval_iters)
    n_evaluations = 1 + -(-config.max_iters // config.eval_interval)  # before the first step too
    return RunFlops(
        train=config.max_iters * config.tokens_per_iter * train_flops_per_token(config.model),
        evaluate=n_evaluations * n_batches * batch_tokens * forward_flops_per_token(config.model),
    )


def run_line(config: TrainConfig, val_tokens: int, chip: Chip | None, n_devices: int) -> str:
    """Return one line about a run that is about to begin, on devices of this chip.

    Args:
        chip: None of one that is not in the table: no rate is made up for it.
    """
    flops = run_flops(config, val_tokens)
    share = f", {flops.evaluate / flops.total:.1%} of them to evaluate" if flops.total else ""
    told = f"the run computes {amount(flops.total)} FLOPs{share}"
    if chip is None:
        return f"{told}; MFU is not shown, since this chip's peak is not in chips.py"
    seconds = flops.total / (n_devices * chip.device_flops)
    return f"{told}: at the peak of {n_devices} x {chip.name} {duration(seconds)}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: "12 s", "3.4 min", "5.1 h", "110 days"."""
    for unit, size in ("days", 86400), ("h", 3600), ("min", 60):
        if seconds >= 2 * size:
            return f"{amount(seconds / size)} {unit}"
    return f"{amount(seconds)} s"


def amount(x: float) -> str:
    """Return a figure of two digits, as people write it: "0.026", "5.4", "1,100", "2.5e20"."""
    if x >= 1e6:
        return f"{x:.2e}".replace("e+", "e")
    return f"{float(f'{x:.2g}'):,.0f}" if x >= 10 else f"{x:.2g}"


def main(argv: list[str]) -> None:
    """Print what a run costs, or the published GPTs."""
    config = with_vocab_size(parse_train_config(argv, __doc__, CostConfig))
    print(*(reference_lines() if config.reference else cost_lines(config)), sep="\n")


def cost_lines(config: CostConfig) -> list[str]:
    """Return what a run costs, as the lines of a page."""
    model = config.model
    val_tokens, of_what = validation_tokens(config)
    flops, per_token = run_flops(config, val_tokens), train_flops_per_token(model)
    told = n_params_as_told(model)
    rule = 6 * told
    lines = [f"{'':27}{'parameters':>14}{'FLOPs a token, forward':>26}"]
    lines += [f"{part.name:27}{part.n_params:14,}{part.forward_flops:26,}" for part in parts(model)]
    lines += [f"{'all':27}{n_params(model):14,}{forward_flops_per_token(model):26,}", ""]
    lines += [
        f"a token of training   {per_token:,} FLOPs, three times forward; 6 N = {rule:,} with "
        f"N = {told / 1e6:.2f}M" + (f", {rule / per_token - 1:+.1%}" if per_token else ""),
        f"the run               {amount(flops.train)} FLOPs: {config.max_iters:,} steps of "
        f"{config.tokens_per_iter:,} tokens",
        f"its evaluations       {amount(flops.evaluate)} FLOPs: {of_what}",
        "",
        "memory of a step on one device; of the activations an estimate, in 16 bits unless "
        "--dtype float32:",
    ]
    memory = memory_bytes(model, config.compute, config.batch_size)
    memory["all"] = sum(memory.values())
    lines += [f"  {name:12}{size / 2**20:12,.1f} MiB" for name, size in memory.items()]
    lines += [
        "",
        f"at an MFU of {config.mfu:.0%}, which is a guess (--mfu): bench.py measures it",
        f"{'chip':12}{'peak TFLOP/s':>14}{'time':>12}{'kWh':>12}{'US$':>12}",
    ]
    for name in TABLE:
        chip = next(chip for chip in chips.CHIPS if chip.name == name)
        seconds = flops.total / (config.mfu * chip.flops)
        hours = seconds / 3600
        kwh = amount(hours * chip.watts / 1000) if chip.watts else "-"
        dollars = amount(hours * chip.dollars_per_hour) if chip.dollars_per_hour else "-"
        fits = "" if memory["all"] < chip.memory_bytes else "  does not fit as it is"
        lines.append(
            f"{name:12}{chip.flops / 1e12:14.1f}{duration(seconds):>12}{kwh:>12}{dollars:>12}{fits}"
        )
    return [
        *lines,
        "peak: dense products of 16-bit numbers; kWh: of the chip's board alone; - unknown",
    ]


def validation_tokens(config: TrainConfig) -> tuple[int, str]:
    """Return the size of the validation split, and how it is known: the dataset may not be here."""
    folder = Path(config.data_dir, config.dataset or "shakespeare_char")
    if config.eval_iters:
        return 2**62, f"{config.eval_iters} batches each"
    try:
        known = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["val_tokens"]
        return known, f"the {known:,} tokens of {folder}'s validation split each"
    except (OSError, ValueError, KeyError, TypeError):
        n = SHAKESPEARE_VAL_TOKENS
        return n, f"tiny Shakespeare's {n:,} tokens of validation each"


def reference_lines() -> list[str]:
    """Return the published GPTs beside what their configurations say, as the lines of a page."""
    lines = [f"{'FLOPs':28}{'published':>11}{'6 N tokens':>13}{'counted':>11}{'ratio':>8}  source"]
    for run in references.RUNS:
        rule = counted = ratio = "-"
        if run.model and run.tokens:
            total = train_flops_per_token(run.model) * run.tokens
            rule, counted = amount(6 * n_params_as_told(run.model) * run.tokens), amount(total)
            ratio = f"{total / run.flops:.2f}" if run.flops else "-"
        published = amount(run.flops) if run.flops else "-"
        lines.append(f"{run.name:28}{published:>11}{rule:>13}{counted:>11}{ratio:>8}  {run.source}")
    return [*lines, "", *lecture_lines()]


def lecture_lines() -> list[str]:
    """Return what the lecture's last run needs, and what 15 minutes of an A100 could have done."""
    config = with_vocab_size(lecture_scaled())
    # The lecture estimates its losses on 200 random batches of either split, every 500 steps.
    config = dataclasses.replace(config, eval_iters=400)
    flops = run_flops(config, 2**62)
    a100 = next(chip for chip in chips.CHIPS if chip.name == "A100 40GB")
    seconds, tf32, float32 = 15 * 60, 156e12, 19.5e12  # NVIDIA's A100 data sheet
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


if __name__ == "__main__":
    run_command(main)
