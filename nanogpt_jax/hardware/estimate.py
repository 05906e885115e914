"""Estimate what a run computes and how long it takes at a chip's peak. No JAX."""

import bisect
from dataclasses import replace

from nanogpt_jax.config import MAX_INT, TrainConfig
from nanogpt_jax.hardware import flops
from nanogpt_jax.hardware.chips import Chip


def run_flops(config: TrainConfig, val_tokens: int, start_step: int = 0) -> tuple[int, int]:
    """Return the FLOPs of a run from a step to its last: of training, and of evaluation."""
    batch_tokens = config.batch_size * config.model.block_size
    n_batches = -(-(val_tokens - 1) // batch_tokens)  # the last one is padded
    if config.eval_iters:
        n_batches = min(n_batches, config.eval_iters)
    n_evaluations = -(-config.max_iters // config.eval_interval)
    n_evaluations -= start_step // config.eval_interval
    n_evaluations += start_step == 0 and config.eval_first
    train_tokens = (config.max_iters - start_step) * config.tokens_per_iter
    if config.eval_only:
        train_tokens, n_evaluations = 0, 1
    eval_tokens = n_evaluations * n_batches * batch_tokens
    forward = flops.forward_flops_per_token(config.model)
    return train_tokens * flops.train_flops_per_token(config.model), eval_tokens * forward


def updates_within(config: TrainConfig, val_tokens: int, seconds: float, step_s: float) -> int:
    """Return how many updates fit into some seconds, with the evaluations that are due.

    It is a whole number of calls of the compiled step, unless less than one fits.
    """

    def takes_s(n: int) -> float:
        train, evaluate = run_flops(replace(config, max_iters=n), val_tokens)
        return n * step_s * (1 + evaluate / train if train else 1)

    most = int(min(max(0, seconds / step_s), MAX_INT))
    n = bisect.bisect_right(range(1, most + 1), seconds, key=takes_s)
    per_call = flops.steps_per_call(replace(config, max_iters=20 * config.eval_interval))
    return n - n % per_call if n > per_call else n


def run_line(
    config: TrainConfig, val_tokens: int, chip: Chip | None, n_devices: int, start_step: int = 0
) -> str:
    """Return a line on what a run will compute, and its shortest time on these devices."""
    train, evaluate = run_flops(config, val_tokens, start_step)
    what, total = "the rest of the run" if start_step else "the run", train + evaluate
    if not total:
        return f"{what} has no matrix products, so there are no FLOPs to count"
    share = evaluate / total
    line = f"{what} takes {amount(total)} FLOPs, {share:.1%} of them for evaluation"
    if share > 0.5 and not config.eval_iters:
        line += " (--eval_iters 20 evaluates 20 batches only, a larger --eval_interval less often)"
    if chip is None:
        return f"{line}; MFU is not shown, since this chip's peak is not in chips.py"
    time = duration(total / (n_devices * chip.flops))
    return f"{line}: {time} at the 16-bit peak of {n_devices} x {chip.name}"


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
