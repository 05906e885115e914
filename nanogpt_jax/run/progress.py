"""What a run tells while it goes on: the progress bar, metrics.jsonl, the picture of its loss."""

import json
import math
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
from tqdm.auto import tqdm

from nanogpt_jax import files
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.corpora import bits_per_byte
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.hardware.flops import train_flops_per_token
from nanogpt_jax.optim import learning_rate_schedule
from nanogpt_jax.run.folder import METRICS, PICTURE
from nanogpt_jax.run.loggers import Logger, open_loggers
from nanogpt_jax.run.plots import draw, read_metrics
from nanogpt_jax.steps import Metrics

REDRAW_S = 60
RATES_BLOCK = 2**16  # learning rates that are computed at once
MOST_SKIPPED = 50  # updates in a row: the loss scale was halved each time


def loss_in_words(val_loss: float, bytes_per_token: float | None) -> str:
    """Return a validation loss as it is told: "val loss 1.9180 (2.767 bits per byte)"."""
    if not bytes_per_token:
        return f"val loss {val_loss:.4f}"
    return f"val loss {val_loss:.4f} ({bits_per_byte(val_loss, bytes_per_token):.3f} bits per byte)"


class Diverged(RunError):
    """The loss or the gradient is no longer finite; no update was made of it, nothing saved."""


