"""Measure how fast this machine trains and samples a GPT: python -m nanogpt_jax measure

Writes report.md, a table ready to be published, with report.json and training.png beside it. It
takes about eight minutes on a GPU. Whatever would take too long is left out, and the report says
so. Each line comes from its own command, so one failure does not stop the rest; started again, it
measures only what is missing. Training takes the text that train.py would take without --dataset.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from nanogpt_jax import corpora, files
from nanogpt_jax.bench import report
from nanogpt_jax.config import PRESETS, Checked, parse_args, with_vocab_size
from nanogpt_jax.errors import InputError, RunError, UserError, first_line, reading
from nanogpt_jax.hardware import duration, run_flops, train_flops_per_token
from nanogpt_jax.run import read_metrics, save_figure

TRAIN = Path(__file__).parents[2] / "train.py"
# The first of each is the preset's own, and sampled too.
BATCHES = {"small": (12,), "shakespeare": (64, 128, 256), "gpt2": (16, 32, 64)}
# To guess how long something takes: FLOP/s, and their share of the fastest matrix product.
PEAK, SHARE, START_S = 1e11, 0.1, 20


@dataclass(frozen=True)
class MeasureConfig(Checked):
    """What is measured, and where the report goes."""

    out_dir: str = "out/measured"  # folder of the report; delete it to measure again
    data_dir: str = "data"  # folder of prepared datasets
    minutes: float = 8.0  # leave out what would probably end later


class Task(NamedTuple):
    """One command whose figures are wanted."""

    name: str
    argv: list[str]  # after python
    flops: float  # that it computes, about


def main(argv: list[str]) -> int:
    config = parse_args(MeasureConfig, argv, __doc__)
    if not TRAIN.exists():  # installed without the repository
        raise InputError(f"measuring needs the repository's {TRAIN}: run it in a clone")
    folder, deadline = Path(config.out_dir), time.monotonic() + 60 * config.minutes
    files.check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    found = read_rows(path)
    dataset = corpora.resolve(corpora.Request(None, Path(config.data_dir), 257)).name
    for task in tasks(config, dataset):
        if "error" not in found.get(task.name, {"error": ""}):
            print(f"{task.name}: measured before")
            continue
        peak = max(row.get("matmul_peak_flops_per_s", PEAK) for row in [{}, *found.values()])
        alike = re.sub("^train |-fast$|,.*", "", task.name).replace("shakespeare-laptop", "small")
        own = found.get(alike, {})
        guess_s = START_S + task.flops / (own.get("share_of_matmul_peak", SHARE) * peak)
        left_s = deadline - time.monotonic()
        print(f"{task.name}: ", end="", flush=True)
        if guess_s > left_s:
            found[task.name] = {"error": f"left out, it would take {duration(guess_s)}"}
        else:
            start_s = time.perf_counter()
            found[task.name] = measure(task, folder, left_s + 60) | {"command": " ".join(task.argv)}
            found[task.name]["seconds"] = round(time.perf_counter() - start_s, 1)
        print(found[task.name].get("error", f"{found[task.name].get('seconds')} s"), flush=True)
        files.write_json(path, {"machine": machine(), "rows": found})
        text = "\n".join(report.lines(found, dataset)) + "\n"
        files.write_atomically(folder / "report.md", text.encode())
    curves = {name: row for name, row in found.items() if "val" in row}
    if curves:
        save_figure(report.picture(curves), folder / "training.png")
    print(f"the report is {folder / 'report.md'}")
    return 0 if any("error" not in row for row in found.values()) else 1


def tasks(config: MeasureConfig, dataset: str) -> list[Task]:
    """Return what to measure, what matters most first: presets, training, larger batches."""
    presets, training, larger = [], [], []
    text = [f"--dataset={dataset}", f"--data_dir={config.data_dir}"]
    for name, sizes in BATCHES.items():
        preset = with_vocab_size(PRESETS[name])
        for size in sizes:
            is_preset = size == preset.batch_size
            argv = ["-m", "nanogpt_jax", "bench", f"--config={name}"]
            argv += [] if is_preset else [f"--batch_size={size}", "--sampling=False"]
            argv += [] if name == "small" else ["--start=False"]
            n_micro = min(4, preset.gradient_accumulation_steps)  # enough to hide the optimizer
            argv += [] if n_micro == 1 else [f"--gradient_accumulation_steps={n_micro}"]
            flops = 20 * n_micro * size * preset.model.block_size
            flops *= train_flops_per_token(preset.model)
            label = name if is_preset else f"{name}, batch {size}"
            (presets if is_preset else larger).append(Task(label, argv, flops))
    for name in report.TARGETS:
        flops = sum(run_flops(with_vocab_size(PRESETS[name]), corpora.SHAKESPEARE_VAL_TOKENS))
        training.append(Task(f"train {name}", ["train.py", f"--config={name}", *text], flops))
    return presets + training + larger


def machine() -> dict[str, str]:
    """Return what makes figures incomparable if it differs."""
    return {"node": platform.node(), "jax": metadata.version("jax"), "python": sys.version}


def read_rows(path: Path) -> dict[str, Any]:
    """Return the rows of an earlier start on the same machine, by the names of their tasks."""
    if not path.exists():
        return {}
    with reading(path, "a report of this command; delete it to measure again"):
        before = files.read_json(path)
        is_same, rows = before["machine"] == machine(), dict(before["rows"])
    if not is_same:
        print(f"{path} is of another machine or version: measuring again")
    return rows if is_same else {}


def measure(task: Task, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Run a command and return its figures, or why there are none."""
    try:
        if task.argv[0] == "train.py":
            out_dir = folder / task.name.replace("train ", "")
            return trained(task.argv[1:], out_dir, folder / "compiled" / out_dir.name, timeout_s)
        printed = run_python([*task.argv, "--json", "--profile"], timeout_s)
        return json.loads("".join(text for _, text in printed))
    except (UserError, ValueError, LookupError) as error:
        return {"error": f"failed: {first_line(error)}"}


