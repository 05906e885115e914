"""Whether a folder can lie where it is asked for, said before anything is made. No JAX."""

import contextlib
import errno
import os
from pathlib import Path

from nanogpt_jax.errors import InputError

LONGEST_NAME = 255  # bytes, in all usual file systems


def check_writable(folder: Path) -> None:
    """Check that a folder can be made or written, without making it.

    Raises:
        InputError: see `check_place`; its place is read-only; or Orbax cannot work there.
    """
    existing = check_place(folder, "out_dir")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"out_dir must be writable, but {existing} is not")
    path = str(folder.absolute())
    if any("\ud800" <= character <= "\udfff" for character in path):  # bytes that are no text
        raise InputError(
            f"out_dir must be UTF-8, but is {path} (with PYTHONUTF8=1 in front Python reads what "
            "another locale does not)"
        )
    if any(character in path for character in "*?["):
        # Orbax looks for what it saved by the whole path as a pattern, and would not find it.
        raise InputError(f"out_dir must have no * ? or [ in its whole path, but is {path}")


def check_place(folder: Path, name: str) -> Path:
    """Return the deepest place that is there on the way to a folder.

    Args:
        name: the field that names the folder, for the message.

    Raises:
        InputError: it is a file, lies below one, or no folder can have such a path.
    """
    place = folder.absolute()
    try:
        if max(len(os.fsencode(part)) for part in place.parts) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place / "/".join(5 * [50 * "_"]))  # room for what will lie in it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} must be the path of a folder, but {folder}: {reason}") from None
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = "a file" if place.exists() else "a link to nowhere"
        raise InputError(f"{name} must be a folder, but {place} is {what}")
    return place