class Progress:
    """Reports a run's dispatches one behind, so that the device never waits for the host.

    Args:
        begun_at: the step of the checkpoint that the run goes on from; None of a new run.
        skipped: updates skipped until then.
        is_first: of several processes one writes files and shows the bar.
        peak_flops: FLOP/s that the makers promise of all devices together; None of a chip that is
            not in chips.py, of which no MFU is told.
        bytes_per_token: of the validation split, for bits per byte; None where it is not known.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        begun_at: int | None,
        skipped: int = 0,
        is_first: bool = True,
        peak_flops: float | None = None,
        bytes_per_token: float | None = None,
    ):
        self.folder, self.config, self.bytes_per_token = folder, config, bytes_per_token
        self.steps_per_s = 0.0  # of the last dispatch that was reported
        self.train_loss = None
        self.skipped = skipped  # a skipped update does not advance the learning rate's schedule
        self._skipped_in_a_row = 0
        # A run that was killed may have logged past the checkpoint it goes on from.
        start_step = -1 if begun_at is None else begun_at
        rows = [row for row in read_metrics(folder) if row["step"] <= start_step]
        was_stopped = bool(rows) and rows[-1]["step"] == begun_at and "val_loss" not in rows[-1]
        if was_stopped and self.evaluation_due(begun_at):
            self.train_loss = rows.pop().get("train_loss")  # logged again, when it is evaluated
        self._is_first = is_first
        self._mfu_per_step_s = None
        if peak_flops is not None:
            step_flops = config.tokens_per_iter * train_flops_per_token(config.model)
            self._mfu_per_step_s = step_flops / peak_flops
        if is_first:
            kept = "".join(json.dumps(row) + "\n" for row in rows)
            files.write_atomically(folder / METRICS, kept.encode())
        path = folder / METRICS if is_first else Path(os.devnull)
        self._file = path.open("a", encoding="utf-8")
        self._loggers = open_loggers(config, folder, begun_at) if is_first else []
        evaluated = [(r["val_loss"], r["step"]) for r in rows if "val_loss" in r and r["step"] > 0]
        self._evaluated_at = {row["step"] for row in rows if "val_loss" in row}
        self.best = min(evaluated, default=None)  # step 0 is not saved, so it cannot be the best
        self._elapsed_before_s = rows[-1]["elapsed_s"] if rows else 0.0
        self._begun_s = self._last_done_s = self._drawn_s = time.perf_counter()
        self._pending = None
        schedule = jax.jit(learning_rate_schedule(config.optim, config.max_iters))
        # A chip would compute a single one only when the dispatch at hand is done.
        self._rates_of = lru_cache(1)(
            lambda block: np.asarray(schedule(RATES_BLOCK * block + np.arange(RATES_BLOCK)))
        )
        self._bar = tqdm(
            initial=begun_at or 0,
            total=config.max_iters,
            unit="step",
            # No bar where standard error is a file: there the lines below serve.
            disable=None if is_first else True,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}, {remaining} left{postfix}]",
        )

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(line)

    def dispatched(self, step: int, n_steps: int, launched_s: float, metrics: Metrics) -> None:
        """Note that n_steps from `step` on were dispatched, and report the dispatch before.

        Args:
            launched_s: `time.perf_counter()` before the dispatch.
            metrics: of shape (N,), the first n_steps filled; not waited for yet.
        """
        self.catch_up()
        self._pending = step, n_steps, launched_s, metrics

    def catch_up(self) -> None:
        """Wait for what was dispatched, and report it.

        Raises:
            Diverged: a loss is not finite.
        """
        if self._pending is None:
            return
        first, n_steps, launched_s, metrics = self._pending
        self._pending = None
        losses, grad_norms, skipped = (np.asarray(metric)[:n_steps] for metric in metrics)
        done_s = time.perf_counter()
        self.steps_per_s = n_steps / (done_s - max(launched_s, self._last_done_s))
        self._last_done_s = done_s
        for i, step in enumerate(range(first + 1, first + 1 + n_steps)):
            loss, grad_norm, is_skipped = losses[i], grad_norms[i], skipped[i] > self.skipped
            self.skipped = int(skipped[i])
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
            if self._skipped_in_a_row > MOST_SKIPPED:
                raise self._diverged(f"float16 overflowed in {MOST_SKIPPED} updates", step)
            if not is_skipped and not (np.isfinite(loss) and np.isfinite(grad_norm)):
                raise self._diverged(f"loss {loss} and gradient norm {grad_norm}", step)
            if np.isfinite(loss):
                self.train_loss = float(loss)
            if step % self.config.log_interval == 0 and not self.evaluation_due(step):
                self._log(step)
        tokens_per_s = self.steps_per_s * self.config.tokens_per_iter
        mfu = f", MFU {self.mfu():.1%}" if self.mfu() else ""
        self._bar.set_postfix_str(
            f"loss {self.train_loss or math.nan:.3f}, {tokens_per_s:,.0f} tokens/s{mfu}"
            f"{self._skips()}",
            refresh=False,
        )
        self._bar.update(n_steps)

    def _diverged(self, what: str, step: int) -> Diverged:
        return Diverged(
            f"training diverged at step {step}: {what}, learning rate {self._rate(step):.3g}. "
            "Start anew (--overwrite) with a lower --learning_rate or a longer --warmup_iters; the "
            f"checkpoints in {self.folder} are from before"
        )

    def _rate(self, step: int) -> float:
        """Return the learning rate of the update that made a step."""
        update = max(0, step - 1 - self.skipped)
        return float(self._rates_of(update // RATES_BLOCK)[update % RATES_BLOCK])

    def evaluation_due(self, step: int) -> bool:
        """Return whether a step is followed by an evaluation: each eval_interval, and the last.

        Step 0 too, where it is asked for.
        """
        if step == 0:
            return self.config.eval_first
        return step % self.config.eval_interval == 0 or step == self.config.max_iters

    def evaluating(self, share: float) -> None:
        """Show which share of an evaluation is done."""
        self._bar.set_postfix_str(f"evaluating: {share:.0%}")

    def evaluation_stopped(self, step: int) -> None:
        """Log a step whose evaluation a signal stopped, to be made when the run goes on."""
        self._log(step)

    def is_evaluated(self, step: int) -> bool:
        """Return whether a step was evaluated already, perhaps by an earlier process."""
        return step in self._evaluated_at

    def evaluated(self, step: int, val_loss: float) -> None:
        """Report an evaluation; `catch_up` comes before it.

        Raises:
            Diverged: the loss is not finite.
        """
        if not math.isfinite(val_loss):
            raise self._diverged(f"validation loss {val_loss}", step)
        is_best = self.best is None or val_loss < self.best[0]
        if is_best and step > 0:
            self.best = val_loss, step
        self._evaluated_at.add(step)
        self._log(step, val_loss)
        train = f"train loss {self.train_loss:.4f}, " if self.train_loss is not None else ""
        speed = self.steps_per_s * self.config.tokens_per_iter
        shown = f", {speed:,.0f} tokens/s" if speed else ""
        best = "" if is_best else f" (best {self.best[0]:.4f} at step {self.best[1]})"
        loss = loss_in_words(val_loss, self.bytes_per_token)
        self.say(f"step {step:6d}: {train}{loss}{best}{shown}{self._skips()}")
        now_s = time.perf_counter()
        if now_s - self._drawn_s > REDRAW_S:
            self._draw()
            self._drawn_s = now_s

    def mfu(self) -> float | None:
        """Return the share of the peak that the last dispatch reached; None of an unknown chip.

        0 before the first dispatch, and of a model that multiplies no matrices: not told.
        """
        return None if self._mfu_per_step_s is None else self._mfu_per_step_s * self.steps_per_s

    def elapsed_s(self) -> float:
        """Return the seconds of this run, earlier starts included."""
        return self._elapsed_before_s + time.perf_counter() - self._begun_s

    def close(self) -> None:
        """End the bar and the file, and draw the picture."""
        self._bar.close()
        try:
            self._file.close()
        finally:  # even where the disk took no more
            self._draw()
            self._tell(lambda logger: logger.close())

    def _skips(self) -> str:
        return f", skipped updates: {self.skipped}" if self.skipped else ""

    def _draw(self) -> None:
        if not self._is_first:
            return
        try:
            draw(self.folder, self.config.config)
        except (OSError, InputError) as error:  # a full disk, say; no reason to lose the run
            self.say(f"{PICTURE} could not be drawn: {error}")

    def _log(self, step: int, val_loss: float | None = None) -> None:
        row = {"step": step}
        if self.train_loss is not None:
            row["train_loss"] = self.train_loss
        if val_loss is not None:
            row["val_loss"] = val_loss
            if self.bytes_per_token:
                row["val_bits_per_byte"] = bits_per_byte(val_loss, self.bytes_per_token)
        row["lr"] = self._rate(step)
        if self.config.compute.dtype == "float16":
            row["skipped_updates"] = self.skipped
        row["tokens_per_s"] = round(self.steps_per_s * self.config.tokens_per_iter)
        if self.mfu():
            row["mfu"] = float(f"{self.mfu():.3g}")
        row["elapsed_s"] = round(self.elapsed_s(), 2)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._tell(lambda logger: logger.log(row))

    def _tell(self, what: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                what(logger)
            except Exception as error:  # no reason to lose the run: metrics.jsonl has it all
                self._loggers.remove(logger)
                self.say(f"a logger failed, and is told no more: {error}")
