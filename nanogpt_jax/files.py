"""Files that are written as a whole or not at all, and folders that one process has. No JAX."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanogpt_jax.errors import InputError, first_line

LONGEST_NAME = 255  # bytes, in all usual file systems
HUB_TIMEOUT_S = 10
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


def download_from_hub(repository: str, file: str, remedy: str, flag: str) -> Path:
    """Return the local path of a file of the Hugging Face Hub, downloading it if it is not cached.

    Args:
        repository: like "openai-community/gpt2".
        remedy: what to save by hand, for the message, like "save tokenizer.json".
        flag: the flag that takes the folder or file saved by hand.

    Raises:
        InputError: it cannot be downloaded.
    """
    import huggingface_hub  # slow to import

    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
        # The download alone would retry for half a minute; this asks once.
        url = huggingface_hub.hf_hub_url(repository, file)
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        huggingface_hub.utils.logging.set_verbosity_error()
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:  # its type differs between versions of the library and its clients
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"{file} could not be downloaded ({reason}): {remedy} from "
            f"https://huggingface.co/{repository} in a folder and pass {flag}"
        ) from None
