"""Tokenise a source into a folder, so that it can stop at any moment and go on. No JAX.

While it is at work the folder has a `progress.json`: how far the source is read and how long each
token file is then. What was written since is cut off again when it goes on, so the files come out
byte for byte as if nothing had happened. `meta.json`, written last, says: all is there.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanogpt_jax import shards
from nanogpt_jax import tokenizer as tokenizers
from nanogpt_jax.errors import InputError
from nanogpt_jax.shards import SHARD_TOKENS, ShardWriter, write_atomically
from nanogpt_jax.sources import train_characters
from nanogpt_jax.tokenizer import CharTokenizer, Tokenizer

PROGRESS = "progress.json"
SPLITS = ("train", "val")
BATCH_CHARS = 2**22  # tokenised at once, on all cores: some 200 MB of the tokenizer's own
BATCH_PIECES = 2**15
JOURNAL_S = 30.0  # what a kill can lose
LARGE_BYTES = 10**9  # of a source whose costs are said beforehand


def read_json(path: Path) -> dict:
    """Read a JSON object; an empty one where there is no file.

    Raises:
        InputError: the file is something else.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be a JSON file, but {error}") from None
    if not isinstance(loaded, dict) or loaded.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise InputError(f'{path}: must be like {{"dtype": "uint16"}} or "uint32", but is not')
    return loaded


