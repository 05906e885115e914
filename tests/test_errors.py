"""How a command ends: one line and an exit code for expected errors, a traceback for bugs."""

import errno
import io
import os
import subprocess
import sys

import pytest

from nanogpt_jax import errors
from nanogpt_jax.errors import InputError, RunError, run_command

NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl")
ENDS = [
    (InputError("n must be 1, got 2"), 2, "error: n must be 1, got 2\n"),
    (InputError("n must be 1,\ngot 2\x1b"), 2, "error: n must be 1,\\ngot 2\\x1b\n"),
    (RunError("the run ended"), 1, "error: the run ended\n"),
    (MemoryError(), 1, "error: out of memory. In training, use a smaller --batch_size with more "),
    # The classes of JAX's own errors differ between versions; the text does not.
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, "error: out of memory. In training"),
    (
        NO_SPACE,
        1,
        "error: a file cannot be read or written (No space left on device: out/metrics.jsonl): "
        "free some space or use another disk\n",
    ),
    (KeyboardInterrupt(), 130, "\n"),
]


@pytest.fixture
def end_of(monkeypatch, capsys):
    """Return (exit code, standard error) of a command that raises an error or returns a code."""

    def end(outcome):
        def main(argv):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        # Ending at once would end the tests.
        monkeypatch.setattr(errors.os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as stop:
            run_command(main)
        out, err = capsys.readouterr()
        assert out == ""
        return stop.value.code, err

    return end


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=[repr(error) for error, _, _ in ENDS])
def test_an_expected_error_ends_in_one_line(end_of, error, code, line):
    returned, printed = end_of(error)
    assert returned == code
    assert printed.startswith(line)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("code", [None, 0, 143])
def test_without_an_error_a_command_ends_with_its_own_code(end_of, code):
    assert end_of(code) == (code or 0, "")


def test_a_bug_is_raised_as_it_is():
    def main(argv):
        raise KeyError("n_layer")

    with pytest.raises(KeyError):
        run_command(main)


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (
            RuntimeError("Gloo: connection closed by peer"),
            "error: another process of this run has ",
        ),
        (KeyError("n_layer"), "Traceback (most recent call last)"),
    ],
)
def test_one_of_several_processes_ends_at_once(end_of, monkeypatch, error, printed):
    """An orderly exit would wait for the others, and they for this one."""
    monkeypatch.setattr(errors, "_is_one_of_several", lambda: True)
    code, err = end_of(error)
    assert code == 1
    assert err.startswith(printed)


def test_a_reader_that_leaves_early_sees_no_error():
    """As in `python sample.py --stream | head`: like any program that SIGPIPE ends."""
    script = (
        "from nanogpt_jax.errors import run_command\n"
        "def main(argv):\n"
        "    while True: print('text')\n"
        "run_command(main)"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13


def test_a_long_message_keeps_its_ends():
    line = str(InputError("a" + 5000 * "x" + "b"))
    assert len(line) < 2100
    assert line.startswith("ax")
    assert line.endswith("xb")


def test_what_tensorstore_adds_to_its_errors_is_left_out():
    """Thousands of characters, before the remedy."""
    error = ValueError("File too large [tensorstore_spec='{...}'] [source locations='a.cc:1']\nb")
    assert errors.first_line(error) == "File too large"


def test_a_stream_that_is_no_file_is_used_as_it_comes(monkeypatch):
    """As Jupyter's, under %run."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: print("hello"))
    assert ended.value.code == 0
    assert sys.stdout.getvalue() == "hello\n"
