"""Compare runs: python -m nanogpt_jax report OUT_DIR [OUT_DIR...] [--x time] [--picture PATH]

Prints a line for each run and draws their losses in one picture. It needs no JAX, so it can watch a
run that holds the chip.
"""

import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from nanogpt_jax import files
from nanogpt_jax.config import MAX_FLOAT, Checked, parse_args, split_words
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.run.folder import METRICS, PICTURE, read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED_ROWS = 21  # widest window of the running mean


@dataclass(frozen=True)
class ReportConfig(Checked):
    """How runs are drawn."""

    x: Literal["step", "tokens", "time"] = "step"
    """The horizontal axis; time is seconds of training."""
    picture: str = ""
    """Path of the picture; empty: loss.png in the folder of a single run, else out/report.png."""


def main(argv: list[str]) -> None:
    words, flags = split_words(argv, "the folder of a run")
    config = parse_args(ReportConfig, flags, __doc__)
    folders = [Path(word) for word in words]
    if not folders:
        raise InputError("name the folder of at least one run: python -m nanogpt_jax report out/*")
    found = [folder for folder in folders if (folder / METRICS).exists()]
    if found and found != folders:  # out/* has other things too
        print(f"not a run, skipped: {', '.join(str(f) for f in folders if f not in found)}")
        folders = found
    runs = {str(folder): read_run(folder, config.x) for folder in folders}
    width = max(map(len, runs))
    for name, rows in runs.items():
        print(f"{name:{width}}  {describe(rows)}")
    usual = folders[0] / PICTURE if len(folders) == 1 else Path("out", "report.png")
    path = Path(config.picture) if config.picture else usual
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(loss_figure(runs, config.x), path)
    except (OSError, ValueError) as error:  # ValueError: no format of that name
        raise InputError(
            f"picture: {path} cannot be written ({error}): choose another path, like loss.png"
        ) from None
    print(f"drawn to {path}")


