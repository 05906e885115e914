"""Files that are written as a whole or not at all, and folders that one process has. No JAX."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_JSON_BYTES = 2**24  # what Python makes of a file takes twenty times its size


def read_text(path: Path, most_bytes: int) -> str:
    """Return the text of a file that is not large.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not in UTF-8, or larger than most_bytes.
    """
    with Path(path).open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return content.decode("utf-8")


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Return what a JSON file holds; raises as `read_text` and `loads` do."""
    return loads(read_text(path, most_bytes))


def loads(text: str) -> Any:
    """Return what a JSON text says, each name in it once.

    Raises:
        ValueError: it is no JSON.
    """

    def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name comes twice in it")
        return found

    def refuse(word: str) -> None:  # Python would read them
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=named_once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that no half of it is ever taken for the whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def delete_partials(folder: Path) -> None:
    """Delete what processes that were killed left of files which they wrote as a whole."""
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as a whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Bring names onto the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, if_taken: Callable[[], None]) -> Iterator[None]:
    """Keep other processes from a folder that is there; do nothing where there are no locks.

    Args:
        if_taken: called where another process has it, which is then waited for, unless this raises.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if_taken()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
