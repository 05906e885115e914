"""What a corpus is read from: local files, or those of a corpus on the Hugging Face Hub."""

import hashlib
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from nanogpt_jax.corpora import readers
from nanogpt_jax.corpora.readers import TEXT, Item, Key, kind_of
from nanogpt_jax.corpora.text import CanCut, anywhere
from nanogpt_jax.errors import InputError, first_line, reading
from nanogpt_jax.files import HUB_TIMEOUT_S

START = (0, 0, 0)  # before the key of any item: the number of its file, then its key there
MAX_VAL_CHARS = 10_000_000  # enough to know a loss to 0.001, and evaluated in a minute
# Words that name a split in the names of files.
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test",
}  # fmt: skip


class Files:
    """A local file, or the files in a folder: text, or documents in JSON or Parquet.

    Args:
        path: of the file or folder; in a folder, names tell which files have text.
        text_key: the key or column of a document's text.
    """

    every, max_val_chars = 10, MAX_VAL_CHARS

    def __init__(self, path: Path, text_key: str = "text"):
        self.name, self._path, self._text_key = str(path), path, text_key
        self._files: dict[Path, str | None] = {path: None}  # each with its split if it has a name
        self.files_in_words = ""  # how many were read, which were not and why
        if path.is_dir():
            self._files, self.files_in_words = _files_in(path)
        first, split = next(iter(self._files.items()))
        self.kind = readers.content_kind(first)
        is_compressed = first.suffix.lower() in readers.COMPRESSED
        self._begins = [0, *itertools.accumulate(stat.st_size for stat in self._stats())]
        self.size = self._begins[-1]
        self.text_bytes = self.size * (
            3 if is_compressed else 2 if self.kind == readers.PARQUET else 1
        )
        # Either one text, a part of it for validation, or documents, each for one of the splits.
        self.is_cut = self.kind == TEXT and split is None
        self.has_separators = self.kind != TEXT or path.is_dir()
        which = "the last tenth" if self.is_cut else "every 10th document"
        self.split_in_words = f"{which}, at most 10 million characters, is for validation"
        if split is not None:
            self.split_in_words = "validation files chosen by name"

    def _stats(self) -> Iterator[os.stat_result]:
        for path in self._files:
            with reading(path, "a file"):
                yield path.stat()

    def stat(self) -> str:
        """Return a hash of the files' names, sizes and times: if it is unchanged, so are they."""
        digest = hashlib.sha256()
        for path, stat in zip(self._files, self._stats(), strict=True):
            digest.update(self._named(path))
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _named(self, path: Path) -> bytes:
        """Return the name of a file; of one in a folder, its path there, which can say a split."""
        return os.fsencode(path.relative_to(self._path) if self._path != path else path.name)

    def identify(self, advance: Callable[[float], object]) -> dict:
        """Return the `sha256` of all content; call `advance` with the bytes read so far."""
        digest, done = hashlib.sha256(), 0
        for path, stat in zip(self._files, self._stats(), strict=True):
            if path != self._path:  # the same bytes in other files are another text
                digest.update(self._named(path) + b"\0%d\0" % stat.st_size)
            with reading(path, "a file"), path.open("rb") as file:
                while content := file.read(2**20):
                    digest.update(content)
                    done += len(content)
                    advance(done)
        return {"sha256": digest.hexdigest()}

    def survey(self, info: dict, wants_chars: bool, advance: Callable[[float], object]) -> dict:
        """Read everything once if need be: how many `characters` it has, and which (`chars`)."""
        if self.kind != TEXT:  # refuse what can be refused before anything is written
            for path in self._files:
                next(readers.read_items(path, anywhere, (0, 0), self._text_key), None)
        if not self.is_cut and not wants_chars:
            return {}
        n_chars, chars, is_empty = 0, {"\n"} if self.has_separators else set(), True
        for item in self.items(info, anywhere):
            for text in filter(None, item.texts):
                n_chars += len(text)
                is_empty = is_empty and not text.strip()
                if wants_chars:
                    chars |= set(text)
            advance(item.done)
        if is_empty:
            raise InputError(
                f"{self.name}: must contain text, but is empty or blank: pass another file"
            )
        return {"characters": n_chars, "chars": "".join(sorted(chars))}

    def items(self, info: dict, can_cut: CanCut, after: Key = START) -> Iterator[Item]:
        """Yield the items after the one with a key."""
        for i, (path, split) in enumerate(self._files.items()):
            begin, size = self._begins[i], self._begins[i + 1] - self._begins[i]
            if i >= after[0]:
                inner = after[1:] if i == after[0] else START[1:]
                for item in readers.read_items(path, can_cut, inner, self._text_key):
                    done = begin + item.done * size
                    yield item._replace(key=(i, *item.key), split=split, done=done)


