"""What is told in one line, wrong input or a fault, and how a command answers it."""

import contextlib
import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

MOST_CHARS = 2000  # of a message, which may quote a whole file
# What a terminal obeys or a reader takes for the end of a line, and halves of characters.
CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str, keep: str = "") -> str:
    """Return a text with its control characters as escapes, like \\x1b, but for those to keep."""

    def escape(found: re.Match) -> str:
        return found[0] if found[0] in keep else ascii(found[0])[1:-1]

    return CONTROLS.sub(escape, text)


class UserError(Exception):
    """What is told in one line, whatever it quotes of a flag, a file or another library."""

    def __str__(self) -> str:
        line, most = visible(super().__str__()), MOST_CHARS
        return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


class InputError(UserError, ValueError):
    """Wrong input: what was required, what came, what to do."""


class RunError(UserError, RuntimeError):
    """What befell a run whose input was right, and what to do."""


@contextlib.contextmanager
def reading(path, requirement: str) -> Iterator[None]:
    """Answer whatever goes wrong while a file is read and understood with one line.

    Args:
        requirement: what the file must be, like "a JSON file".

    Raises:
        InputError: naming the file, and what went wrong.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    # A foreign file can bring any of them about; a panic of Rust's is no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: must be {requirement}, but {reason}") from None


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, in a line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" with the closest of `known`, or "" where nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


# Of a file that was opened, or could have been a moment ago: no error of this program.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

# What JAX's backends say when another process of the run is gone.
PEER_DIED = re.compile(
    r"Gloo|NCCL|UNAVAILABLE|coordination service|heartbeat|by peer|DEADLINE_EXCEEDED"
)


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's `main(argv)` and exit: 0 done, 2 wrong input, 1 a fault.

    Either in one line; only what nobody foresaw, an error of this program, shows its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows could not take every character
        # By lines also into a file: a signal that ends the process at once loses none.
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except InputError as error:
        _leave(2, f"error: {error}")
    except RunError as error:
        _leave(1, f"error: {error}", at_once=True)  # in an orderly exit Orbax tells of it again
    except KeyboardInterrupt:
        # SIGINT; an orderly exit crashes where JAX still compiles in a thread.
        _leave(128 + 2, "", at_once=True)
    except BrokenPipeError:  # the reader left, as in `python sample.py --stream | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(128 + 13)  # SIGPIPE
    except Exception as error:
        # The class differs between versions of JAX, the text does not.
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            _leave(
                1,
                "error: the memory does not suffice. In training take a smaller --batch_size with "
                "more --gradient_accumulation_steps, --remat, a larger --loss_chunks, or a --dtype "
                "of 16 bits; in sampling fewer --num_samples or --stream",
            )
        elif isinstance(error, OSError) and error.errno in DISK_FAULTS:
            where = f": {error.filename}" if error.filename else ""
            _leave(1, f"error: a file cannot be read or written ({error.strerror}{where})")
        elif _is_one_of_several() and PEER_DIED.search(str(error)):
            _leave(
                1,
                "error: another process of this run is gone. Start all of them again: they go on "
                f"from the newest checkpoint ({first_line(error)})",
            )
        elif _is_one_of_several():
            _leave(1, traceback.format_exc())
        else:
            raise


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave(code: int, message: str | None = None, at_once: bool = False) -> None:
    if message is not None:
        print(message, file=sys.stderr)
    if at_once or _is_one_of_several():
        # An orderly exit would wait for the other processes, and they for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