def read_metrics(folder: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl, without a last line that a kill cut off.

    Raises InputError if it cannot be read or another line is damaged.
    """
    path = Path(folder, METRICS)
    with reading(path, "a run's metrics"):
        if not path.exists():
            return []
        *lines, cut_off = path.read_bytes().split(b"\n")
    rows = []
    for i, line in enumerate(lines):
        if (row := _parse_row(line)) is None:
            raise InputError(
                f'{path}, line {i + 1}: must be like {{"step": 10, "train_loss": 2.5, "elapsed_s": '
                f'0.1, "tokens_per_s": 9000}}, got {line[:60].decode("utf-8", "replace")!r}: '
                "delete that line; no other line depends on it"
            )
        rows.append(row)
    last = _parse_row(cut_off)
    return [*rows, last] if last else rows


def _parse_row(line: bytes) -> dict | None:
    try:
        row = files.loads(line.decode("utf-8"))
        for name in {"step", "elapsed_s", "tokens_per_s", *row}:
            number = row[name]
            is_number = isinstance(number, int if name == "step" else int | float)
            if not is_number or isinstance(number, bool) or not abs(number) <= MAX_FLOAT:
                return None
        return row
    except (ValueError, KeyError, TypeError):
        return None


def read_run(folder: Path, x: str) -> list[dict]:
    """Return a run's rows, each with an `x`: its step, tokens read or seconds of training.

    Raises InputError if there is no run, or it has logged nothing yet.
    """
    config, rows = read_config(folder), read_metrics(folder)
    if not rows:
        raise InputError(f"{folder} has logged nothing yet: wait until {METRICS} has rows")
    factors = "batch_size", "gradient_accumulation_steps", "block_size"
    step_tokens = math.prod(config[name] for name in factors)
    key, scale = {"step": ("step", 1), "tokens": ("step", step_tokens), "time": ("elapsed_s", 1)}[x]
    return [row | {"x": row[key] * scale} for row in rows]


def describe(rows: list[dict]) -> str:
    """Return a run in a line."""
    evaluated = [row for row in rows if "val_loss" in row]
    best = min(evaluated, key=lambda row: row["val_loss"], default={})
    loss = describe_loss(best.get("val_loss", math.nan), best.get("val_bits_per_byte"))
    last = rows[-1]
    return (
        f"best {loss} at step {best.get('step', 0):,}; {last['step']:,} steps in "
        f"{last['elapsed_s']:,.0f} s, {last['tokens_per_s']:,} tokens/s"
    )


def describe_loss(val_loss: float, bits: float | None) -> str:
    """Return a validation loss in words: "val loss 1.9180 (2.767 bits per byte)"."""
    return f"val loss {val_loss:.4f}" + (f" ({bits:.3f} bits per byte)" if bits else "")


def draw(folder: Path, title: str) -> None:
    """Draw a run's loss.png from its metrics.jsonl."""
    rows = [row | {"x": row["step"]} for row in read_metrics(folder)]
    picture = io.BytesIO()
    save_figure(loss_figure({title: rows}), picture)
    files.write_atomically(Path(folder, PICTURE), picture.getvalue())


def save_figure(figure: "Figure", path: Path | io.BytesIO) -> None:
    """Write a figure, as PNG or as the path's ending says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # they become boxes
        figure.savefig(path)


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """Return a figure of width x height inches and its axes, in the style of all pictures."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, perhaps, which does not exist here
    # Slow to import. Not pyplot: there is nothing to show or to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="tight")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def loss_figure(runs: dict[str, list[dict]], x: str = "step") -> "Figure":
    """Draw each run's training and validation loss, with the best one marked.

    Args:
        runs: rows of metrics by the run's name, each with an `x`.
    """
    figure, axes = new_figure(8, 4.5)
    is_single = len(runs) == 1
    # Without invalid bytes, and without $...$, between which matplotlib sees formulas.
    names = [name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$") for name in runs]
    for i, (name, rows) in enumerate(zip(names, runs.values(), strict=True)):
        train = np.array([(row["x"], row["train_loss"]) for row in rows if "train_loss" in row])
        val = np.array([(row["x"], row["val_loss"]) for row in rows if "val_loss" in row])
        color = "tab:blue" if is_single else f"C{i}"
        if len(train):
            xs, losses = train.T
            smooth = running_mean(losses)
            if is_single:
                axes.plot(xs, losses, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(xs, smooth, color=color, label="train (running mean)")
            else:
                axes.plot(xs, smooth, color=color, alpha=0.4, linewidth=1)
        if len(val):
            xs, losses = val.T
            best = losses.argmin()
            color = "tab:orange" if is_single else color
            label = "validation" if is_single else f"{name}: best {losses[best]:.4f}"
            axes.plot(xs, losses, "o-", color=color, markersize=4, label=label)
            axes.plot(xs[best], losses[best], "*", color="tab:red", markersize=14, zorder=3)
            if is_single:
                text = f"best {losses[best]:.4f}\nat {x} {xs[best]:,.0f}"
                axes.annotate(
                    text, (xs[best], losses[best]), xytext=(-6, 14), textcoords="offset points",
                    ha="right" if best else "left", color="tab:red",
                )  # fmt: skip
    title = names[0] if is_single else "validation (dots) and train loss"
    x_label = {"step": "step", "tokens": "tokens read", "time": "seconds of training"}[x]
    axes.set(xlabel=x_label, ylabel="loss (nats per token)", title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")  # "best" compares all points, for seconds
    return figure


def running_mean(losses: np.ndarray) -> np.ndarray:
    """Return the mean around each row, over fewer rows near both ends."""
    i = np.arange(len(losses))
    half = np.minimum(i, i[::-1]).clip(max=min(SMOOTHED_ROWS // 2, len(losses) // 20))
    sums = np.concatenate([[0], losses.cumsum()])
    return (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)