def _files_in(folder: Path) -> tuple[dict[Path, str | None], str]:
    """Return a folder's files, with splits if all names have one, and a line on what is read."""
    found = sorted(_walk(folder))
    kinds = Counter(filter(None, map(kind_of, found)))
    if not kinds:
        raise InputError(
            f"{folder}: must have files that end in {', '.join(readers.ENDINGS)}, or train.bin and "
            "val.bin, but has none: pass another folder"
        )
    if len(kinds) > 1:
        counts = " and ".join(f"{n} {kind}" for kind, n in kinds.items())
        raise InputError(
            f"{folder}: must have files of one kind, but has {counts} files: pass one file, or "
            "move the others"
        )
    left_out = [f"{path.name} (unknown ending)" for path in found if not kind_of(path)]
    splits = {path: _named_split(path.relative_to(folder)) for path in found if kind_of(path)}
    names = {*splits.values()}
    if None in names or not names > {"train"}:
        splits = dict.fromkeys(splits)
    elif "val" in names:
        left_out += [f"{path.name} (test split)" for path in splits if splits[path] == "test"]
        splits = {path: split for path, split in splits.items() if split != "test"}
    else:  # what is for tests has to do for validation
        splits = {path: split if split == "train" else "val" for path, split in splits.items()}
    more = f", and {len(left_out) - 5} more" if len(left_out) > 5 else ""
    not_read = f"; not read: {', '.join(left_out[:5])}{more}" if left_out else ""
    return splits, f"{len(splits)} of {len(found)} files read{not_read}"


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those in it: links are followed, hidden ones left out."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:  # by a link to a folder around it
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _named_split(path: Path) -> str | None:
    """Return the split that words in a path name: train, val or test; None for no or several."""
    words = re.split("[^a-z]+", str(path).lower())
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class Hub:
    """A corpus of Parquet files on the Hugging Face Hub, streamed. Sizes are approximate."""

    name: str
    repository: str
    files: str  # a pattern of their names
    gpt2_tokens: int
    text_bytes: int
    size: int  # bytes of its files
    split_in_words: str = "every 2000th document is for validation"
    is_split: bool = False  # whether some of its files are for validation

    every, max_val_chars = 2000, float("inf")  # nanoGPT's 0.0005
    is_cut, has_separators, files_in_words = False, True, ""

    def stat(self) -> str:
        """Return its name: the Hub is not asked for a newer revision."""
        return self.name

    def identify(self, advance: Callable[[float], object]) -> dict:
        """Return the newest `revision` and its `files`: every item comes from these."""
        import huggingface_hub

        readers.import_extra("pyarrow.parquet")  # before anything is downloaded
        for library in ("huggingface_hub", "fsspec", "httpx", "httpx2"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # its error is one line here
        try:
            found = huggingface_hub.HfApi().dataset_info(self.repository, timeout=HUB_TIMEOUT_S)
            names = sorted(each.rfilename for each in found.siblings or ())
            if names := [name for name in names if re.fullmatch(self.files, name)]:
                return {"revision": found.sha, "files": names}
            raise FileNotFoundError("its files have other names now")
        except Exception as error:  # its classes differ between versions
            raise self._unreadable(error) from None

    def survey(self, info: dict, wants_chars: bool, advance: Callable[[float], object]) -> dict:
        if wants_chars:
            raise InputError(
                f"{self.name} must have a byte-pair tokenizer, but char was requested: pass "
                "--tokenizer gpt2, bpe or a tokenizer.json"
            )
        return {}

    def items(self, info: dict, can_cut: CanCut, after: Key = START) -> Iterator[Item]:
        import huggingface_hub

        names, root = info["files"], f"datasets/{self.repository}@{info['revision']}"
        system = huggingface_hub.HfFileSystem()
        for i in range(after[0], len(names)):
            inner = after[1:] if i == after[0] else START[1:]
            split = _named_split(Path(names[i])) if self.is_split else None
            try:
                with system.open(f"{root}/{names[i]}") as file:
                    for item in readers.parquet_items(
                        cast(BinaryIO, file), names[i], inner, "text"
                    ):
                        done = (i + item.done) / len(names) * self.size
                        yield item._replace(key=(i, *item.key), split=split, done=done)
            except Exception as error:
                raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> InputError:
        return InputError(
            f"{self.name} could not be read from the Hub ({first_line(error)}): run the same "
            "command again to continue; without a network, save the Parquet files of "
            f"https://huggingface.co/datasets/{self.repository} in a folder and pass that instead"
        )


OPENWEBTEXT = Hub(
    "openwebtext", "Skylion007/openwebtext", r"plain_text/train-.*\.parquet",
    gpt2_tokens=9_040_000_000, text_bytes=38_000_000_000, size=24_000_000_000,
)  # fmt: skip
FINEWEB_EDU = Hub(
    "fineweb-edu", "HuggingFaceFW/fineweb-edu", r"sample/10BT/.*\.parquet",
    gpt2_tokens=10_000_000_000, text_bytes=45_000_000_000, size=27_000_000_000,
)  # fmt: skip
TINYSTORIES = Hub(
    "tinystories", "roneneldan/TinyStories", r"data/(train|validation)-.*\.parquet",
    gpt2_tokens=470_000_000, text_bytes=1_930_000_000, size=1_000_000_000,
    split_in_words="its own validation files", is_split=True,
)  # fmt: skip
HUB = {corpus.name: corpus for corpus in (OPENWEBTEXT, FINEWEB_EDU, TINYSTORIES)}
Source: TypeAlias = Files | Hub
