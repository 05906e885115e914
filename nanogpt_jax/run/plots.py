"""The curves of runs: python -m nanogpt_jax report OUT_DIR [OUT_DIR...] [--x time]

Prints a line for each run and draws their losses over each other. No JAX, so it can watch a run
that holds the chip. --x is step, tokens or time.
"""

import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nanogpt_jax import files
from nanogpt_jax.config import (
    MAX_FLOAT,
    TrainConfig,
    check_fields,
    parse_args,
    split_words,
    to_flat_dict,
)
from nanogpt_jax.corpora import bits_per_byte
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.run.folder import METRICS, PICTURE, read_config

SMOOTHED_ROWS = 21  # the running mean's widest window


@dataclass(frozen=True)
class ReportConfig:
    """How runs are drawn."""

    x: Literal["step", "tokens", "time"] = "step"
    """What the curves run along; time is that of training, in seconds."""
    picture: str = ""
    """Where the picture goes; empty: loss.png beside a single run, out/report.png of several."""

    def __post_init__(self):
        check_fields(self)


def main(argv: list[str]) -> None:
    """Print a line for each run, and draw them."""
    words, flags = split_words(argv, "the folder of a run")
    folders = [Path(word) for word in words]
    config = parse_args(ReportConfig, flags, __doc__)
    if not folders:
        raise InputError(
            "the folder of at least one run must be given, like "
            "python -m nanogpt_jax report out/small"
        )
    if len(folders) > 1:  # out/* has other things too
        others = [folder for folder in folders if not (folder / METRICS).exists()]
        folders = [folder for folder in folders if folder not in others] or folders
        if others and folders != others:
            print(f"no run, and left out: {', '.join(map(str, others))}")
    runs = {str(folder): read_run(folder, config.x) for folder in folders}
    width = max(map(len, runs))
    for name, run in runs.items():
        print(f"{name:{width}}  {describe(run)}")
    alone = folders[0] / PICTURE if len(folders) == 1 else Path("out", "report.png")
    path = Path(config.picture) if config.picture else alone
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(loss_figure(runs, config.x), path)
    except (OSError, ValueError) as error:  # ValueError: no format of that name
        raise InputError(f"picture: {path} cannot be written ({error})") from None
    print(f"drawn to {path}")


