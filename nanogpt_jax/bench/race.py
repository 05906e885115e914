"""Race two presets to a loss, over wall time: python -m nanogpt_jax race small [--seeds 5]

A preset and its fast twin (small and small-fast) train in turns, each as `python train.py`, so that
whatever slows the machine down slows down both. Time counts from the command to the line that
prints the loss of the whole validation split, so it includes imports, compilation and evaluations.
The twin runs twice, with an empty compile cache and with a filled one. Its time to the loss is
compared with the preset's time for all its steps, since the preset ends a little above or below
that loss, depending on the seed. All other flags are train.py's and apply to both.
"""

import io
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_jax import corpora, files
from nanogpt_jax.config import (
    PRESETS,
    TrainConfig,
    parse_train_config,
    split_flags,
    split_words,
)
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.run import OUT, new_figure, read_metrics, running_mean, save_figure

TRAIN = Path(__file__).parents[2] / "train.py"
TWIN = "-fast"
# What nanoGPT reaches in its own recipe, on the whole validation split of tiny Shakespeare.
TARGETS = {"small": 1.898, "shakespeare": 1.4697}
COLD, WARM = "cold", "warm"
OWN_FLAGS = {"race", "seeds", "target", "seed"}  # the others are train.py's


@dataclass(frozen=True)
class RaceConfig(TrainConfig):
    """What races, and how often."""

    race: str = "small"
    """The preset that races against its twin; also the first word of the command."""
    seeds: int = 5
    """Number of seeds, counted up from --seed."""
    target: float = 0.0
    """Validation loss to reach; 0: what nanoGPT reaches."""


@dataclass(frozen=True)
class Lap:
    """One run of the race: seconds from its command on, and losses."""

    name: str
    seed: int
    train: list[tuple[float, float]]  # (seconds, loss of a batch)
    val: list[tuple[float, float]]  # (seconds, loss of the whole validation split)

    def reached_s(self, target: float) -> float | None:
        """Return when a validation loss at or below the target was first printed, or None."""
        return next((seconds for seconds, loss in self.val if loss <= target), None)

    @property
    def whole_s(self) -> float:
        """When the last validation loss was printed."""
        return self.val[-1][0]


def main(argv: list[str]) -> None:
    """Race, print a line for each run and the medians, and draw the curves."""
    names, argv = split_words(argv, "the preset that races")
    argv = [*(f"--race={name}" for name in names), *argv]
    settings = split_flags(argv, RaceConfig)
    name = settings.get("race", RaceConfig.race)
    twin = name + TWIN
    if twin not in PRESETS:
        have_twins = [preset for preset in PRESETS if preset + TWIN in PRESETS]
        raise InputError(f"race must be one of {', '.join(have_twins)}, got {name!r}")
    config = parse_train_config([*argv, f"--config={twin}"], __doc__ or "", RaceConfig)
    assert isinstance(config, RaceConfig)
    if not TRAIN.exists():  # installed without the repository
        raise InputError(
            f"a race needs the repository's train.py, got no {TRAIN}: run it in a clone"
        )
    target = config.target or TARGETS[name]
    for flag in settings.keys() & {"config", "out_dir", "compile_cache", "eval_only"}:
        raise InputError(f"--{flag} must be left out: the race sets it itself")
    flags = [f"--{key}={value}" for key, value in settings.items() if key not in OWN_FLAGS]
    # Prepare the dataset now, or the first run's time would include it.
    corpora.resolve(
        config.dataset, Path(config.data_dir), config.model.block_size + 1, config.tokenizer,
        config.model.vocab_size,
    )  # fmt: skip
    laps = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(config.seeds):
            seed = config.seed + i
            filled = str(Path(folder, f"compiled-{seed}"))
            for preset, label, cache in (
                (name, name, "off"),
                (twin, f"{twin}, {COLD}", filled),
                (twin, f"{twin}, {WARM}", filled),
            ):
                own = f"--config={preset}", f"--seed={seed}", f"--compile_cache={cache}"
                laps.append(run(label, seed, [*own, *flags], Path(folder, f"{len(laps)}")))
                print(line(laps[-1], target), flush=True)
    print(f"medians of {config.seeds} seeds, their range, and the share of {name}'s median:")
    print(summary(laps, name, target))
    path = OUT / f"race-{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, picture(laps, target))
    print(f"drawn to {path}")


