"""Tiny training runs for tests: in this process or in one of their own, and how to compare them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from make_old_run import ROOT, load

from nanogpt_jax import sharding, steps
from nanogpt_jax.config import parse_train_config
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run import read_metrics
from nanogpt_jax.run.checkpoint import CheckpointReader

train = load("train")
N_STEPS = 40
# One shape and one schedule, so that most runs share their compiled programs.
SHAPE = [
    "--config=tiny",
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--dropout=0.1"),
    *("--batch_size=4", "--gradient_accumulation_steps=2", f"--lr_decay_iters={N_STEPS}"),
    *("--eval_interval=8", "--log_interval=1", "--mesh=data=1"),
]
# Trains, and sends itself signals at the nth system call that matches: Python tells its audit hooks
# of whatever it is about to do with files.
SENDS_ITSELF = """
import os, re, sys
event, pattern, nth, signals = {moment!r}
seen = 0
def hook(name, args):
    global seen
    if name == event and re.search(pattern, " ".join(map(str, args))):
        seen += 1
        if seen == nth:
            for number in signals:
                os.kill(os.getpid(), number)
sys.addaudithook(hook)
sys.path.insert(0, {root!r})
import train
from nanogpt_jax.errors import run_command
run_command(train.main)
"""
MOMENTS = {
    "as a save begins": ("os.mkdir", r"orbax-checkpoint-tmp", 1),
    "inside a save": ("os.mkdir", r"orbax-checkpoint-tmp", 5),
    "as its last files are written": ("open", r"commit_success.txt w", 2),
    "just before the commit": ("os.rename", r"checkpoints/\d+ -1 -1$", 1),
    "between a commit and the removal of the old one": ("shutil.rmtree", r"checkpoints/\d+ ", 1),
    "in the middle of the removal": ("os.remove", r"^manifest.ocdbt \d+$", 1),
}


def write_dataset(folder: Path, n_train: int = 3000, n_val: int = 200) -> Path:
    """Write `.bin` files that can be learnt: the same phrase, with some letters changed."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in ("train", n_train), ("val", n_val):
        ids = np.tile([1, 2, 3, 4, 5, 4, 3, 6, 7, 8, 0], n // 11 + 1)[:n]
        noisy = np.where(rng.random(n) < 0.2, rng.integers(0, 9, n), ids)
        noisy.astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def write_tokenizer(dataset: Path) -> None:
    """Write the tokenizer of `write_dataset`'s nine ids."""
    (dataset / "tokenizer.json").write_text('{"type": "char", "chars": "\\nabcdefgh"}')


def command(folder: Path | str, dataset: Path | str, *more) -> list[str]:
    """Return the arguments of train.py for a run of SHAPE."""
    return [*SHAPE, f"--dataset={dataset}", f"--out_dir={folder}", *map(str, more)]


def start(folder: Path | str, dataset: Path | str, *more) -> int:
    """Train in this process; return the exit code."""
    return train.main(command(folder, dataset, *more))


def spawn(*argv, cwd: Path, moment: str | None = None, signals=()) -> subprocess.Popen:
    """Start train.py in a process of its own, which sends itself signals at one of MOMENTS."""
    code = [str(ROOT / "train.py")]
    if moment:
        moments = *MOMENTS[moment], [int(number) for number in signals]
        code = ["-c", SENDS_ITSELF.format(moment=moments, root=str(ROOT))]
    return subprocess.Popen(
        [sys.executable, *code, *map(str, argv)],
        cwd=cwd,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*argv, timeout: float = 300, **kwargs) -> tuple[int, str, str]:
    """Run `spawn` to its end; return its exit code, standard output and standard error."""
    with spawn(*argv, **kwargs) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return process.returncode, stdout, stderr


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait until the run of a process has logged a step."""
    deadline_s = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_metrics(folder)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def numbers(folder: Path) -> list[dict]:
    """Return the rows of metrics.jsonl without those columns that depend on the clock."""
    clock = ("tokens_per_s", "elapsed_s")
    return [
        {name: x for name, x in row.items() if name not in clock} for row in read_metrics(folder)
    ]


def evaluated_steps(folder: Path) -> list[int]:
    """Return the steps whose rows have a validation loss."""
    return [row["step"] for row in read_metrics(folder) if "val_loss" in row]


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints, in order."""
    return run_folder.saved_steps(folder / "checkpoints")[::-1]


def state_of(folder: Path, step: int | None = None):
    """Return the state of a run's checkpoint: the newest, or that of a step."""
    config = parse_train_config(["--config", str(folder / "config.json")])
    tx = make_optimizer(config.optim, 1)
    model = steps.make_model(config.model)
    init = partial(steps.init_params, model)
    abstract = jax.eval_shape(lambda key: steps.init_state(tx, init(key)), jax.random.key(0))
    checkpoints = CheckpointReader(folder / "checkpoints")
    state = checkpoints.restore(sharding.place(abstract, sharding.make_mesh()), prefer=step)
    checkpoints.close()
    return state


def content(folder: Path) -> dict[Path, bytes]:
    """Return every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(folder: Path, to: Path) -> Path:
    """Copy a run that a module's tests share, so that one of them may change it."""
    return Path(shutil.copytree(folder, to))


def assert_same_run(folder: Path, other: Path) -> None:
    """Check that parameters, optimizer state and every logged number are equal bit for bit."""
    assert numbers(folder) == numbers(other)
    jax.tree.map(np.testing.assert_array_equal, state_of(folder), state_of(other))


@contextlib.contextmanager
def signal_after_step(step: int, number: int):
    """Send this process a signal as soon as it has dispatched the update before `step`."""
    log = train.Run.log

    def spy(self, done, metrics):
        log(self, done, metrics)
        if done == step:
            signal.raise_signal(number)

    train.Run.log = spy
    try:
        yield
    finally:
        train.Run.log = log
