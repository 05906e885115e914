"""Estimate what a run computes and how long it takes at a chip's peak. No JAX."""

from dataclasses import dataclass

from nanogpt_jax.config import TrainConfig
from nanogpt_jax.hardware.chips import Chip
from nanogpt_jax.hardware.flops import forward_flops_per_token, train_flops_per_token


@dataclass(frozen=True)
class RunFlops:
    """The FLOPs of a whole run's matrix products."""

    train: int
    evaluate: int

    @property
    def total(self) -> int:
        return self.train + self.evaluate


def run_flops(config: TrainConfig, val_tokens: int, start_step: int = 0) -> RunFlops:
    """Return the FLOPs of a run from a step to its last.

    Args:
        val_tokens: size of the validation split, which each evaluation reads unless eval_iters is
            set.
    """
    batch_tokens = config.batch_size * config.model.block_size
    n_batches = -(-(val_tokens - 1) // batch_tokens)  # the last one is padded
    if config.eval_iters:
        n_batches = min(n_batches, config.eval_iters)
    n_evaluations = -(-config.max_iters // config.eval_interval)
    n_evaluations -= start_step // config.eval_interval
    n_evaluations += start_step == 0 and config.eval_first
    return RunFlops(
        train=(config.max_iters - start_step)
        * config.tokens_per_iter
        * train_flops_per_token(config.model),
        evaluate=n_evaluations * n_batches * batch_tokens * forward_flops_per_token(config.model),
    )


def run_line(
    config: TrainConfig, val_tokens: int, chip: Chip | None, n_devices: int, start_step: int = 0
) -> str:
    """Return a line on what a run will compute, and its shortest time on these devices.

    Args:
        chip: None if it is not in the table: then its peak, and so the time, is unknown.
    """
    flops = run_flops(config, val_tokens, start_step)
    what = "the rest of the run" if start_step else "the run"
    if not flops.total:
        return f"{what} has no matrix products, so there are no FLOPs to count"
    share = flops.evaluate / flops.total
    line = f"{what} takes {amount(flops.total)} FLOPs, {share:.1%} of them for evaluation"
    if share > 0.5 and not config.eval_iters:
        line += " (--eval_iters 20 evaluates 20 batches only, a larger --eval_interval less often)"
    if chip is None:
        return f"{line}; MFU is not shown, since this chip's peak is not in chips.py"
    seconds = flops.total / (n_devices * chip.device_flops)
    return f"{line}: {duration(seconds)} at the 16-bit peak of {n_devices} x {chip.name}"


def duration(seconds: float) -> str:
    """Return a time in a readable unit: "12 s", "3.4 min", "5.1 h", "110 days"."""
    for unit, size in ("days", 86400), ("h", 3600), ("min", 60):
        if seconds >= 2 * size:
            return f"{amount(seconds / size)} {unit}"
    return f"{amount(seconds)} s"


def amount(x: float) -> str:
    """Return a number with two or three significant digits: "0.026", "5.4", "1,100", "2.52e20"."""
    if x >= 1e6:
        return f"{x:.2e}".replace("e+0", "e").replace("e+", "e")
    return f"{float(f'{x:.2g}'):,.0f}" if x >= 10 else f"{x:.2g}"
