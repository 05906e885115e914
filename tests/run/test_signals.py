"""The first signal asks, the second ends; if there is nothing to save, the first one ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from nanogpt_jax.run.signals import NUMBERS, SAME_S, StopSignals

NAMES = [signal.Signals(number).name for number in NUMBERS]


def test_the_first_signal_is_noted_and_reported(capfd):
    with StopSignals() as stop:
        stop.may_save = True
        assert stop.number == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert capfd.readouterr().err.strip().startswith("SIGTERM: saving, then stopping")


def test_afterwards_signals_are_heard_as_before():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopSignals():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_run_whose_terminal_is_gone_saves_and_resumes(run, tmp_path, book):
    """The ssh connection drops: SIGHUP, and whatever is written fails."""
    import pty

    argv = (
        f"--dataset={book}",
        "--config=tiny",
        "--max_iters=100000",
        f"--out_dir={tmp_path / 'run'}",
    )
    terminal, inside = pty.openpty()
    # A process that takes it as its terminal, and becomes train.py.
    take = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    take += "; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whatever the tests ignore
    process = subprocess.Popen(
        [sys.executable, "-c", f"{take}; os.execv(sys.executable, sys.argv[1:])",
         sys.executable, ROOT / "train.py", *argv],
        stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    shown = b""
    while b"first step done" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(60) == 128 + signal.SIGHUP
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert any(int(name) > 0 for name in saved if name.isdigit())


def test_another_signal_stops_nothing():
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(0.1)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGUSR1, before)


# Minutes in C without the interpreter's lock, as compilations are: no handler runs meanwhile.
BUSY = "import hashlib; print('busy', flush=True); hashlib.pbkdf2_hmac('md5', b'', b'', 2**31 - 1)"


@contextlib.contextmanager
def started(may_save, then):
    """A process that hears all signals, whatever the tests ignore; at the end it is killed."""
    script = f"""
import signal
from nanogpt_jax.run.signals import StopSignals
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with StopSignals() as stop:
    stop.may_save = {may_save}
    {then}
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "busy\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", NUMBERS, ids=NAMES)
def test_before_there_is_something_to_save_one_signal_ends_even_a_compilation(number):
    with started(False, BUSY) as process:
        process.send_signal(number)
        stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    name = signal.Signals(number).name
    assert stderr.strip() == f"{name}: ended at once, there is nothing to save"


@pytest.mark.parametrize("number", NUMBERS, ids=NAMES)
def test_a_second_signal_ends_at_once(number):
    with started(True, BUSY) as process:
        process.send_signal(signal.SIGINT)
        while "saving" not in process.stderr.readline():
            pass
        assert process.poll() is None
        time.sleep(2 * SAME_S)
        os.kill(process.pid, number)
        stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    assert "ended at once, without saving" in stderr


def test_a_signal_that_comes_twice_at_once_is_one():
    """To the whole group of processes, and passed on by the one that started this."""
    with started(True, BUSY) as process:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        time.sleep(2 * SAME_S)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_a_signal_is_heard_though_nobody_reads_the_message():
    """As in `train.py 2>&1 | tee log`, where tee gets it too."""
    with started(False, BUSY) as process:
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
