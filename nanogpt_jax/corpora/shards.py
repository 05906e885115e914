"""The files of a prepared folder: `meta.json`, and token files of bounded size as they grow.

A shard grows under the name `.partial` and is renamed when it is complete and on disk. A split that
fits into one is nanoGPT's `train.bin`; a larger one is `train_00000.bin`, `train_00001.bin`, ...
"""

import contextlib
import os
import re
import zlib
from pathlib import Path

import numpy as np

from nanogpt_jax.config import SPLITS
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.files import read_json, sync_folder

PROGRESS = "progress.json"  # exists while the preparation is unfinished
SHARD_TOKENS = 100_000_000  # 200 MB
_TOKEN_FILE = re.compile(r"(train|val)(_\d{5})?\.bin(\.\d+)?(\.partial)?")


def read_meta(folder: Path) -> dict:
    """Read a folder's meta.json; return {} if there is none, refuse names outside the folder."""
    path = folder / "meta.json"
    if not path.exists():
        return {}
    with reading(path, "a JSON file"):
        loaded = read_json(path)
    if not isinstance(loaded, dict) or loaded.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise InputError(f'{path}: must be like {{"dtype": "uint16"}} or "uint32": correct it')
    for name in ("vocab_size", "train_tokens", "val_tokens"):
        if name in loaded and not (_is_count(loaded[name]) and loaded[name] > 0):
            raise InputError(
                f"{path}: {name} must be a number above 0, got {loaded[name]!r}: correct it"
            )
    if "splits" in loaded and not all(
        lists_files(loaded["splits"], split, "crc32") and loaded["splits"][split]["files"]
        for split in SPLITS
    ):
        raise InputError(
            f"{path}: splits must list the files of train and val, as data/prepare.py writes it: "
            "delete the folder and prepare it again"
        )
    return loaded


