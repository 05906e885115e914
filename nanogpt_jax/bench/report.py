"""The report of `measure`: its table in Markdown, and the picture of the losses."""

import math
import sys
from typing import Any

import numpy as np

from nanogpt_jax import corpora
from nanogpt_jax.bench import profile
from nanogpt_jax.hardware import duration
from nanogpt_jax.run import new_figure, running_mean

# What nanoGPT reaches with its recipe: for a CPU, on the whole validation split; for a GPU, as its
# README gives it, on random batches.
TARGETS = {"small": 1.898, "small-fast": 1.898, "shakespeare-laptop": 1.4697}
TARGETS |= {"shakespeare": 1.4697, "shakespeare-fast": 1.4697}
# Seconds that its GPU recipe takes: on an A100 by its README, on a T4 by a user's report.
NANOGPT_S = {"A100": 180, "Colab T4": 4080}


def lines(found: dict[str, Any], dataset: str) -> list[str]:
    """Return the report as lines of Markdown."""
    first = next((row for row in found.values() if "device" in row), {})
    table, missing = ["| what | measured | command |", "|---|---|---|"], []

    def add(name: str, what: str, figure: str) -> None:
        table.append(f"| {what} | {figure} | `python {found[name]['command']}` |")

    for name, row in found.items():
        if "error" in row:
            missing.append(f"{name} ({row['error']})")
        elif "val" in row:
            best, target = min(loss for _, loss in row["val"]), TARGETS[name.split()[1]]
            figure = f"best validation loss {best:.4f}; {row['whole_s']:.0f} s in all, cold; first "
            figure += f"step after {row['first_step_s']:.1f} s"
            if dataset == corpora.SHAKESPEARE:
                at = next((f"after {s:.1f} s" for s, loss in row["val"] if loss <= target), "never")
                figure = f"{target} (nanoGPT's) {at}; {figure}"
            add(name, f"{name}, on {dataset}", figure)
        else:
            share = f"{row['share_of_matmul_peak']:.1%} of the fastest matrix product"
            mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
            rate = f"{row['train_tokens_per_s']:,.0f} tokens/s"
            memory = f"{row['train_compiled_bytes'] / 2**30:.2f} GiB"
            figure = f"{row['step_ms']:.2f} ms, {rate}, {share}{mfu}; {memory}"
            add(name, f"a step of {name}", figure)
            if "sample_tokens_per_s_1_stream" in row:
                kinds = ("1_stream", "10_streams", "streamed")
                one, ten, each = (f"{row[f'sample_tokens_per_s_{kind}']:,.0f}" for kind in kinds)
                figure = f"{one} tokens/s in one stream, {ten} in ten, {each} one by one"
                add(name, f"sampling from {name}", figure)
            if row.get("first_step_cold_s"):
                cold, warm = row["first_step_cold_s"], row["first_step_warm_cache_s"]
                add(name, f"first step of {name}", f"after {cold:.1f} s; {warm:.1f} s, cached")
    peak = first.get("matmul_peak_flops_per_s", math.nan) / 1e12
    report = [
        f"# Measured on {first.get('device', 'this machine')}",
        "",
        f"jax {first.get('jax')}, Python {sys.version.split()[0]}, {first.get('cores')} cores; "
        f"{first.get('compute')}. Fastest matrix product: {peak:,.4g} TFLOP/s. Each line is one "
        "run; all of them: `python -m nanogpt_jax measure`.",
        "",
        *table,
    ]
    if missing:
        report += ["", f"Not measured: {', '.join(missing)}."]
    for name in ("shakespeare", "gpt2", "small"):
        if operations := found.get(name, {}).get("operations"):
            report += ["", f"Where the time of a step of {name} goes:", ""]
            report += ["```", *profile.table(operations, n_rows=10), "```"]
    return report


def picture(curves: dict[str, dict[str, Any]]):
    """Return a matplotlib Figure of each run's losses over wall time."""
    figure, axes = new_figure(9, 5)
    for i, (name, row) in enumerate(curves.items()):
        seconds, losses = np.array(row["train"]).T
        last = np.append(np.diff(seconds) > 0, True)  # rows can share a time
        thin = {"color": f"C{i}", "alpha": 0.5, "linewidth": 0.9}
        axes.plot(seconds[last], running_mean(losses)[last], **thin)
        label = name.removeprefix("train ")
        axes.plot(*np.array(row["val"]).T, "o-", color=f"C{i}", markersize=4, label=label)
    for target in sorted({TARGETS[name.removeprefix("train ")] for name in curves}):
        axes.axhline(target, color="gray", linestyle="--", linewidth=1, label=f"nanoGPT: {target}")
    if "train shakespeare-laptop" in curves:
        for chip, seconds in NANOGPT_S.items():
            at = seconds, TARGETS["shakespeare-laptop"]
            axes.plot(*at, "D", color="gray", markersize=6)
            below = {"xytext": (0, -5), "textcoords": "offset points", "va": "top"}
            axes.annotate(f"nanoGPT's run,\n{chip}", at, ha="center", fontsize=8, **below)
    lowest = min(loss for row in curves.values() for _, loss in row["val"])
    axes.set(
        xlabel="time since the command, start-up and compilation included",
        ylabel="loss (nats per token)",
        title="Loss over wall time: thin lines are batches, dots the whole validation split",
        xscale="log",
        ylim=(lowest - 0.2, lowest + 1.5),
    )
    first, last = axes.get_xlim()
    marks = [s for s in (1, 3, 6, 10, 30, 60, 180, 600, 1800, 3600) if first < s < last]
    axes.set_xticks(marks, [duration(s) for s in marks])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, loc="upper right")
    return figure
