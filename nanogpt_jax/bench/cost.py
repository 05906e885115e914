"""What a run costs: python -m nanogpt_jax.bench.cost --config NAME [--any_field value ...]

Counts parameters, FLOPs and memory from the configuration alone, and says what the run takes on
known chips: hours, kilowatt hours, dollars. No chip and no JAX is needed, and nothing is run.

    --mfu 0.4      share of the chips' peak that the run is taken to reach: nanoGPT reached 0.37 for
                   GPT-2 124M on an A100; models as small as `small` stay far below that anywhere
    --reference    the GPTs that this field grew from, published totals beside the count
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from nanogpt_jax import corpora
from nanogpt_jax.bench import published as references
from nanogpt_jax.config import PRESETS, TrainConfig, parse_train_config, with_vocab_size
from nanogpt_jax.errors import InputError, run_command
from nanogpt_jax.hardware import chips
from nanogpt_jax.hardware.chips import Chip
from nanogpt_jax.hardware.flops import (
    forward_flops_per_token,
    is_float32,
    memory_bytes,
    n_params,
    n_params_as_told,
    parts,
    size_in_words,
    train_flops_per_token,
)

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
            raise InputError(f"mfu must be above 0 and at most 1 (40 % is 0.4), got {self.mfu}")


@dataclass(frozen=True)
class RunFlops:
    """The FLOPs of a whole run, as its matrix products are counted."""

    train: int
    evaluate: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.train + self.evaluate


def run_flops(config: TrainConfig, val_tokens: int, done: int = 0) -> RunFlops:
    """Return what a run computes to its last step.

    Args:
        val_tokens: of the validation split, which each evaluation reads unless eval_iters is given.
        done: steps that were made before.
    """
    batch_tokens = config.batch_size * config.model.block_size
    n_batches = -(-(val_tokens - 1) // batch_tokens)  # the last one is filled up
    if config.eval_iters:
        n_batches = min(n_batches, config.eval_iters)
    n_evaluations = -(-config.max_iters // config.eval_interval) - done // config.eval_interval
    n_evaluations += done == 0 and config.eval_first
    return RunFlops(
        train=(config.max_iters - done)
        * config.tokens_per_iter
        * train_flops_per_token(config.model),
        evaluate=n_evaluations * n_batches * batch_tokens * forward_flops_per_token(config.model),
    )


def run_line(
    config: TrainConfig, val_tokens: int, chip: Chip | None, n_devices: int, done: int = 0
) -> str:
    """Return one line about a run that is about to begin, or go on, on devices of this chip.

    Args:
        chip: None of one that is not in the table: no rate is made up for it.
        done: steps that were made before.
    """
    flops = run_flops(config, val_tokens, done)
    what = "what is left of the run" if done else "the run"
    if not flops.total:
        return f"{what} multiplies no matrices: there are no FLOPs to count"
    share = flops.evaluate / flops.total
    told = f"{what} computes {amount(flops.total)} FLOPs, {share:.1%} of them to evaluate"
    if share > 0.5 and not config.eval_iters:
        told += " (--eval_iters 20 does it on 20 batches, a larger --eval_interval less often)"
    if chip is None:
        return f"{told}; MFU is not shown, since this chip's peak is not in chips.py"
    seconds = flops.total / (n_devices * chip.device_flops)
    return f"{told}: {duration(seconds)} at the 16-bit peak of {n_devices} x {chip.name}"


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: "12 s", "3.4 min", "5.1 h", "110 days"."""
    for unit, size in ("days", 86400), ("h", 3600), ("min", 60):
        if seconds >= 2 * size:
            return f"{amount(seconds / size)} {unit}"
    return f"{amount(seconds)} s"


