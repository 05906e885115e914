"""How a command ends: one line and an exit code for what is foreseen, a traceback for the rest."""

import errno
import os
import subprocess
import sys

import pytest

ENDS = [
    ("InputError('n must be 1, got 2')", 2, "error: n must be 1, got 2"),
    ("RunError('the run ended')", 1, "error: the run ended"),
    ("MemoryError()", 1, "error: the memory does not suffice. In training take a smaller --batch_"),
    # The classes of JAX's own differ between versions; the text does not.
    ("RuntimeError('RESOURCE_EXHAUSTED: Out of memory')", 1, "error: the memory does not suffice."),
    (
        f"OSError({errno.ENOSPC}, 'No space left on device', 'out/metrics.jsonl')",
        1,
        "error: a file cannot be read or written (No space left on device: out/metrics.jsonl)",
    ),
    ("KeyboardInterrupt()", 130, ""),
]


def end_of(error):
    script = (
        "from nanogpt_jax.errors import RunError, InputError, run_command\n"
        f"def main(argv): raise {error}\n"
        "run_command(main)"
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False
    )


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=[error for error, _, _ in ENDS])
def test_what_is_foreseen_ends_in_one_line(error, code, line):
    done = end_of(error)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_an_error_of_the_program_shows_where_it_happened():
    done = end_of("KeyError('n_layer')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'n_layer'" in done.stderr
