"""User-facing errors, each one line, and the exit codes of the commands."""

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

MAX_CHARS = 2000  # of a message, which may quote a whole file
# Characters that a terminal obeys or that end a line, and halves of surrogate pairs.
CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # no bugs
# What JAX's backends report when another process of the run has died.
PEER_DIED = re.compile(
    r"Gloo|NCCL|UNAVAILABLE|coordination service|heartbeat|by peer|DEADLINE_EXCEEDED"
)

# JAX's settings to debug with that optax, or a step compiled ahead, cannot obey, and what JAX says.
UNSUPPORTED = {
    "JAX_DISABLE_JIT=1": "Disable jit is not supported",
    "JAX_NUMPY_DTYPE_PROMOTION=strict": "promotion=strict",
    "JAX_TRANSFER_GUARD=disallow": "Disallowed host-to-device transfer",
}


class UserError(Exception):
    """An error that is printed as one line, whatever it quotes."""

    def __str__(self) -> str:
        line, half = visible(super().__str__()), MAX_CHARS // 2
        return line if len(line) <= MAX_CHARS else f"{line[:half]} ... {line[-half:]}"


class InputError(UserError, ValueError):
    """Wrong input: the message names requirement, value and remedy."""


class RunError(UserError, RuntimeError):
    """A failure during a run whose input was right: the message says what to do."""


def visible(text: str, keep: str = "") -> str:
    """Return a text with control characters escaped, like \\x1b, except those to keep."""
    return CONTROLS.sub(lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, without TensorStore's details."""
    line = (str(error).strip() or repr(error)).splitlines()[0]
    return re.split(r" \[(?:tensorstore_spec|source locations)", line)[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" with the closest of `known`, or "" if none is close."""
    close = difflib.get_close_matches(word, list(known), n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


@contextlib.contextmanager
def reading(path, requirement: str) -> Iterator[None]:
    """Turn any error of reading a file into an InputError: it must be, say, "a JSON file"."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except BaseException as error:  # a panic in Rust code is not an Exception
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: must be {requirement}, but {reason}") from None


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(argv)` and exit: 0 done, 2 wrong input, 1 other errors, 128 + signal.

    An expected error is printed as one line. Only a bug shows a traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&- in a shell
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # UTF-8 also in a Windows pipe; line by line, so that a kill loses no output.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except BrokenPipeError:  # the reader left, as in `python sample.py --stream | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        code, at_once = 128 + 13, False  # SIGPIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code, at_once = 128 + 2, True  # SIGINT
    except Exception as error:
        line = _explanation(error)
        if line is None and not _is_one_of_several():
            raise
        print(traceback.format_exc() if line is None else f"error: {line}", file=sys.stderr)
        code, at_once = 2 if isinstance(error, InputError) else 1, isinstance(error, RunError)
    if at_once or _is_one_of_several():
        # An orderly exit would wait for the other processes, repeat Orbax's error, or crash in a
        # thread that is still compiling.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _explanation(error: Exception) -> str | None:
    """Return the line to print for an expected error, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    # JAX's error class differs between versions, the text does not.
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of memory. In training, use a smaller --batch_size with more "
            "--gradient_accumulation_steps, --remat, more --loss_chunks, or a 16-bit --dtype; in "
            "sampling, fewer --num_samples or --stream"
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        where = f": {error.filename}" if error.filename else ""
        return (
            f"a file cannot be read or written ({error.strerror}{where}): free some space or use "
            "another disk"
        )
    for setting, words in UNSUPPORTED.items():
        if words in str(error):
            return f"{setting} does not work with this command: unset it; JAX_DEBUG_NANS=1 works"
    if _is_one_of_several() and PEER_DIED.search(str(error)):
        return (
            "another process of this run has died. Restart all of them: they resume from the "
            f"newest checkpoint ({first_line(error)})"
        )
    return None


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