def _is_count(value, below: int = 2**63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def lists_files(splits, split: str, *counts: str) -> bool:
    """Return whether an entry of meta.json or progress.json lists files in the folder, and counts.

    Any file may have been changed by hand, or come from somebody else.
    """
    try:
        entry = splits[split]
        return all(_is_count(entry[name], 2**32) for name in counts) and all(
            re.fullmatch(rf"{split}(_[0-9]{{5}})?\.bin", file["name"]) and _is_count(file["tokens"])
            for file in entry["files"]
        )
    except (KeyError, TypeError, IndexError):
        return False


def has_tokens(folder: Path) -> bool:
    """Return whether a folder has token files of any kind."""
    names = (f"{split}{ending}.bin" for split in SPLITS for ending in ("", "_00000"))
    return any((folder / name).exists() for name in names)


def is_foreign(folder: Path) -> bool:
    """Return whether a folder has token files that this program did not make.

    The meta.json of those that it made names their source; any other field may be the user's.
    """
    if not has_tokens(folder) or (folder / PROGRESS).exists():
        return False
    return not {"source_sha256", "source_stat"} & read_meta(folder).keys()


def check_finished(folder: Path) -> None:
    """Refuse a folder whose preparation has begun but not finished."""
    if (folder / PROGRESS).exists():
        raise InputError(
            f"{folder} is incomplete: run the same data/prepare.py command to finish it"
        )


def written(folder: Path) -> list[Path]:
    """Return all token files of a folder, complete and partial."""
    return [path for path in folder.iterdir() if _TOKEN_FILE.fullmatch(path.name)]


def files_of(folder: Path, split: str, meta: dict) -> list[dict]:
    """Return the name, and if meta.json has them the tokens and crc32, of each file of a split."""
    if "splits" in meta:
        return meta["splits"][split]["files"]
    whole = folder / f"{split}.bin"
    shards = [] if whole.exists() else sorted(folder.glob(f"{split}_[0-9]*.bin"))
    if shards:
        return [{"name": path.name} for path in shards]
    size = f"{split}_tokens"
    return [{"name": whole.name} | ({"tokens": meta[size]} if size in meta else {})]


def are_complete(folder: Path, meta: dict) -> bool:
    """Return whether every file in meta.json exists with its size, and none is in progress."""
    if (folder / PROGRESS).exists():
        return False
    width = np.dtype(meta.get("dtype", "uint16")).itemsize
    files = [file for split in SPLITS for file in files_of(folder, split, meta)]
    return all(_size(folder / file["name"]) == file.get("tokens", -1) * width for file in files)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


class ShardWriter:
    """The shards of one split as they grow, from where a journal says they are."""

    def __init__(self, folder: Path, split: str, journal: dict):
        self._folder, self._split, self._shard_tokens = folder, split, journal["shard_tokens"]
        self._dtype = np.dtype(journal["dtype"]).newbyteorder("<")
        start = {"files": [], "open_tokens": 0, "open_crc32": 0, "crc32": 0}
        state = journal["splits"][split] or start
        self.files = list(state["files"])
        self._open_tokens, self._open_crc32 = state["open_tokens"], state["open_crc32"]
        self._crc32 = state["crc32"]  # of the whole split
        self._file = self._partial.open("r+b" if self._partial.exists() else "w+b")
        self._file.truncate(self._open_tokens * self._dtype.itemsize)
        self._file.seek(0, os.SEEK_END)

    @staticmethod
    def recover(folder: Path, split: str, journal: dict) -> bool:
        """Restore the files to what a journal says; return whether that is possible."""
        state, width = journal["splits"][split], np.dtype(journal["dtype"]).itemsize
        names = [file["name"] for file in state["files"]]
        if any(_size(folder / f["name"]) != f["tokens"] * width for f in state["files"]):
            return False
        still_open = f"{split}_{len(names):05d}.bin"
        partial = folder / f"{still_open}.partial"
        # It may have been completed, and renamed, since.
        for name in (still_open, *([f"{split}.bin"] if not names else [])):
            if not partial.exists() and (folder / name).exists():
                (folder / name).replace(partial)
        for path in folder.glob(f"{split}*.bin*"):
            if _TOKEN_FILE.fullmatch(path.name) and path.name not in (*names, partial.name):
                path.unlink()
        return (_size(partial) or 0) >= state["open_tokens"] * width

    @property
    def _partial(self) -> Path:
        return self._folder / f"{self._split}_{len(self.files):05d}.bin.partial"

    @property
    def n_tokens(self) -> int:
        """All tokens of the split so far."""
        return sum(file["tokens"] for file in self.files) + self._open_tokens

    def append(self, ids: np.ndarray) -> None:
        """Write ids of shape (n,) after those that are there."""
        while len(ids):
            if self._open_tokens == self._shard_tokens:  # not before: it may be the only shard
                self._complete(f"{self._split}_{len(self.files):05d}.bin")
                self._file = self._partial.open("w+b")
            part = ids[: self._shard_tokens - self._open_tokens]
            content = part.astype(self._dtype).tobytes()
            self._file.write(content)
            self._open_crc32 = zlib.crc32(content, self._open_crc32)
            self._crc32 = zlib.crc32(content, self._crc32)
            self._open_tokens += len(part)
            ids = ids[len(part) :]

    def sync(self) -> dict:
        """Flush everything to disk; return the state to continue from."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {
            "files": self.files,
            "open_tokens": self._open_tokens,
            "open_crc32": self._open_crc32,
            "crc32": self._crc32,
        }

    def finish(self) -> dict:
        """Complete the last shard; return the split's entry in meta.json."""
        several = f"{self._split}_{len(self.files):05d}.bin"
        self._complete(several if self.files else f"{self._split}.bin")
        return {"tokens": self.n_tokens, "crc32": self._crc32, "files": self.files}

    def _complete(self, name: str) -> None:
        self.sync()
        self._file.close()
        self._partial.replace(self._folder / name)
        sync_folder(self._folder)
        entry = {"name": name, "tokens": self._open_tokens, "crc32": self._open_crc32}
        self.files = [*self.files, entry]
        self._open_tokens = self._open_crc32 = 0

    def close(self) -> None:
        """Close the file as it is."""
        with contextlib.suppress(OSError):  # a full disk: the state on disk does not count the rest
            self._file.close()
