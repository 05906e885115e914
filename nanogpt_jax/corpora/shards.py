"""The files of a prepared folder: `meta.json`, and token files of bounded size.

A split that fits into one file is nanoGPT's `train.bin`; a larger one is `train_00000.bin`,
`train_00001.bin`, ... Which file a token belongs to follows from its number in the split.
"""

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
        _lists_files(loaded["splits"], split) and loaded["splits"][split]["files"]
        for split in SPLITS
    ):
        raise InputError(
            f"{path}: splits must list the files of train and val, as data/prepare.py writes it: "
            "delete the folder and prepare it again"
        )
    return loaded


def _is_count(value, below: int = 2**63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _lists_files(splits, split: str) -> bool:
    """Return whether meta.json, which may come from anybody, lists a split's files properly."""
    try:
        entry = splits[split]
        return _is_count(entry["crc32"], 2**32) and all(
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


def files_of(folder: Path, split: str, meta: dict) -> dict[Path, int | None]:
    """Return the files of a split, in their order, and their tokens if meta.json says so."""
    if "splits" in meta:
        return {folder / file["name"]: file["tokens"] for file in meta["splits"][split]["files"]}
    whole = folder / f"{split}.bin"
    shards = [] if whole.exists() else sorted(folder.glob(f"{split}_[0-9]*.bin"))
    return dict.fromkeys(shards) or {whole: meta.get(f"{split}_tokens")}


def are_complete(folder: Path, meta: dict) -> bool:
    """Return whether every file in meta.json exists with its size, and none is in progress."""
    if (folder / PROGRESS).exists():
        return False
    width = np.dtype(meta.get("dtype", "uint16")).itemsize
    files = [file for split in SPLITS for file in files_of(folder, split, meta).items()]
    return all(n is not None and _size(path) == n * width for path, n in files)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def cut_back(folder: Path, journal: dict) -> bool:
    """Cut the token files back to the tokens in a journal; return False if they have fewer."""
    width, n_shard, kept = np.dtype(journal["dtype"]).itemsize, journal["shard_tokens"], set()
    for split, n_tokens in journal["tokens"].items():
        for begin in range(0, n_tokens, n_shard):
            path, n_bytes = _shard(folder, split, begin // n_shard), min(n_shard, n_tokens - begin)
            if (_size(path) or 0) < n_bytes * width:
                return False
            os.truncate(path, n_bytes * width)
            kept.add(path)
    for path in {*written(folder)} - kept:
        path.unlink()
    return True


def append(folder: Path, split: str, n_tokens: int, ids: np.ndarray, shard_tokens: int) -> None:
    """Write ids after the n_tokens that a split has."""
    while len(ids):
        room = shard_tokens - n_tokens % shard_tokens
        with _shard(folder, split, n_tokens // shard_tokens).open("ab") as file:
            file.write(ids[:room].tobytes())
        n_tokens, ids = n_tokens + room, ids[room:]


def sync(folder: Path, before: dict, after: dict, shard_tokens: int) -> None:
    """Flush to the disk the files that grew from so many tokens of each split to so many."""
    for split, n_tokens in after.items():
        for i in range(before[split] // shard_tokens, -(-n_tokens // shard_tokens)):
            with _shard(folder, split, i).open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def finish(folder: Path, split: str, journal: dict) -> dict:
    """Give the files of a split their final names; return its entry in meta.json."""
    n_tokens = journal["tokens"][split]
    paths = [_shard(folder, split, i) for i in range(-(-n_tokens // journal["shard_tokens"]))]
    if len(paths) == 1:
        paths = [paths[0].replace(folder / f"{split}.bin")]
        sync_folder(folder)
    entries, whole = [], 0
    for path in paths:
        crc32 = 0
        with path.open("rb") as file:
            while content := file.read(2**24):
                crc32, whole = zlib.crc32(content, crc32), zlib.crc32(content, whole)
            n = file.tell() // np.dtype(journal["dtype"]).itemsize
        entries.append({"name": path.name, "tokens": n, "crc32": crc32})
    return {"tokens": n_tokens, "crc32": whole, "files": entries}


def _shard(folder: Path, split: str, i: int) -> Path:
    """Return the path of the i-th file; the first may have got its final name already."""
    whole = folder / f"{split}.bin"
    return whole if i == 0 and whole.exists() else folder / f"{split}_{i:05d}.bin"
