"""The files of a prepared folder: `meta.json`, token files, and the parts that become those.

A split that fits into one file is nanoGPT's `train.bin`; a larger one is `train_00000.bin`,
`train_00001.bin`, ... Which file a token belongs to follows from its number in the split.
"""

import io
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from nanogpt_jax.config import SPLITS
from nanogpt_jax.corpora.readers import Key
from nanogpt_jax.corpora.tokenizer_files import TOKENIZER_FILE
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.files import delete_partials, read_json, write_atomically, write_json

PROGRESS = "progress.json"  # what is prepared; exists while that is unfinished
ITEMS = 2  # the version of where items end; one of another version cannot be resumed
PLAN_FIELDS = {"stat", "info", "shard_tokens", "tokenizer", "tokenizer_hash", "dtype", "items"}
PARTS = "parts"  # a folder
SHARD_TOKENS = 100_000_000  # 200 MB
_TOKEN_FILE = re.compile(r"(train|val)(_\d{5})?\.bin(\.\d+)?(\.partial)?")


@dataclass
class Counts:
    """Running totals of a preparation."""

    train: int = 0  # tokens
    val: int = 0
    chars: int = 0
    val_chars: int = 0
    documents: int = 0
    skipped: int = 0  # documents without text
    done: int = 0  # of the source's size


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
    return [path for path in folder.glob("*") if _TOKEN_FILE.fullmatch(path.name)]


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


def begin(folder: Path, plan: dict) -> None:
    """Mark a folder as incomplete and delete its old files; the next part is the first."""
    folder.mkdir(parents=True, exist_ok=True)
    _discard_parts(folder)  # first, as they are of the plan before
    write_json(folder / PROGRESS, plan)
    for path in [folder / "meta.json", *written(folder)]:
        path.unlink(missing_ok=True)
    (folder / PARTS).mkdir()


def read_plan(folder: Path) -> dict | None:
    """Return the plan of an unfinished preparation; None if there is none or it is unreadable."""
    try:
        plan = read_json(folder / PROGRESS)
        is_ours = PLAN_FIELDS <= plan.keys() and isinstance(plan["info"], dict)
        return plan if is_ours and plan["items"] == ITEMS else None
    except (OSError, ValueError, AttributeError):
        return None


def write_part(folder: Path, key: Key, counts: Counts, ids: dict[str, np.ndarray]) -> None:
    """Write the next ids of both splits; `key` is that of the last item, `counts` include it."""
    content = io.BytesIO()
    np.savez(content, counts=np.array(astuple(counts)), **ids)  # type: ignore[arg-type]
    name = "-".join(f"{number:08d}" for number in key)
    write_atomically(folder / PARTS / f"{name}.npz", content.getbuffer())


def _read_part(path: Path, name: str) -> np.ndarray:
    requirement = "a complete file (delete its folder to start over)"
    with reading(path, requirement), path.open("rb") as file, np.load(file) as part:
        return part[name]


def _counts_of(path: Path) -> Counts:
    return Counts(*_read_part(path, "counts").tolist())


def last_part(folder: Path) -> tuple[Key, Counts] | None:
    """Return the key of the last item done, and the counts up to it."""
    path = max((folder / PARTS).glob("*.npz"), default=None)
    return path and (tuple(map(int, path.stem.split("-"))), _counts_of(path))


def join(folder: Path, split: str, plan: dict) -> dict:
    """Join the parts to the token files of a split; return its entry in meta.json.

    A part is deleted when its training tokens are in a file, which saves half of the disk space:
    join that split last. The last part stays, since it says that all items are done.
    """
    parts = sorted((folder / PARTS).glob("*.npz"))
    ends = [getattr(_counts_of(path), split) for path in parts]
    limit, width = plan["shard_tokens"], np.dtype(plan["dtype"]).itemsize
    begins = range(0, max(1, ends[-1]), limit)
    entries, whole = [], 0
    for i, begin in enumerate(begins):
        path = folder / (f"{split}.bin" if len(begins) == 1 else f"{split}_{i:05d}.bin")
        n_tokens = min(limit, ends[-1] - begin)
        if _size(path) != n_tokens * width:  # otherwise it was joined before a kill
            write_atomically(path, _ids_between(begin, begin + n_tokens, parts, ends, split))
        while split == "train" and len(parts) > 1 and ends[0] <= begin + n_tokens:
            parts.pop(0).unlink()
            ends.pop(0)
        crc32 = 0
        with path.open("rb") as file:
            while content := file.read(2**24):
                crc32, whole = zlib.crc32(content, crc32), zlib.crc32(content, whole)
        entries.append({"name": path.name, "tokens": n_tokens, "crc32": crc32})
    return {"tokens": begins[-1] + n_tokens, "crc32": whole, "files": entries}


def _ids_between(
    begin: int, end: int, parts: list[Path], ends: list[int], split: str
) -> Iterator[bytes]:
    """Yield the ids of a split from one number to another, given where each part ends."""
    for k, part in enumerate(parts):
        if ends[k] > begin and (k == 0 or ends[k - 1] < end):
            ids = _read_part(part, split)
            first = ends[k] - len(ids)
            if first != (ends[k - 1] if k else min(first, begin)):
                raise InputError(f"{part}: the part before it is missing: delete {part.parent}")
            yield ids[max(0, begin - first) : max(0, end - first)].tobytes()


def finish(folder: Path, meta: dict) -> None:
    """Write meta.json, with which a folder is complete, and delete all that is left over."""
    write_json(folder / "meta.json", meta)
    (folder / PROGRESS).unlink()
    _discard_parts(folder)
    delete_partials(folder)  # of a killed process


def _discard_parts(folder: Path) -> None:
    """Delete all parts at once, for whoever resumes: a kill must not leave some of them."""
    discarded = folder / f"{PARTS}.old"
    shutil.rmtree(discarded, ignore_errors=True)
    if (folder / PARTS).exists():
        (folder / PARTS).rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def delete(folder: Path) -> None:
    """Delete an unfinished preparation."""
    _discard_parts(folder)
    for path in [*written(folder), folder / TOKENIZER_FILE, folder / PROGRESS]:
        path.unlink(missing_ok=True)