def reason(stderr: str, returncode: int) -> str:
    """Return why a command failed, from what it wrote on standard error."""
    if returncode < 0:
        return f"killed by signal {-returncode}"
    errors = re.findall(r"^(?:error: .*|[\w.]+(?:Error|Exception)\b.*)", stderr, re.MULTILINE)
    return (errors or stderr.splitlines() or ["no reason"])[-1].removeprefix("error: ")


def run_python(
    argv: Sequence[str], timeout_s: float = threading.TIMEOUT_MAX, **environment: str
) -> Generator[tuple[float, str]]:
    """Run a script; yield (seconds since the command, line) for each line that it prints.

    Raises RunError if it fails, or takes longer than timeout_s.
    """
    start_s = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, *argv], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        try:
            for text in process.stdout:
                yield time.perf_counter() - start_s, text
            code = process.wait()
        except BaseException:  # the caller has seen enough, for example
            process.kill()
            raise
        finally:
            timer.cancel()
        if code:
            errors.seek(0)
            is_late = time.perf_counter() - start_s > timeout_s
            why = "it took too long" if is_late else reason(errors.read(), code)
            raise RunError(f"{TRAIN.name} failed: {why}" if argv[0] == str(TRAIN) else why)


def trained(flags: list[str], out_dir: Path, cache: Path, timeout_s: float) -> dict[str, Any]:
    """Train from scratch with an empty compile cache; return the losses with their seconds."""
    printed_s, first_step_s, end_s = {}, None, 0.0
    shutil.rmtree(cache, ignore_errors=True)
    own = [f"--out_dir={out_dir}", f"--compile_cache={cache}", "--overwrite"]
    for end_s, text in run_python([str(TRAIN), *flags, *own], timeout_s):
        if found := re.match(r"step +(\d+): .*val loss", text):
            printed_s[int(found[1])] = end_s
        elif "first step done" in text:
            first_step_s = end_s
    rows = read_metrics(out_dir)
    # The log's clock starts with training; both clocks know when the last evaluation was done.
    before_s = printed_s[rows[-1]["step"]] - rows[-1]["elapsed_s"]
    train = [(before_s + r["elapsed_s"], r["train_loss"]) for r in rows if "train_loss" in r]
    val = [(printed_s[r["step"]], r["val_loss"]) for r in rows if "val_loss" in r]
    return {"first_step_s": first_step_s, "whole_s": end_s, "train": train, "val": val}