def read_metrics(folder: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
        InputError: it cannot be read, or another line is none of a run's.
    """
    path = Path(folder, METRICS)
    with reading(path, "a run's metrics"):
        if not path.exists():
            return []
        *lines, cut_off = path.read_bytes().split(b"\n")
    rows = [_row(line) for line in lines]
    if None in rows:
        at = rows.index(None)
        raise InputError(
            f'{path}, line {at + 1}: must be like {{"step": 10, "train_loss": 2.5, "elapsed_s": '
            f'0.1, "tokens_per_s": 9000}}, but is {lines[at][:60].decode("utf-8", "replace")!r}: '
            "delete the line, which no other needs"
        )
    last = _row(cut_off)
    return [*rows, last] if last else rows


def _row(line: bytes) -> dict | None:
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

    Raises:
        InputError: there is no run, or it has logged nothing yet.
    """
    asked = to_flat_dict(TrainConfig()) | read_config(folder)
    rows = read_metrics(folder)
    if not rows:
        raise InputError(f"{folder} has logged nothing yet: there must be a {METRICS} with rows")
    of_step = asked["batch_size"] * asked["gradient_accumulation_steps"] * asked["block_size"]
    of_row = {
        "step": lambda row: row["step"],
        "tokens": lambda row: row["step"] * of_step,
        "time": lambda row: row["elapsed_s"],
    }
    return [row | {"x": of_row[x](row)} for row in rows]


def describe(run: list[dict]) -> str:
    """Return a run in a line."""
    evaluated = [row for row in run if "val_loss" in row]
    best = min(evaluated, key=lambda row: row["val_loss"], default={})
    loss, step, bits = best.get("val_loss", math.nan), best.get("step", 0), ""
    if "val_bits_per_byte" in best:  # of another tokenizer, only these can be compared
        bits = f" ({best['val_bits_per_byte']:.3f} bits per byte)"
    last = run[-1]
    return (
        f"best val loss {loss:.4f}{bits} at step {step:,}; {last['step']:,} steps in "
        f"{last['elapsed_s']:,.0f} s, {last['tokens_per_s']:,} tokens/s"
    )


def describe_loss(val_loss: float, bytes_per_token: float | None) -> str:
    """Return a validation loss in words: "val loss 1.9180 (2.767 bits per byte)"."""
    if not bytes_per_token:
        return f"val loss {val_loss:.4f}"
    return f"val loss {val_loss:.4f} ({bits_per_byte(val_loss, bytes_per_token):.3f} bits per byte)"


def draw(folder: Path, title: str) -> None:
    """Draw a run's loss.png from its metrics.jsonl."""
    rows = [row | {"x": row["step"]} for row in read_metrics(folder)]
    picture = io.BytesIO()
    save_figure(loss_figure({title: rows}), picture)
    files.write_atomically(Path(folder, PICTURE), picture.getvalue())


def save_figure(figure, path: Path | io.BytesIO) -> None:
    """Write a figure as PNG or as a path ends; characters that the font lacks become boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path)


def loss_figure(runs: dict[str, list[dict]], x: str = "step"):
    """Return a matplotlib Figure: of each run its train and validation curve, the best marked.

    Args:
        runs: rows of metrics by the run's name, each with an `x`.
    """
    axes = new_axes(8, 4.5)
    alone = len(runs) == 1
    names = [_as_written(name) for name in runs]
    for i, (name, rows) in enumerate(zip(names, runs.values(), strict=True)):
        train = np.array([(row["x"], row["train_loss"]) for row in rows if "train_loss" in row])
        val = np.array([(row["x"], row["val_loss"]) for row in rows if "val_loss" in row])
        color = "tab:blue" if alone else f"C{i}"
        if len(train):
            places, losses = train.T
            label = "train (running mean)" if alone else None
            if alone:
                axes.plot(places, losses, color=color, alpha=0.25, linewidth=0.8)
            faint = {} if alone else {"alpha": 0.4, "linewidth": 1}
            axes.plot(places, running_mean(losses), color=color, label=label, **faint)
        if len(val):
            places, losses = val.T
            best = losses.argmin()
            color = "tab:orange" if alone else color
            label = "validation" if alone else f"{name}: best {losses[best]:.4f}"
            axes.plot(places, losses, "o-", color=color, markersize=4, label=label)
            axes.plot(places[best], losses[best], "*", color="tab:red", markersize=14, zorder=3)
            if alone:
                axes.annotate(
                    f"best {losses[best]:.4f}\nat {x} {places[best]:,.0f}",
                    (places[best], losses[best]),
                    xytext=(-6, 14),
                    textcoords="offset points",
                    ha="right" if best else "left",
                    color="tab:red",
                )
    title = names[0] if alone else "validation (dots) and train loss"
    x_label = {"step": "step", "tokens": "tokens read", "time": "seconds of training"}[x]
    axes.set(xlabel=x_label, ylabel="loss (nats per token)", title=title)
    if axes.get_legend_handles_labels()[0]:
        # Not "best": that compares with every point, for seconds, and says so in a warning.
        axes.legend(frameon=False, loc="upper right")
    return axes.figure


def new_axes(width: float, height: float):
    """Return the matplotlib Axes of a new figure, width x height inches, in one style for all."""
    # Takes half a second: only now. Not pyplot: nothing to show, nothing to close.
    from matplotlib.figure import Figure

    axes = Figure(figsize=(width, height), dpi=150, layout="tight").subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _as_written(name: str) -> str:
    """Return a name so that matplotlib sees no formula in $...$, and text in any bytes."""
    return name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def running_mean(losses: np.ndarray) -> np.ndarray:
    """Return the mean around each row, of fewer rows at both ends."""
    i = np.arange(len(losses))
    half = np.minimum(i, i[::-1]).clip(max=min(SMOOTHED_ROWS // 2, len(losses) // 20))
    sums = np.concatenate([[0], losses.cumsum()])
    return (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)
