"""A race to a loss over wall time: python -m nanogpt_jax.bench.speed --race small [--seeds 5]

A preset and its fast twin (small and small-fast) train in turns, each as `python train.py`, so that
what disturbs the machine disturbs both. Time counts from the command to the line that tells the
loss of the whole validation split: imports, compilation and evaluations are in it. The twin runs
twice, with no compiled program kept from before, and with those that it kept. What it takes to the
loss is compared with what the preset takes for all its steps, which, by seed, end a little above or
below that loss. All other flags are train.py's, and go to both.
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
from nanogpt_jax.config import PRESETS, TrainConfig, parse_train_config, split_flags
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.run import plots as report
from nanogpt_jax.run.folder import OUT

TRAIN = Path(__file__).parent.parent / "train.py"
TWIN = "-fast"
# What nanoGPT reaches in its own recipe, on the whole validation split of tiny Shakespeare.
TARGETS = {"small": 1.898, "shakespeare": 1.4697}
COLD, WARM = "cold", "warm"
OWN_FLAGS = {"race", "seeds", "target", "seed"}  # all others are train.py's


@dataclass(frozen=True)
class RaceConfig(TrainConfig):
    """What races, and how often."""

    race: str = "small"
    """The preset that races with its twin."""
    seeds: int = 5
    """Seeds, one after the other from --seed on."""
    target: float = 0.0
    """Validation loss to be reached; 0: what nanoGPT reaches."""


@dataclass(frozen=True)
class Lap:
    """One run of the race: seconds from its command on, and losses."""

    name: str
    seed: int
    train: list[tuple[float, float]]  # (seconds, loss of a batch)
    val: list[tuple[float, float]]  # (seconds, loss of the whole validation split)

    def reached_s(self, target: float) -> float | None:
        """Return when the validation loss was first told to be at the target; None: never."""
        return next((seconds for seconds, loss in self.val if loss <= target), None)

    @property
    def whole_s(self) -> float:
        """When the last validation loss was told."""
        return self.val[-1][0]


def main(argv: list[str]) -> None:
    """Race, print a line for each run and the medians, and draw the curves."""
    settings = split_flags(argv, RaceConfig)
    name = settings.get("race", RaceConfig.race)
    twin = name + TWIN
    if twin not in PRESETS:
        able = [preset for preset in PRESETS if preset + TWIN in PRESETS]
        raise InputError(f"race must be one of {', '.join(able)}, got {name!r}")
    config = parse_train_config([*argv, f"--config={twin}"], __doc__, RaceConfig)
    if not TRAIN.exists():  # installed without the repository
        raise InputError(f"a race needs the repository's train.py, but there is no {TRAIN}")
    target = config.target or TARGETS[name]
    for taken in settings.keys() & {"config", "out_dir", "compile_cache", "eval_only"}:
        raise InputError(f"--{taken} must be left out: the race sets it itself")
    flags = [f"--{key}={value}" for key, value in settings.items() if key not in OWN_FLAGS]
    # Prepared before the first run, whose time it would be.
    corpora.resolve(
        config.dataset, Path(config.data_dir), config.model.block_size + 1, config.tokenizer,
        config.model.vocab_size,
    )  # fmt: skip
    laps = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(config.seeds):
            seed = config.seed + i
            kept = str(Path(folder, f"compiled-{seed}"))
            for preset, called, cache in (
                (name, name, "off"),
                (twin, f"{twin}, {COLD}", kept),
                (twin, f"{twin}, {WARM}", kept),
            ):
                own = f"--config={preset}", f"--seed={seed}", f"--compile_cache={cache}"
                laps.append(run(called, seed, [*own, *flags], Path(folder, f"{len(laps)}")))
                print(line(laps[-1], target), flush=True)
    print(f"medians of {config.seeds} seeds, their range, and the share of {name}'s median:")
    print(summary(laps, name, target))
    path = OUT / f"race-{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, picture(laps, target))
    print(f"drawn to {path}")


def run(called: str, seed: int, flags: list[str], folder: Path) -> Lap:
    """Run train.py, noting when each validation loss is told.

    Raises:
        RunError: it failed.
    """
    command = [sys.executable, str(TRAIN), *flags, f"--out_dir={folder}"]
    begun_s, told = time.perf_counter(), {}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for words in process.stdout:
            if found := re.match(r"step +(\d+): .*val loss", words):
                told[int(found[1])] = time.perf_counter() - begun_s
        if process.wait() or not told:
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["no loss was told"]
            raise RunError(f"{called}, seed {seed}: train.py failed: {said[-1]}")
    rows = report.read_metrics(folder)
    # The log's clock begins with the training; both clocks tell of the last evaluation.
    before_s = told[rows[-1]["step"]] - rows[-1]["elapsed_s"]
    train = [(before_s + r["elapsed_s"], r["train_loss"]) for r in rows if "train_loss" in r]
    val = [(told[r["step"]], r["val_loss"]) for r in rows if "val_loss" in r]
    return Lap(called, seed, train, val)


def by_name(laps: Sequence[Lap]) -> dict[str, list[Lap]]:
    """Return the runs of each name, in the order in which the names came."""
    names = dict.fromkeys(lap.name for lap in laps)
    return {name: [lap for lap in laps if lap.name == name] for name in names}


def line(lap: Lap, target: float) -> str:
    """Return a run in a line."""
    seconds, loss = lap.reached_s(target), lap.val[-1][1]
    reached = f"{seconds:6.1f} s to {target}" if seconds else f"{'never':>8} to {target}"
    return f"{lap.name:24} seed {lap.seed}  {reached}, {loss:.4f} after {lap.whole_s:.1f} s"


def summary(laps: Sequence[Lap], name: str, target: float) -> str:
    """Return a table: of the preset its whole time, of its twin the time to the target."""
    runs, rows = by_name(laps), []
    whole_s = statistics.median(lap.whole_s for lap in runs[name])
    for called, own in runs.items():
        losses = [lap.val[-1][1] for lap in own]
        # One that never came there is no time at all, and shall not better the median.
        reached = [lap.reached_s(target) or math.inf for lap in own]
        times = [lap.whole_s for lap in own] if called == name else reached
        median_s, missed = statistics.median(times), reached.count(math.inf)
        ratio = f"to {target}, 1/{whole_s / median_s:.1f}"
        what = "for all its steps" if called == name else ratio
        told = f"{median_s:6.1f} s ({min(times):.1f} to {max(times):.1f}) {what}"
        told = f"never to {target}" if median_s == math.inf else told
        rows.append(
            f"{called:24} {told}; ends at {statistics.median(losses):.4f} ({min(losses):.4f} to "
            f"{max(losses):.4f})"
            + (f", {missed} of {len(own)} never at {target}" if missed else "")
        )
    return "\n".join(rows)


def picture(laps: Sequence[Lap], target: float) -> bytes:
    """Return a PNG of all runs' losses over wall time."""
    from matplotlib.figure import Figure  # takes half a second: only now

    figure = Figure(figsize=(9, 5), dpi=150, layout="tight")
    axes = figure.subplots()
    for i, (called, own) in enumerate(by_name(laps).items()):
        for lap in own:
            label = called if lap is own[0] else None
            seconds, losses = np.array(lap.train).T
            losses = report.running_mean(losses)
            last = np.append(np.diff(seconds) > 0, True)  # steps of one dispatch have one time
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
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    found = io.BytesIO()
    report.save(figure, found)
    return found.getvalue()
