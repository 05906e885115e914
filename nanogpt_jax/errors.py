"""The one error that means "the user's input cannot be used", and how a command answers it."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """One line for the user: what was required, what came, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" with the closest of `known`, or "" where nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's `main(argv)` and exit: 0 done, 2 wrong input (one line, no traceback)."""
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows could not take every character
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + 2)  # SIGINT; an orderly exit crashes where JAX still compiles in a thread
    except BrokenPipeError:  # the reader left, as in `python sample.py --stream | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE
    except Exception as error:
        # The class differs between versions of JAX, the text does not.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            "error: the device's memory does not suffice. In training take a smaller --batch_size "
            "with more --gradient_accumulation_steps, in sampling fewer --num_samples or --stream",
            file=sys.stderr,
        )
        sys.exit(1)