def _write_json(path: Path, content: dict) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def prepare_folder(
    source, folder: Path, choice, min_tokens: int = 1, shard_tokens: int = SHARD_TOKENS
) -> Path:
    """Tokenise a source into a folder, or go on with that, unless it was done; return the folder.

    Args:
        source: of sources.py or documents.py.
        choice: of choice.py, the tokenizer.
        min_tokens: what each split must have.
        shard_tokens: what a file has at most.

    Raises:
        InputError: a source that cannot be used, a full disk, another tokenizer than asked for.
    """
    stat = source.stat()
    if _is_done(folder, choice, source_stat=stat):
        return folder
    begun = _journal(folder, choice, stat, shard_tokens)
    facts = begun["facts"] if begun else _scan(source, choice)
    if _is_done(folder, choice, source_sha256=facts.get("sha256")):
        with contextlib.suppress(OSError):  # touched, or copied: next time it need not be read
            meta = read_json(folder / "meta.json")
            if meta.get("source_stat") != stat:
                _write_json(folder / "meta.json", meta | {"source_stat": stat})
        return folder
    if choice.label == "char" and "characters" in facts:
        _check_length(source, facts["characters"], min_tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            # Another process may have done it meanwhile.
            if not _is_done(folder, choice, stat, facts.get("sha256")):
                _Preparation(source, folder, choice, facts, stat, shard_tokens).run(min_tokens)
    except OSError as error:
        raise InputError(f"{folder}: must be writable, but: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # nothing was written: leave nothing behind
            folder.rmdir()
    return folder


def _is_done(
    folder: Path, choice, source_stat: str | None = None, source_sha256: str | None = None
) -> bool:
    meta = read_json(folder / "meta.json")
    same_stat = source_stat is not None and meta.get("source_stat") == source_stat
    same_text = source_sha256 is not None and meta.get("source_sha256") == source_sha256
    return (
        (same_stat or same_text)
        and meta.get("tokenizer", "char") == choice.label
        and not (folder / PROGRESS).exists()
        and shards.are_whole(folder, meta)
    )


def _journal(folder: Path, choice, stat: str | None, shard_tokens: int) -> dict | None:
    """Return progress.json, where it is of this very preparation."""
    try:
        begun = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"tokenizer": choice.label, "source_stat": stat, "shard_tokens": shard_tokens}
    same = all(begun.get(name) == value for name, value in wanted.items())
    return begun if same and stat is not None and "position" in begun else None


def _scan(source, choice) -> dict:
    with _bar(source, "reading") as bar:
        return source.scan(choice.label == "char", lambda done: bar.update(done - bar.n))


def _bar(source, what: str, done: int = 0):
    from tqdm import tqdm

    return tqdm(
        desc=what, total=source.size, initial=done, unit=source.unit, unit_scale=True,
        dynamic_ncols=True, disable=None, leave=False, delay=1,
    )  # fmt: skip


def _check_length(source, n_chars: int, min_tokens: int) -> None:
    cut = train_characters(n_chars)
    shortest = min(cut, n_chars - cut)
    if shortest < min_tokens:
        raise InputError(
            f"{source.name}: each split must have at least block_size + 1 = {min_tokens} "
            f"characters, but of {n_chars} one gets {shortest}: use more text or a smaller "
            "--block_size"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from preparing the same folder: they wait."""
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
                print(f"{folder}: another process prepares it: waiting", file=sys.stderr)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Preparation:
    """The work on one folder."""

    def __init__(self, source, folder, choice, facts, stat, shard_tokens):
        self.source, self.folder, self.choice, self.facts = source, folder, choice, facts
        self.stat, self.shard_tokens = stat, shard_tokens

    def run(self, min_tokens: int) -> None:
        """Do what is left of it."""
        try:
            tokenizer, begun = self._begin()
            self._tokenise(tokenizer, begun, min_tokens)
        except KeyboardInterrupt:
            print(f"\nstopped: the same command goes on with {self.folder}", file=sys.stderr)
            raise

    def _begin(self) -> tuple[Tokenizer, dict]:
        """Return the tokenizer and what progress.json says, perhaps of an earlier process."""
        begun = _journal(self.folder, self.choice, self.stat, self.shard_tokens)
        if begun:
            tokenizer = tokenizers.load(self.folder)
            is_same = tokenizer and tokenizers.hash_of(tokenizer) == begun["tokenizer_hash"]
            states, dtype = begun["splits"], begun["dtype"]
            if is_same and all(
                ShardWriter.recover(self.folder, split, dtype, states[split]) for split in SPLITS
            ):
                return tokenizer, begun
        tokenizer = self.choice.make(self.source, self.facts)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        self._say_costs(tokenizer, dtype)
        # First of all, so that nobody takes for whole what is not yet, or not any more.
        write_atomically(self.folder / PROGRESS, b"{}\n")
        (self.folder / "meta.json").unlink(missing_ok=True)
        shards.delete(self.folder)
        write_atomically(self.folder / tokenizers.FILE_NAME, f"{tokenizer.to_json()}\n".encode())
        return tokenizer, {
            "tokenizer": self.choice.label,
            "tokenizer_hash": tokenizers.hash_of(tokenizer),
            "source_stat": self.stat,
            "shard_tokens": self.shard_tokens,
            "dtype": dtype,
            "facts": self.facts,
            "position": None,
            "splits": dict.fromkeys(SPLITS),
        }

    def _tokenise(self, tokenizer: Tokenizer, begun: dict, min_tokens: int) -> None:
        separator = np.zeros(0, np.int64)
        if tokenizer.separator:
            separator = tokenizer.encode_prompt(tokenizer.separator)  # not as text: as the token
        writers = {
            split: ShardWriter(
                self.folder, split, begun["dtype"], self.shard_tokens, begun["splits"][split]
            )
            for split in SPLITS
        }
        begun_tokens = sum(writer.tokens for writer in writers.values())
        if begun_tokens:
            print(f"going on with {self.folder} from {begun_tokens:,} tokens")
        begun_s = saved_s = time.monotonic()
        n_shards = 0
        pieces = self.source.pieces(self.facts, begun["position"])
        try:
            with _bar(self.source, str(self.folder), begun.get("done", 0)) as bar:
                for batch in _read_ahead(_batches(pieces)):
                    texts = [piece.text for piece in batch if piece.text is not None]
                    ids = iter(tokenizer.encode_batch(texts))
                    for piece in batch:
                        found = separator if piece.text is None else next(ids)
                        writers[piece.split].append(found)
                    n = sum(writer.tokens for writer in writers.values())
                    speed = (n - begun_tokens) / (time.monotonic() - begun_s)
                    bar.set_postfix_str(f"{n:,} tokens, {speed:,.0f}/s", refresh=False)
                    bar.update(batch[-1].done - bar.n)
                    full = sum(len(writer.files) for writer in writers.values())
                    is_due = full > n_shards or time.monotonic() - saved_s > JOURNAL_S
                    if is_due and batch[-1].position is not None:
                        states = {split: writer.sync() for split, writer in writers.items()}
                        at = {"position": batch[-1].position, "done": batch[-1].done}
                        journal = begun | at | {"splits": states}
                        write_atomically(self.folder / PROGRESS, json.dumps(journal).encode())
                        n_shards, saved_s = full, time.monotonic()
            self._finish(tokenizer, begun, writers, min_tokens)
        finally:
            for writer in writers.values():
                writer.close()

    def _finish(self, tokenizer, begun: dict, writers: dict, min_tokens: int) -> None:
        shortest = min(writer.tokens for writer in writers.values())
        changed = self.source.stat() != self.stat
        if changed or shortest < min_tokens:
            for writer in writers.values():
                writer.close()
            shards.delete(self.folder)
            for name in (tokenizers.FILE_NAME, PROGRESS):
                (self.folder / name).unlink()
        if changed:
            raise InputError(f"{self.source.name}: changed while it was read: start again")
        if shortest < min_tokens:
            raise InputError(
                f"{self.source.name}: each split must have at least block_size + 1 = {min_tokens} "
                f"tokens, but one gets {shortest} ({self.source.split_in_words}): use more text "
                "or a smaller --block_size"
            )
        splits = {split: writer.finish() for split, writer in writers.items()}
        meta = {
            "source": self.source.name,
            "source_sha256": self.facts.get("sha256"),
            "source_stat": self.stat,
            "split": self.source.split_in_words,
            "tokenizer": self.choice.label,
            "tokenizer_hash": begun["tokenizer_hash"],
            "dtype": begun["dtype"],
            "vocab_size": tokenizer.vocab_size,
            "train_tokens": splits["train"]["tokens"],
            "val_tokens": splits["val"]["tokens"],
            "splits": splits,
        }
        _write_json(self.folder / "meta.json", meta)
        (self.folder / PROGRESS).unlink()
        n_chars = self.facts.get("characters")
        of_chars = f"{n_chars:,} characters, " if n_chars else ""
        is_char = isinstance(tokenizer, CharTokenizer)
        kind = "distinct" if is_char else f"known to {self.choice.label}"
        print(
            f"prepared {self.source.name}: {of_chars}{tokenizer.vocab_size:,} {kind}; "
            f"{meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate"
        )

    def _say_costs(self, tokenizer: Tokenizer, dtype: str) -> None:
        """Say of a large source what it needs; refuse where the disk cannot hold it."""
        width, free = np.dtype(dtype).itemsize, shutil.disk_usage(self.folder).free
        is_large = self.source.text_bytes > LARGE_BYTES
        if not is_large and self.source.text_bytes * width < free:
            return  # a byte is a token at most
        tokens_per_s, bytes_per_token = _speed(tokenizer)
        n_tokens = self.source.text_bytes / bytes_per_token
        if self.choice.label == "gpt2":
            n_tokens = getattr(self.source, "gpt2_tokens", n_tokens)
        if n_tokens * width > free:
            raise InputError(
                f"{self.folder}: about {n_tokens * width / 1e9:,.1f} GB must be free there for the "
                f"tokens of {self.source.name}, but {free / 1e9:,.1f} GB are: free some, or name "
                "another place with --data_dir"
            )
        downloaded = getattr(self.source, "download_bytes", 0) / 1e9
        download = f", {downloaded:,.0f} GB of download (not stored)" if downloaded else ""
        print(
            f"{self.source.name} needs about, in {self.folder}: {n_tokens / 1e9:,.2f}B tokens = "
            f"{n_tokens * width / 1e9:,.1f} GB of {free / 1e9:,.0f} GB free{download}, less than "
            f"1 GB of memory, and {n_tokens / tokens_per_s / 3600:,.1f} hours on this machine's "
            f"{os.cpu_count()} cores. It can be stopped and gone on with at any time",
            file=sys.stderr,
        )


def _speed(tokenizer: Tokenizer) -> tuple[float, float]:
    """Return tokens/s and bytes a token, tried on Python's manual; characters are not counted."""
    from pydoc_data.topics import topics

    texts = [text.encode("ascii", "ignore").decode() for text in topics.values()]
    if isinstance(tokenizer, CharTokenizer):
        return 20e6, 1.0  # no text but its own has only its characters
    begun_s = time.perf_counter()
    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return n_tokens / (time.perf_counter() - begun_s), sum(map(len, texts)) / n_tokens


def _batches(pieces: Iterable) -> Iterator[list]:
    """Yield pieces in batches, which end where the source can be gone on with, if at all."""
    batch, n_chars = [], 0
    for piece in pieces:
        batch.append(piece)
        n_chars += len(piece.text or "")
        is_full = n_chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES
        if (is_full and piece.position is not None) or n_chars >= 2 * BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _read_ahead(batches: Iterator[list]) -> Iterator[list]:
    """Yield batches, and read each in a thread while the one before is worked on."""
    pool = ThreadPoolExecutor(1)
    try:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
