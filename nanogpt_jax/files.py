"""Atomic file writes, locks on folders, and checks of a path before anything is created."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from nanogpt_jax.errors import InputError, first_line

LOCK = ".in_use.lock"  # in a folder that is locked
MAX_NAME_BYTES = 255  # in all common file systems
MAX_JSON_BYTES = 2**24  # parsed, a file takes twenty times its size
HUB_TIMEOUT_S = 10
Item = TypeVar("Item")


def read_text(path: Path, max_bytes: int) -> str:
    """Return a file's text; raises OSError, or ValueError if it is too large or not UTF-8."""
    with Path(path).open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes >> 20} MiB")
    return content.decode("utf-8-sig")  # Notepad writes a byte order mark


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file; raises as `read_text` and `loads` do."""
    return loads(read_text(path, max_bytes))


def loads(text: str) -> Any:
    """Parse JSON; ValueError also for a repeated name, NaN, Infinity, and too much nesting."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("it contains a name twice")
        return content

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not valid JSON")

    try:
        return json.loads(text, object_pairs_hook=without_repeats, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def write_atomically(path: Path, content: bytes | memoryview | Iterator[bytes]) -> None:
    """Write a file under a temporary name and rename it, so that readers never see half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for piece in content if isinstance(content, Iterator) else [content]:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def delete_partials(folder: Path) -> None:
    """Delete the temporary files that killed processes left behind."""
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush new names in a folder to the disk, if the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_ahead(items: Iterator[Item], ahead: int) -> Generator[Item]:
    """Yield items; a thread reads the next few meanwhile. None of them may be None.

    By hand, since a library's loader carries an iterator's state, which would have to be saved.
    """
    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        pending = [pool.submit(next, items, None) for _ in range(ahead)]
        while (item := pending.pop(0).result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def locked(folder: Path, if_taken: Callable[[], None], is_beside: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder, which is made; afterwards remove it if it is empty.

    If another process has the lock, call `if_taken` and, unless that raises, wait. The system frees
    the lock of a process that dies. On a file system without locks, only make the folder.

    Args:
        is_beside: the lock is next to the folder, which need not exist, and stays there.
    """
    import filelock  # with asyncio: slow to import

    path = folder.with_name(f".{folder.name}.lock") if is_beside else folder / LOCK
    lock, wait = filelock.FileLock(path), False
    try:
        while not lock.is_locked:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=wait)
            except filelock.Timeout:
                if_taken()
                wait = True
            except (FileExistsError, FileNotFoundError):  # not a folder, or removed just now
                check_place(path.parent, "the path")
            except (OSError, NotImplementedError):
                if not path.parent.is_dir():
                    raise
                break  # no locks here
        yield
    finally:
        if lock.is_locked:
            remove = folder.rmdir if is_beside else path.unlink  # before another has the lock
            with contextlib.suppress(OSError):  # on Windows, release() removes the file
                remove()
            lock.release()
        if not is_beside:
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_writable(folder: Path) -> None:
    """Check, without creating it, that out_dir can be created or written and suits Orbax."""
    existing = check_place(folder, "out_dir")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"out_dir must be writable, but {existing} is not: name another --out_dir")
    path = str(folder.absolute())
    if any("\ud800" <= character <= "\udfff" for character in path):  # bytes that are not text
        raise InputError(f"out_dir must be UTF-8, but is {path}: rename it or set PYTHONUTF8=1")
    if any(character in path for character in "*?["):
        # Orbax uses the whole path as a pattern to find what it saved, and would not find it.
        raise InputError(f"out_dir must be a path without * ? and [, but is {path}: name another")


def check_place(folder: Path, name: str) -> Path:
    """Return the deepest existing folder on the way to a folder, whose field is `name`.

    Raises InputError if that is a file, or no folder can have such a path.
    """
    place = folder.absolute()
    try:
        if max(len(os.fsencode(part)) for part in place.parts) > MAX_NAME_BYTES:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place / "/".join(5 * [50 * "_"]))  # room for the files that it will contain
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} must be the path of a folder, but {folder}: {reason}") from None
    existing = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "a file" if existing.exists() else "a broken link"
        raise InputError(f"{name} must be a folder, but {existing} is {what}: name another")
    return existing


def download_from_hub(repository: str, revision: str, file: str, remedy: str, flag: str) -> Path:
    """Return the local path of a file of the Hugging Face Hub, downloading it unless it is cached.

    If that fails, the error names the remedy, like "save tokenizer.json", and the flag to pass.
    """
    import huggingface_hub as hub  # slow to import

    try:
        cached = hub.try_to_load_from_cache(repository, file, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        # The download alone would retry for half a minute; this asks once.
        url = hub.hf_hub_url(repository, file, revision=revision)
        hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        hub.utils.logging.set_verbosity_error()
        return Path(hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # the type depends on the versions of the library and its clients
        raise InputError(
            f"{file} could not be downloaded ({first_line(error).rstrip('.')}): {remedy} from "
            f"https://huggingface.co/{repository} in a folder and pass {flag}"
        ) from None
