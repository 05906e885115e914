"""Two real processes on this machine, two devices each: one run, as on two hosts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import ROOT, SHAPE, saved_steps

from nanogpt_jax.run.plots import read_metrics

pytestmark = pytest.mark.slow

LENGTH = "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=20", "--log_interval=5"


COUNTS, ALONE = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"), "add --num_processes 1"


def start(folder, book, *more, n_devices=1, variables=None):
    """Start train.py in a process with so many virtual devices."""
    argv = [sys.executable, str(ROOT / "train.py"), *SHAPE, *LENGTH, "--mesh="]
    argv += [f"--dataset={book}", f"--out_dir={folder}", *more]
    flags = f"--xla_force_host_platform_device_count={n_devices}"
    return subprocess.Popen(
        argv,
        env=os.environ | {"XLA_FLAGS": flags} | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
    )


def start_two(folder, book, *more, second=()):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = ("--mesh=data=2,fsdp=2", f"--coordinator_address=127.0.0.1:{port}")
    together += ("--num_processes=2", "--heartbeat_timeout_s=10", *more)
    own = ["--process_id=0"], ["--process_id=1", *second]
    return [start(folder, book, *together, *flags, n_devices=2) for flags in own]


def finish(*processes, timeout=240):
    """Return (exit code, standard output, standard error) of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


def wait_for_step(folder, step, processes):
    deadline_s = time.monotonic() + 180
    while not any(row["step"] >= step for row in read_metrics(folder)):
        assert time.monotonic() < deadline_s
        assert all(process.poll() is None for process in processes), finish(*processes)
        time.sleep(0.05)


def assert_same_losses(folder, other):
    rows, other_rows = read_metrics(folder), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows]
    for name in ("train_loss", "val_loss"):
        losses, other_losses = ([r[name] for r in rs if name in r] for rs in (rows, other_rows))
        np.testing.assert_allclose(losses, other_losses, atol=1e-5)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    words = ["the", "cat", "sat", "on", "mat", "and", "ate", "a", "rat,", "then", "it", "left.\n"]
    text = " ".join(words[(i * i + i // 7) % len(words)] for i in range(3000))[:6000]
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, book):
    """The folder of the run of one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    [(code, _, errors)] = finish(start(folder, book))
    assert code == 0, errors
    return folder


def test_two_processes_give_the_losses_of_one(tmp_path, book, alone):
    (code, out, errors), (other_code, other_out, other_errors) = finish(
        *start_two(tmp_path / "run", book)
    )
    assert (code, other_code) == (0, 0), errors + other_errors
    assert_same_losses(tmp_path / "run", alone)
    assert saved_steps(tmp_path / "run") == saved_steps(alone)
    assert "val loss" in out
    assert "val loss" not in other_out


@pytest.mark.parametrize("n_devices", [1, 4])
def test_a_signal_to_one_stops_both_and_any_machine_resumes(tmp_path, book, alone, n_devices):
    folder = tmp_path / "run"
    both = start_two(folder, book, "--max_iters=100000", "--eval_interval=20")
    wait_for_step(folder, 20, both)
    both[1].send_signal(signal.SIGTERM)
    (code, out, errors), (other_code, *_) = finish(*both)
    assert (code, other_code) == (143, 143), errors
    stopped_at = saved_steps(folder)[-1]
    assert f"stopped at step {stopped_at}" in out
    end = f"--max_iters={stopped_at + 40}"
    [(code, out, errors)] = finish(start(folder, book, end, n_devices=n_devices))
    assert code == 0, errors
    assert f"from step {stopped_at}" in out
    straight = tmp_path / "straight"
    [(code, _, errors)] = finish(start(straight, book, end))
    assert code == 0, errors
    rows, straight_rows = ({r["step"]: r for r in read_metrics(f)} for f in (folder, straight))
    for step in range(stopped_at - stopped_at % 5 + 5, stopped_at + 41, 5):
        assert rows[step]["train_loss"] == pytest.approx(
            straight_rows[step]["train_loss"], abs=1e-5
        )


@pytest.mark.parametrize("killed", [0, 1])
def test_if_one_is_killed_the_other_leaves_with_a_message(tmp_path, book, killed):
    folder = tmp_path / "run"
    both = start_two(folder, book, "--max_iters=100000")
    wait_for_step(folder, 100, both)
    both[killed].kill()
    begun_s = time.monotonic()
    (code, _, errors) = finish(*both, timeout=60)[1 - killed]
    assert time.monotonic() - begun_s < 30
    assert code not in (0, None)
    # Ours, or that of JAX's runtime, which may be the first to see it.
    assert re.search("another process of this run has died|Terminating process because", errors)
    assert saved_steps(folder)[0] >= 20


def test_flags_that_differ_are_refused(tmp_path, book):
    both = start_two(tmp_path / "run", book, second=["--seed=1"])
    for code, _, errors in finish(*both, timeout=60):
        assert code not in (0, None)
        assert "they differ in seed" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


# What is set in an interactive shell, in which only one process is started.
LAUNCHERS = {
    "srun -n4 --pty bash": {
        "SLURM_JOB_ID": "20001", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    },
    "mpirun -n 2 bash": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_process_of_several_says_for_whom_it_waits_and_hears_ctrl_c(tmp_path, book, launcher):
    variables = LAUNCHERS[launcher]
    with start(tmp_path / "run", book, variables=variables) as process:
        line = process.stdout.readline()
        count = next(f"{name}={variables[name]}" for name in COUNTS if name in variables)
        assert line == f"waiting for all processes, as {count} asks; to train alone, {ALONE}\n"
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
    [(code, _, err)] = finish(
        start(tmp_path / "run", book, "--num_processes=1", variables=variables)
    )
    assert (code, err) == (0, "")


def test_one_process_of_several_ends_in_a_line_if_nobody_comes(tmp_path, book):
    code = "from nanogpt_jax.hardware import processes; processes.JOIN_TIMEOUT_S = 3; import train;"
    code += "from nanogpt_jax.errors import run_command; run_command(train.main)"
    argv = f"--dataset={book}", f"--out_dir={tmp_path / 'run'}", "--config=tiny"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | LAUNCHERS["srun -n4 --pty bash"],
    )  # fmt: skip
    line = "error: not all processes have joined within 3 s: start all of them, or, to train alone,"
    assert (done.returncode, done.stderr) == (1, f"{line} {ALONE}\n")


def test_slurm_is_found_without_a_flag(tmp_path, book, alone):
    job = str(20_000 + os.getpid() % 4000)  # the port follows from it
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    both = [
        start(
            tmp_path / "run",
            book,
            n_devices=2,
            variables=slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]
    for code, _, errors in finish(*both):
        assert code == 0, errors
    assert_same_losses(tmp_path / "run", alone)