def run(label: str, seed: int, flags: list[str], folder: Path) -> Lap:
    """Run train.py, noting when it prints each validation loss.

    Raises:
        RunError: it failed.
    """
    command = [sys.executable, str(TRAIN), *flags, f"--out_dir={folder}"]
    start_s, printed_s = time.perf_counter(), {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for text in process.stdout:
            if found := re.match(r"step +(\d+): .*val loss", text):
                printed_s[int(found[1])] = time.perf_counter() - start_s
        if process.wait() or not printed_s:
            errors.seek(0)
            reason = errors.read().strip().splitlines() or ["it printed no validation loss"]
            raise RunError(f"{label}, seed {seed}: train.py failed: {reason[-1]}")
    rows = read_metrics(folder)
    # The log's clock starts with training; both clocks know when the last evaluation was done.
    before_s = printed_s[rows[-1]["step"]] - rows[-1]["elapsed_s"]
    train = [(before_s + r["elapsed_s"], r["train_loss"]) for r in rows if "train_loss" in r]
    val = [(printed_s[r["step"]], r["val_loss"]) for r in rows if "val_loss" in r]
    return Lap(label, seed, train, val)


def by_name(laps: Sequence[Lap]) -> dict[str, list[Lap]]:
    """Return the runs of each name, in order of first appearance."""
    names = dict.fromkeys(lap.name for lap in laps)
    return {name: [lap for lap in laps if lap.name == name] for name in names}


def line(lap: Lap, target: float) -> str:
    """Return a run's result as a line."""
    seconds, loss = lap.reached_s(target), lap.val[-1][1]
    reached = f"{seconds:6.1f} s to {target}" if seconds else f"{'never':>8} to {target}"
    return f"{lap.name:24} seed {lap.seed}  {reached}, {loss:.4f} after {lap.whole_s:.1f} s"


def summary(laps: Sequence[Lap], name: str, target: float) -> str:
    """Return a table: the preset's time for all its steps, its twin's time to the target."""
    runs, rows = by_name(laps), []
    whole_s = statistics.median(lap.whole_s for lap in runs[name])
    for label, own in runs.items():
        losses = [lap.val[-1][1] for lap in own]
        # A run that never reached the target must not better the median.
        reached = [lap.reached_s(target) or math.inf for lap in own]
        times = [lap.whole_s for lap in own] if label == name else reached
        median_s, n_missed = statistics.median(times), reached.count(math.inf)
        ratio = f"to {target}, 1/{whole_s / median_s:.1f}"
        goal = "for all its steps" if label == name else ratio
        took = f"{median_s:6.1f} s ({min(times):.1f} to {max(times):.1f}) {goal}"
        took = f"never to {target}" if median_s == math.inf else took
        missed = f", {n_missed} of {len(own)} never at {target}" if n_missed else ""
        median_loss = statistics.median(losses)
        ends = f"ends at {median_loss:.4f} ({min(losses):.4f} to {max(losses):.4f})"
        rows.append(f"{label:24} {took}; {ends}{missed}")
    return "\n".join(rows)


def picture(laps: Sequence[Lap], target: float) -> bytes:
    """Return a PNG of all runs' losses over wall time."""
    figure, axes = new_figure(9, 5)
    for i, (name, own) in enumerate(by_name(laps).items()):
        for lap in own:
            label = name if lap is own[0] else None
            seconds, losses = np.array(lap.train).T
            losses = running_mean(losses)
            last = np.append(np.diff(seconds) > 0, True)  # rows can share a time
            thin = {"color": f"C{i}", "alpha": 0.5, "linewidth": 0.9, "label": label}
            axes.plot(seconds[last], losses[last], **thin)
            axes.plot(*np.array(lap.val).T, "o", color=f"C{i}", markersize=4)
    axes.axhline(target, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        f"target {target}", (0.5, target), xycoords=("axes fraction", "data"), xytext=(0, 4),
        textcoords="offset points", ha="center", color="gray", fontsize=8,
    )  # fmt: skip
    lowest = min(loss for lap in laps for _, loss in lap.val)
    axes.set(
        xlabel="seconds since the command, start-up and compilation included",
        ylabel="loss (nats per token)",
        title="Race to a loss: lines are the batches' loss, dots the whole validation split's",
        xscale="log",
        ylim=(lowest - 0.2, lowest + 1.5),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.legend(frameon=False, loc="upper right")
    png = io.BytesIO()
    save_figure(figure, png)
    return png.getvalue()
