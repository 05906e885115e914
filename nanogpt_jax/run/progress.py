"""What a run reports while it trains: the progress bar, metrics.jsonl, the picture of its loss."""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from nanogpt_jax import files
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.errors import RunError, first_line, visible
from nanogpt_jax.hardware import train_flops_per_token
from nanogpt_jax.run.folder import METRICS, PICTURE, SAMPLES
from nanogpt_jax.run.loggers import Logger, open_loggers
from nanogpt_jax.run.plots import describe_loss, draw, read_metrics
from nanogpt_jax.steps import Metrics

REDRAW_S, SHOW_S = 60, 1
MAX_SKIPPED = 50  # updates in a row: the loss scale was halved each time


class Diverged(RunError):
    """The loss or the gradient is no longer finite; that update was skipped and nothing saved."""


@dataclass(eq=False)
class Progress:
    """Reports a run's updates one behind, so that the device never waits for the host."""

    folder: Path
    config: TrainConfig
    resumed_at: int | None  # step of the checkpoint that the run resumes from; None for a new run
    skipped: int = 0  # updates skipped so far
    counts_skips: bool = False  # as float16 does, where they are normal
    learning_rate: float = 0.0  # of the last update, and before it of the first
    evaluates_first: bool = False  # an evaluation is due at the step that the run resumes from
    is_first: bool = True  # only one of several processes writes files and shows the bar
    peak_flops: float | None = None  # FLOP/s that the makers publish for all devices; None: unknown
    bits_per_byte: Callable[[float], float | None] = lambda loss: None  # of a loss; None: unknown

    def __post_init__(self):
        self.train_loss, self.tokens_per_s, self._skipped_in_a_row = None, 0.0, 0
        self._flops_per_token = train_flops_per_token(self.config.model)
        # A run that was killed may have logged past the checkpoint that it resumes from.
        start_step = -1 if self.resumed_at is None else self.resumed_at
        rows = [row for row in read_metrics(self.folder) if row["step"] <= start_step]
        if rows and rows[-1]["step"] == self.resumed_at:
            self.train_loss = rows[-1].get("train_loss")
            self.learning_rate = rows[-1].get("lr", self.learning_rate)
            if self.evaluates_first and "val_loss" not in rows[-1]:
                rows.pop()  # a signal stopped its evaluation; it is logged again with its loss
        path, self._loggers = Path(os.devnull), []
        if self.is_first:
            path = self.folder / METRICS
            files.write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            self._loggers = open_loggers(self.config, self.folder, self.resumed_at)
        self._file = path.open("a", encoding="utf-8")
        self._samples = self.folder / SAMPLES
        text = self._samples.read_text("utf-8", "replace") if self._samples.exists() else ""
        lines = re.findall(r"^(step +(\d+): .*\n)", text, re.MULTILINE)
        kept = {int(step): line for line, step in lines if int(step) <= start_step}
        self.sampled_steps = {*kept}
        if self.is_first and text:
            files.write_atomically(self._samples, "".join(kept.values()).encode())
        # Step 0 is not saved, so it cannot be the best.
        evaluated = [(r["val_loss"], r["step"]) for r in rows if "val_loss" in r and r["step"] > 0]
        self.best = min(evaluated, default=None)
        self._elapsed_before_s = rows[-1]["elapsed_s"] if rows else 0.0
        self._start_s = self._drawn_s = self._shown_s = time.perf_counter()
        self._pending: tuple[int, Metrics] | None = None
        self._timed_from: tuple[int, float] | None = None  # step and time that speed counts from
        self._bar = tqdm(
            initial=self.resumed_at or 0, total=self.config.max_iters, unit="step",
            # No bar if standard error is a file: there the lines below serve.
            disable=None if self.is_first else True, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}, {remaining} left{postfix}]",
        )  # fmt: skip

    def print(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._bar.write(line)

    def log(self, step: int, metrics: Metrics) -> None:
        """Note the metrics of the updates that were just dispatched, and report those before."""
        self.flush()
        if self._timed_from is None:
            self._timed_from = step - np.size(metrics.loss), time.perf_counter()
        self._pending = step, metrics

    def flush(self, is_evaluated: bool = False) -> None:
        """Wait for what was dispatched last, and report it; raise Diverged if it diverged.

        If is_evaluated, an evaluation follows, whose row has the last update's metrics too.
        """
        if self._pending is None:
            return
        (last, metrics), self._pending = self._pending, None
        arrays = [np.atleast_1d(metric) for metric in metrics]  # (N,)
        assert self._timed_from is not None
        (from_step, from_s), now_s = self._timed_from, time.perf_counter()
        self.tokens_per_s = (last - from_step) * self.config.tokens_per_iter / (now_s - from_s)
        first = last - len(arrays[0]) + 1
        for step, *values in zip(range(first, last + 1), *arrays, strict=True):
            self._report(step, *values, has_row=not (is_evaluated and step == last))
            if step % self.config.log_interval == 0:
                self._timed_from = last, now_s
        loss = math.nan if self.train_loss is None else self.train_loss
        mfu = f", MFU {mfu:.1%}" if (mfu := self.mfu()) else ""
        speed = f"{self.tokens_per_s:,.0f} tokens/s{mfu}{self._skips()}"
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed}", refresh=False)
        with contextlib.suppress(OSError):
            self._bar.update(len(arrays[0]))

    def _report(self, step: int, loss, grad_norm, skipped, learning_rate, has_row: bool) -> None:
        is_skipped, self.skipped = skipped > self.skipped, int(skipped)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        self.learning_rate = float(learning_rate)
        if self._skipped_in_a_row > MAX_SKIPPED:
            raise self._diverged(f"float16 overflowed in {MAX_SKIPPED} updates", step)
        if not is_skipped and not (np.isfinite(loss) and np.isfinite(grad_norm)):
            raise self._diverged(f"loss {loss} and gradient norm {grad_norm}", step)
        if np.isfinite(loss):
            self.train_loss = float(loss)
        if has_row and step % self.config.log_interval == 0:
            self._write_row(step)

    def _diverged(self, what: str, step: int) -> Diverged:
        return Diverged(
            f"training diverged at step {step}: {what}, learning rate {self.learning_rate:.3g}. "
            "Start over (--overwrite) with a lower --learning_rate or more --warmup_iters; the "
            f"checkpoints in {self.folder} are from before"
        )

    def evaluating(self, share: float) -> None:
        if time.perf_counter() - self._shown_s > SHOW_S:
            self._shown_s = time.perf_counter()
            self._bar.set_postfix_str(f"evaluating: {share:.0%}")

    def evaluated(self, step: int, val_loss: float | None) -> None:
        """Report an evaluation; None: a signal stopped it, and it is repeated after resuming."""
        self._timed_from = None  # an evaluation does not count as training
        if val_loss is None:
            self._write_row(step)
            return
        if not math.isfinite(val_loss):
            raise self._diverged(f"validation loss {val_loss}", step)
        best = ""
        if self.best is not None and val_loss >= self.best[0]:
            best = f" (best {self.best[0]:.4f} at step {self.best[1]})"
        elif step > 0:
            self.best = val_loss, step
        self._write_row(step, val_loss)
        train = "" if self.train_loss is None else f"train loss {self.train_loss:.4f}, "
        speed = f", {self.tokens_per_s:,.0f} tokens/s" if self.tokens_per_s else ""
        loss = describe_loss(val_loss, self.bits_per_byte(val_loss))
        self.print(f"step {step:6d}: {train}{loss}{best}{speed}{self._skips()}")

    def sampled(self, step: int, text: str) -> None:
        """Show text by the model as it is, and keep it; a new line is written as in verse."""
        self.sampled_steps.add(step)
        line = f"step {step:6d}: {visible(' / '.join(filter(None, text.splitlines())))}"
        self.print(line)
        if self.is_first:
            with self._samples.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def redraw(self) -> None:
        """Draw the picture, unless that was done a moment ago."""
        if time.perf_counter() - self._drawn_s > REDRAW_S:
            self._draw()
            self._drawn_s = time.perf_counter()

    def mfu(self) -> float | None:
        """Return the share of the peak FLOP/s reached; None for an unknown chip.

        0, which is not shown, before the first update and for a model without matrix products.
        """
        if self.peak_flops is None:
            return None
        return self._flops_per_token * self.tokens_per_s / self.peak_flops

    def elapsed_s(self) -> float:
        """Return the seconds that the run has trained, earlier starts included."""
        return self._elapsed_before_s + time.perf_counter() - self._start_s

    def close(self) -> None:
        """Close the bar and the files, and draw the picture."""
        self._bar.close()
        try:
            self._file.close()
        finally:  # even if the disk is full
            self._draw()
            self._notify(lambda logger: logger.close())

    def _skips(self) -> str:
        return f", skipped updates: {self.skipped}" if self.skipped else ""

    def _draw(self) -> None:
        if not self.is_first:
            return
        try:
            draw(self.folder, self.config.config)
        except Exception as error:  # a full disk, say, or a broken matplotlib
            self.print(f"warning: {PICTURE} could not be drawn: {first_line(error)}")

    def _write_row(self, step: int, val_loss: float | None = None) -> None:
        row: dict[str, int | float] = {"step": step}
        if self.train_loss is not None:
            row["train_loss"] = self.train_loss
        if val_loss is not None:
            row["val_loss"] = val_loss
            if bits := self.bits_per_byte(val_loss):
                row["val_bits_per_byte"] = bits
        row["lr"] = self.learning_rate
        if self.counts_skips:
            row["skipped_updates"] = self.skipped
        row["tokens_per_s"] = round(self.tokens_per_s)
        if mfu := self.mfu():
            row["mfu"] = float(f"{mfu:.3g}")
        row["elapsed_s"] = round(self.elapsed_s(), 2)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._notify(lambda logger: logger.log(row))

    def _notify(self, send: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                send(logger)
            except Exception as error:  # metrics.jsonl has everything: no reason to lose the run
                self._loggers.remove(logger)
                self.print(f"logger disabled after an error: {error}")
