"""Runs in processes of their own that are killed, stopped, or run out of disk."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    MOMENTS,
    assert_same_run,
    command,
    finish,
    numbers,
    saved_steps,
    spawn,
    start,
    write_dataset,
    write_tokenizer,
)

from nanogpt_jax.run.signals import NUMBERS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("data") / "letters")
    write_tokenizer(folder)
    return folder


def killed(folder: Path, argv: list[str], moment: str) -> None:
    """Train in a process of its own until it is killed at a moment of its next save."""
    code, stdout, stderr = finish(*argv, cwd=folder.parent, moment=moment, signals=[signal.SIGKILL])
    assert code == -signal.SIGKILL, (moment, stdout, stderr)


def metadata(folder: Path) -> list[dict]:
    """Return what each checkpoint says about itself: step, loss, every array's checksum."""
    found = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*/facts/*data")]
    return sorted(found, key=lambda checkpoint: checkpoint["step"])


def assert_same(folder: Path, straight: Path) -> None:
    """Check that two runs are equal, bit for bit, however often one was interrupted."""
    assert_same_run(folder, straight)
    assert metadata(folder) == metadata(straight)


@pytest.mark.slow
def test_a_run_killed_inside_a_save_resumes_bit_for_bit(dataset, tmp_path):
    """At its worst moment."""
    folder, straight, length = tmp_path / "run", tmp_path / "straight", "--max_iters=24"
    killed(folder, command(folder, dataset, length), "in the middle of the removal")
    assert 0 < saved_steps(folder)[-1] < 24
    assert start(folder, dataset, length) == 0
    assert not list(folder.glob("checkpoints/*tmp*"))
    assert start(straight, dataset, length) == 0
    assert_same(folder, straight)


@pytest.mark.slow
def test_a_run_killed_25_times_ends_bit_for_bit_as_one_that_was_never_killed(dataset, tmp_path):
    folder, straight = tmp_path / "run", tmp_path / "straight"
    longer = "--max_iters=2400", "--eval_interval=20", "--log_interval=5"
    argv = command(folder, dataset, *longer)
    for moment in MOMENTS:
        killed(folder, argv, moment)
    rng = random.Random(0)
    for i in range(25 - len(MOMENTS)):
        seen = (folder / "metrics.jsonl").stat().st_mtime_ns
        with spawn(*argv, cwd=tmp_path) as process:
            if i % 4:  # anywhere in the run; else anywhere in the first seconds, of starting
                while (folder / "metrics.jsonl").stat().st_mtime_ns == seen:
                    assert process.poll() is None, process.communicate()
                    time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6 if i % 4 else 5))
            process.kill()
        assert process.returncode == -signal.SIGKILL, "the run is too short for 25 kills"
    code, stdout, stderr = finish(*argv, cwd=tmp_path)
    assert code == 0, stderr
    assert f"resuming {folder} from step" in stdout
    assert not list(folder.glob("checkpoints/*tmp*"))
    assert start(straight, dataset, *longer) == 0
    assert_same(folder, straight)
    assert [row["step"] for row in numbers(folder)] == list(range(0, 2401, 5))


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("moment", ["inside a save", "in the middle of the removal"])
def test_a_signal_during_a_save_lets_it_finish_but_a_second_one_does_not(
    dataset, tmp_path, moment, number
):
    folder, straight, length = tmp_path / "run", tmp_path / "straight", "--max_iters=300"
    argv = command(folder, dataset, length)
    code, stdout, stderr = finish(*argv, cwd=tmp_path, moment=moment, signals=[number])
    assert code == 128 + number
    assert f"stopped at step {saved_steps(folder)[-1]} and saved" in stdout
    assert stderr.count("saving, then stopping") == 1
    code, stdout, stderr = finish(*argv, cwd=tmp_path, moment=moment, signals=NUMBERS)
    assert code in [128 + each for each in NUMBERS]  # the second, whichever comes first
    assert "ended at once, without saving" in stderr
    assert "Traceback" not in stderr
    assert start(folder, dataset, length) == 0
    assert start(straight, dataset, length) == 0
    assert_same(folder, straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_a_compilation_at_once(dataset, tmp_path, number):
    folder = tmp_path / "run"
    argv = command(folder, dataset, "--n_layer=48", "--compile_cache=off")
    with spawn(*argv, cwd=tmp_path) as process:
        while not process.stdout.readline().startswith("jax"):
            assert process.poll() is None
        time.sleep(3)
        process.send_signal(number)
        sent_s = time.monotonic()
        stderr = process.communicate(timeout=30)[1]
    assert time.monotonic() - sent_s < 5
    assert process.returncode == 128 + number
    assert stderr.strip().endswith("ended at once, there is nothing to save")
    assert saved_steps(folder) == []


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a run, on a disk of 3 MB."""
    disk = tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only Linux's root can mount disks")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_resumes_when_there_is_room(
    small_disk, dataset, tmp_path
):
    length = "--max_iters=1000", "--eval_interval=50"
    with spawn(*command(small_disk, dataset, *length), cwd=tmp_path) as process:
        while not saved_steps(small_disk):
            assert process.poll() is None
            time.sleep(0.01)
        with (small_disk / "filler").open("wb", buffering=0) as filler:
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
    assert not list(small_disk.glob("checkpoints/*tmp*"))
    saved = saved_steps(small_disk)
    (small_disk / "filler").unlink()
    code, stdout, stderr = finish(*command(small_disk, dataset, *length), cwd=tmp_path)
    assert code == 0, stderr
    assert f"resuming {small_disk} from step {saved[-1]}" in stdout
    assert start(tmp_path / "straight", dataset, *length) == 0
    assert_same(small_disk, tmp_path / "straight")


def test_too_little_room_is_reported_before_anything_is_compiled(small_disk, dataset, tmp_path):
    code, stdout, stderr = finish(
        *command(small_disk, dataset, "--n_embd=256"), cwd=tmp_path, timeout=60
    )
    assert code == 2
    assert "jax" not in stdout
    assert re.fullmatch(
        r"error: out_dir must have room for three checkpoints of 9\.\d MiB .*, but the disk of "
        r".*run has only 3\.0 MiB free: make room, or choose another --out_dir\n",
        stderr,
    )
    assert not any(small_disk.iterdir())
