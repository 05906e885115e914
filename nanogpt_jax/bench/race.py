"""Race two presets to a loss, over wall time: python -m nanogpt_jax race small [--seeds 5]

A preset and its fast twin (small and small-fast) train in turns, each as `python train.py`, so that
whatever slows the machine down slows down both. Time counts from the command to the line that
prints the loss of the whole validation split, so it includes imports, compilation and evaluations.
The twin runs twice, with an empty compile cache and with a filled one. Its time to the loss is
compared with the preset's time for all its steps, since the preset ends a little above or below
that loss, depending on the seed. All other flags are train.py's and apply to both.
"""

import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanogpt_jax import corpora
from nanogpt_jax.config import PRESETS, TrainConfig, parse_train_config, split_flags, split_words
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.run import OUT, new_figure, read_metrics, running_mean, save_figure

TRAIN = Path(__file__).parents[2] / "train.py"
TWIN = "-fast"
# What nanoGPT reaches in its own recipe, on the whole validation split of tiny Shakespeare.
TARGETS = {"small": 1.898, "shakespeare": 1.4697}
OWN_FLAGS = {"race", "seeds", "target", "seed"}  # the others are train.py's


@dataclass(frozen=True)
class RaceConfig(TrainConfig):
    """What races, and how often."""

    race: str = "small"  # preset that races against its twin; also the first word of the command
    seeds: int = 5  # number of seeds, counted up from --seed
    target: float = 0.0  # validation loss to reach; 0: what nanoGPT reaches


class Lap(NamedTuple):
    """One run of the race: losses, each with its seconds since the command."""

    train: list[tuple[float, float]]  # (seconds, loss of a batch)
    val: list[tuple[float, float]]  # (seconds, loss of the whole validation split)

    def reached_s(self, target: float) -> float:
        """Return when the validation loss first was at or below the target; inf: never."""
        return next((seconds for seconds, loss in self.val if loss <= target), math.inf)


def main(argv: list[str]) -> None:
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
        raise InputError(f"a race needs the repository's {TRAIN}: run it in a clone")
    for flag in settings.keys() & {"config", "out_dir", "compile_cache", "eval_only"}:
        raise InputError(f"--{flag} must be left out: the race sets it itself")
    target = config.target or TARGETS[name]
    flags = [f"--{key}={value}" for key, value in settings.items() if key not in OWN_FLAGS]
    # Prepare the dataset now, or the first run's time would include it.
    corpora.resolve(
        config.dataset, Path(config.data_dir), config.model.block_size + 1, config.tokenizer,
        config.model.vocab_size, config.text_key,
    )  # fmt: skip
    runs: dict[str, list[Lap]] = {name: [], f"{twin}, cold": [], f"{twin}, warm": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(config.seed, config.seed + config.seeds):
            for label, laps in runs.items():
                cache = "off" if label == name else str(Path(folder, f"compiled-{seed}"))
                own = f"--config={label.split(',')[0]}", f"--compile_cache={cache}"
                out_dir = Path(folder, f"{label}-{seed}")
                laps.append(run([*own, f"--seed={seed}", *flags], out_dir))
                reached_s, (whole_s, loss) = laps[-1].reached_s(target), laps[-1].val[-1]
                reached = f"{'never':>8}" if math.isinf(reached_s) else f"{reached_s:6.1f} s"
                ended = f"{loss:.4f} after {whole_s:.1f} s"
                print(f"{label:24} seed {seed}  {reached} to {target}, {ended}", flush=True)
    print(f"medians of {config.seeds} seeds, their range, and the share of {name}'s median:")
    print(summary(runs, target))
    path = OUT / f"race-{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(picture(runs, target), path)
    print(f"drawn to {path}")


def run_train(flags: Sequence[str], **environment: str) -> Generator[tuple[float, str]]:
    """Run train.py; yield (seconds since the command, line) for each line that it prints."""
    start_s = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, str(TRAIN), *flags], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        try:
            for text in process.stdout:
                yield time.perf_counter() - start_s, text
        except GeneratorExit:  # the caller has seen enough
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            raise RunError(f"train.py failed: {(errors.read().splitlines() or ['no reason'])[-1]}")


def run(flags: list[str], folder: Path) -> Lap:
    """Run train.py, noting when it prints each validation loss."""
    printed_s = {}
    for seconds, text in run_train([*flags, f"--out_dir={folder}"]):
        if found := re.match(r"step +(\d+): .*val loss", text):
            printed_s[int(found[1])] = seconds
    rows = read_metrics(folder)
    # The log's clock starts with training; both clocks know when the last evaluation was done.
    before_s = printed_s[rows[-1]["step"]] - rows[-1]["elapsed_s"]
    train = [(before_s + r["elapsed_s"], r["train_loss"]) for r in rows if "train_loss" in r]
    val = [(printed_s[r["step"]], r["val_loss"]) for r in rows if "val_loss" in r]
    return Lap(train, val)


def summary(runs: dict[str, list[Lap]], target: float) -> str:
    """Return a table: the time of the first for all its steps, and of the others to the target."""
    rows, whole_s = [], math.nan
    for label, laps in runs.items():
        ends_s, losses = zip(*(lap.val[-1] for lap in laps), strict=True)
        reached_s = [lap.reached_s(target) for lap in laps]  # inf must not better the median
        times_s = reached_s if rows else ends_s
        median_s, n_missed = statistics.median(times_s), reached_s.count(math.inf)
        whole_s = whole_s if rows else median_s
        goal = f"to {target}, 1/{whole_s / median_s:.1f}" if rows else "for all its steps"
        took = f"{median_s:6.1f} s ({min(times_s):.1f} to {max(times_s):.1f}) {goal}"
        took = f"never to {target}" if math.isinf(median_s) else took
        missed = f", {n_missed} of {len(laps)} never at {target}" if n_missed else ""
        ended = f"{statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        rows.append(f"{label:24} {took}; ends at {ended}{missed}")
    return "\n".join(rows)


def picture(runs: dict[str, list[Lap]], target: float):
    """Return a matplotlib Figure: all runs' losses over wall time."""
    figure, axes = new_figure(9, 5)
    for i, (name, laps) in enumerate(runs.items()):
        for lap in laps:
            seconds, losses = np.array(lap.train).T
            last = np.append(np.diff(seconds) > 0, True)  # rows can share a time
            thin = {"color": f"C{i}", "alpha": 0.5, "linewidth": 0.9}
            label = name if lap is laps[0] else None
            axes.plot(seconds[last], running_mean(losses)[last], **thin, label=label)
            axes.plot(*np.array(lap.val).T, "o", color=f"C{i}", markersize=4)
    axes.axhline(target, color="gray", linestyle="--", linewidth=1, label=f"target {target}")
    lowest = min(loss for laps in runs.values() for lap in laps for _, loss in lap.val)
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
    return figure