def amount(x: float) -> str:
    """Return a figure with the digits that mean something: "0.026", "5.4", "1,100", "2.52e20"."""
    if x >= 1e6:
        return f"{x:.2e}".replace("e+0", "e").replace("e+", "e")
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
    rule = 6 * n_params_as_told(model)
    lines = [f"{'':27}{'parameters':>14}{'FLOPs a token, forward':>26}"]
    lines += [f"{part.name:27}{part.n_params:14,}{part.forward_flops:26,}" for part in parts(model)]
    lines += [f"{'all':27}{n_params(model):14,}{forward_flops_per_token(model):26,}", ""]
    if not flops.total:
        return [*lines, "It multiplies no matrices: there are no FLOPs to count."]
    lines += [
        f"a token of training   {per_token:,} FLOPs, three times forward; 6 N = {rule:,} "
        f"({rule / per_token - 1:+.1%}) with N = {size_in_words(model)}",
        f"the run               {amount(flops.train)} FLOPs: {config.max_iters:,} steps of "
        f"{config.tokens_per_iter:,} tokens",
        f"its evaluations       {amount(flops.evaluate)} FLOPs: {of_what}",
        "",
        "memory of a step on one device; of the activations an estimate, in "
        + ("float32:" if is_float32(model, config.compute) else "16 bits (--dtype float32: more):"),
    ]
    memory = memory_bytes(model, config.compute, config.batch_size, config.optim.optimizer)
    memory["all"] = sum(memory.values())
    lines += [f"  {name:12}{size / 2**20:12,.1f} MiB" for name, size in memory.items()]
    lines += [
        "",
        f"at an MFU of {config.mfu:.0%} (--mfu): bench.py measures what a machine reaches"
        + ("" if n_params(model) > 1e8 else ", with models as small as this far less"),
        f"{'chip':12}{'peak TFLOP/s':>14}{'time':>12}{'kWh':>12}{'US$':>12}",
    ]
    for name in TABLE:
        chip = chips.named(name)
        seconds = flops.total / (config.mfu * chip.flops)
        hours = seconds / 3600
        kwh = amount(hours * chip.watts / 1000) if chip.watts else "-"
        dollars = amount(hours * chip.dollars_per_hour) if chip.dollars_per_hour else "-"
        fits = "" if memory["all"] < chip.memory_bytes else "  does not fit as it is"
        lines.append(
            f"{name:12}{chip.flops / 1e12:14.1f}{duration(seconds):>12}{kwh:>12}{dollars:>12}{fits}"
        )
    lines += ["peak: dense products of 16-bit numbers; kWh: of the board alone; sources: chips.py"]
    if is_float32(model, config.compute):
        lines += ["This run multiplies in float32, whose peaks are lower: take a lower --mfu."]
    return lines


def validation_tokens(config: TrainConfig) -> tuple[int, str]:
    """Return the size of the validation split, and where it is known from."""
    if config.eval_iters:
        return 2**62, f"{config.eval_iters} batches each"
    known = corpora.known_val_tokens(
        config.dataset, Path(config.data_dir), config.tokenizer, config.model.vocab_size
    )
    if known is not None:
        return known, f"the validation split's {known:,} tokens each"
    n = corpora.SHAKESPEARE_VAL_TOKENS
    of_another = f", as {config.dataset} is not prepared here" if config.dataset else ""
    return n, f"tiny Shakespeare's {n:,} tokens of validation each{of_another}"


def reference_lines() -> list[str]:
    """Return the published GPTs beside what their configurations say, as the lines of a page."""
    lines = [
        f"{'':26}{'parameters':>11}{'tokens':>9}{'published':>13}{'6 N tokens':>12}{'counted':>10}"
        f"{'ratio':>7}  source"
    ]
    for run in references.RUNS:
        size, tokens, published, rule, counted, ratio = ("-",) * 6
        if run.flops:
            published = f"{amount(run.flops)} {'e' if run.is_estimate else ' '}"
        if run.model:
            size, per_token = amount(n_params(run.model)), train_flops_per_token(run.model)
            tokens = amount(run.tokens) if run.tokens else f"~{run.flops / per_token:.0e}"
            tokens = tokens.replace("e+", "e")
        if run.model and run.tokens:
            total = per_token * run.tokens
            rule, counted = amount(6 * n_params_as_told(run.model) * run.tokens), amount(total)
            ratio = f"{total / run.flops:.2f}" if run.flops else "-"
        lines.append(
            f"{run.name:26}{size:>11}{tokens:>9}{published:>13}{rule:>12}{counted:>10}{ratio:>7}  "
            f"{run.source}"
        )
    return [
        *lines,
        "",
        "FLOPs of whole runs; e: not published, but estimated by others; ~: tokens for which they",
        "suffice; counted: with attention's products, which 6 N leaves out (N without positions);",
        "ratio: counted to published.",
        "",
        *lecture_lines(),
    ]


def lecture_lines() -> list[str]:
    """Return what the lecture's last run needs, and what 15 minutes of an A100 could have done."""
    config = with_vocab_size(PRESETS["lecture-scaled"]())
    # The lecture estimates its losses on 200 random batches of either split, every 500 steps.
    config = dataclasses.replace(config, eval_iters=400)
    flops = run_flops(config, 2**62)
    a100 = chips.named("A100 40GB")
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
