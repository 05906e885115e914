"""Whole runs in processes of their own that are killed, stopped, or run out of disk."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogpt_jax.run.plots import read_metrics
from nanogpt_jax.run.signals import NUMBERS

ROOT = Path(__file__).parent.parent
SHAPE = [
    *("--config=tiny", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"),
    *("--dropout=0.1", "--batch_size=4", "--eval_iters=2", "--mesh=data=1"),
    *("--eval_interval=20", "--log_interval=5", "--dataset=book.txt"),
]
# Trains, and sends itself signals at the nth call of the system that matches: whatever Python does
# with files tells its audit hooks first.
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


def begin(folder, *more, moment=None, signals=()):
    """Start training in folder/run; at a moment signals come."""
    script = str(ROOT / "train.py")
    signals = [int(number) for number in signals]
    code = moment and SENDS_ITSELF.format(moment=(*MOMENTS[moment], signals), root=str(ROOT))
    return subprocess.Popen(
        [sys.executable, *(("-c", code) if moment else (script,)), *SHAPE, "--out_dir=run", *more],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder, *more, moment=None, signals=()):
    """Train until the process ends; return its exit code, standard output and standard error."""
    with begin(folder, *more, moment=moment, signals=signals) as process:
        stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def content(folder):
    """What must be the same, bit for bit, however often a run was interrupted."""
    rows = [
        {name: x for name, x in row.items() if name not in ("tokens_per_s", "elapsed_s")}
        for row in read_metrics(folder / "run")
    ]
    # Of each checkpoint the loss and the checksum of every array.
    facts = [json.loads(path.read_text()) for path in folder.glob("run/checkpoints/*/facts/*data")]
    argv = [sys.executable, ROOT / "sample.py", "--out_dir=run", "--num_samples=1"]
    sample = subprocess.run(argv, cwd=folder, capture_output=True, check=True).stdout
    return rows, sorted(facts, key=lambda fact: fact["step"]), sample


def steps_saved(folder):
    return sorted(int(p.name) for p in folder.glob("run/checkpoints/*") if p.name.isdecimal())


@pytest.fixture
def folders(tmp_path, book):
    """Two folders to train in, each with the same text."""
    for name in "interrupted", "straight":
        (tmp_path / name).mkdir()
        (tmp_path / name / "book.txt").write_text(book.read_text())
    return tmp_path / "interrupted", tmp_path / "straight"


@pytest.mark.slow
def test_killed_25_times_a_run_ends_bit_for_bit_as_one_that_was_never_killed(folders):
    folder, straight = folders
    length = "--max_iters=2400"
    for moment in MOMENTS:
        code, stdout, stderr = finish(folder, length, moment=moment, signals=[signal.SIGKILL])
        assert code == -signal.SIGKILL, (moment, stdout, stderr)
    rng = random.Random(0)
    for i in range(25 - len(MOMENTS)):
        seen = (folder / "run" / "metrics.jsonl").stat().st_mtime_ns
        with begin(folder, length) as process:
            if i % 4:  # anywhere in the run; else anywhere in the first seconds, of starting
                while (folder / "run" / "metrics.jsonl").stat().st_mtime_ns == seen:
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6 if i % 4 else 5))
            process.kill()
        assert process.returncode == -signal.SIGKILL, "the run is too short for 25 kills"
    code, stdout, stderr = finish(folder, length)
    assert code == 0, stderr
    assert "going on with run from step" in stdout
    assert not list(folder.glob("run/checkpoints/*tmp*"))
    assert finish(straight, length)[0] == 0
    assert content(folder) == content(straight)
    assert [row["step"] for row in content(folder)[0]] == list(range(0, 2401, 5))


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("moment", ["inside a save", "in the middle of the removal"])
def test_a_signal_during_a_save_lets_it_finish_and_a_second_one_does_not(folders, moment, number):
    folder, straight = folders
    length = "--max_iters=300"
    code, stdout, stderr = finish(folder, length, moment=moment, signals=[number])
    assert code == 128 + number
    assert f"stopped at step {steps_saved(folder)[-1]}, and saved" in stdout
    assert stderr.count("saving, then stopping") == 1
    code, stdout, stderr = finish(folder, length, moment=moment, signals=NUMBERS)
    assert code in (130, 143)
    assert "ended at once, without saving" in stderr
    assert "Traceback" not in stderr
    assert finish(folder, length)[0] == 0
    assert finish(straight, length)[0] == 0
    assert content(folder) == content(straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_a_compilation_at_once(folders, number):
    folder, _ = folders
    with begin(folder, "--n_layer=48", "--compile_cache=off") as process:
        while not process.stdout.readline().startswith("jax"):
            assert process.poll() is None
        time.sleep(3)
        process.send_signal(number)
        sent_s = time.monotonic()
        stderr = process.communicate(timeout=30)[1]
    assert time.monotonic() - sent_s < 5
    assert process.returncode == 128 + number
    assert stderr.strip().endswith("ended at once, there is nothing to save")
    assert steps_saved(folder) == []


@pytest.fixture
def small_disk(folders):
    """A folder to train in whose run lies on a disk of 3 MB."""
    disk = folders[0] / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("disks can be mounted by Linux's root alone")
    yield folders[0]
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_in_a_line_and_the_run_goes_on_when_there_is_room(small_disk, folders):
    length = "--max_iters=1000"
    with begin(small_disk, length) as process:
        while not steps_saved(small_disk):
            assert process.poll() is None
            time.sleep(0.01)
        with (small_disk / "run" / "filler").open("wb", buffering=0) as filler:
            while process.poll() is None:  # what is deleted makes room again
                try:
                    filler.write(bytes(4096))
                except OSError:
                    time.sleep(0.01)
        stderr = process.stderr.read()
    assert process.returncode == 1
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search("No space left|could not be saved", errors[0])
    assert not re.search("Traceback|Exception ignored", stderr)
    assert not list(small_disk.glob("run/checkpoints/*tmp*"))
    saved = steps_saved(small_disk)
    (small_disk / "run" / "filler").unlink()
    code, stdout, stderr = finish(small_disk, length)
    assert code == 0, stderr
    assert f"going on with run from step {saved[-1]}" in stdout
    assert finish(folders[1], length)[0] == 0
    assert content(small_disk) == content(folders[1])


@pytest.mark.slow
def test_too_little_room_is_told_before_anything_is_compiled(small_disk):
    code, stdout, stderr = finish(small_disk, "--n_embd=256")
    assert code == 2
    assert "jax" not in stdout
    assert re.fullmatch(
        r"error: out_dir must have room for three checkpoints of 9\.\d MiB .*, but on the disk of "
        r"run only 3\.0 MiB are free: make room, or name another --out_dir\n",
        stderr,
    )
    assert not any((small_disk / "run").iterdir())
