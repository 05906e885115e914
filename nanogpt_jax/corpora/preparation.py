"""Tokenize a source into a folder; safe to interrupt and resume.

Meanwhile the folder has a `progress.json`: how much of the source has been read, and how long each
token file was then. To resume, the files are cut back to that, so they come out byte for byte as if
nothing had happened. `meta.json` is written last: all files are complete.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_jax.config import SPLITS
from nanogpt_jax.corpora import shards
from nanogpt_jax.corpora.documents import Source
from nanogpt_jax.corpora.shards import PROGRESS, ShardWriter, read_meta
from nanogpt_jax.corpora.text import first_texts, in_batches, read_ahead, train_characters
from nanogpt_jax.corpora.tokenizer import (
    TOKENIZER_FILE,
    CharTokenizer,
    Tokenizer,
    TokenizerSpec,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
)
from nanogpt_jax.errors import InputError
from nanogpt_jax.files import delete_partials, locked, read_json, write_atomically, write_json

BATCH_BYTES = 2**21  # tokenized at once, on all cores; the tokenizer needs some 200 MB for it
JOURNAL_S = 10.0  # of work that a kill can lose
BPE_CHARS = 100_000_000  # that BPE is trained on, at most
LARGE_BYTES = 10**9  # of a source that is estimated before it is prepared
GPT2_VOCAB_SIZE = 50257
CHARS_PER_S = 20e6


def prepare_folder(
    source: Source, folder: Path, spec: TokenizerSpec, min_tokens: int, shard_tokens: int
) -> Path:
    """Tokenize a source into a folder unless that is done already; return the folder.

    Args:
        min_tokens: what each split must have.
        shard_tokens: the most a file may have; a preparation that resumes keeps its own.

    Raises:
        InputError: the source cannot be used, or the folder cannot be written.
    """
    stat = source.stat()
    if _is_done(folder, source_stat=stat):
        _check_done(source, folder, min_tokens)
        return folder
    journal = _read_journal(folder)
    is_known = journal and _belongs(journal, spec, stat)
    source_info = journal["facts"] if journal and is_known else _scan(source, spec)
    if _is_done(folder, source_sha256=source_info.get("sha256")):
        with contextlib.suppress(OSError):  # touched or copied: spare the next start the reading
            if stat:
                write_json(folder / "meta.json", read_meta(folder) | {"source_stat": stat})
        _check_done(source, folder, min_tokens)
        return folder
    if spec.label == "char" and "characters" in source_info:
        n_chars = source_info["characters"]
        n_train = train_characters(n_chars)
        _check_length(source, (n_train, n_chars - n_train), min_tokens, "characters")
    waiting = f"waiting for another process that prepares {folder}"
    try:
        with locked(folder, lambda: print(waiting, file=sys.stderr)):
            if not _is_done(folder, stat, source_info.get("sha256")):  # by the other process
                _Preparation(source, folder, spec, source_info, stat).run(min_tokens, shard_tokens)
    except OSError as error:
        raise unwritable(folder, error) from None
    return folder


def unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: must be writable, but: {error.strerror}; free some space or pass another folder "
        "with --data_dir"
    )


def is_prepared(source: Source, folder: Path, spec: TokenizerSpec) -> bool:
    """Return whether a folder has the tokens of a source, which may have been touched or copied."""
    if _is_done(folder, source_stat=source.stat()):
        return True
    is_complete = _is_done(folder, source_sha256=read_meta(folder).get("source_sha256"))
    return is_complete and _is_done(folder, source_sha256=_scan(source, spec).get("sha256"))


def _is_done(
    folder: Path, source_stat: str | None = None, source_sha256: str | None = None
) -> bool:
    meta = read_meta(folder)
    same_stat = source_stat is not None and meta.get("source_stat") == source_stat
    same_text = source_sha256 is not None and meta.get("source_sha256") == source_sha256
    return (same_stat or same_text) and shards.are_complete(folder, meta)


def _check_done(source: Source, folder: Path, min_tokens: int) -> None:
    meta = read_meta(folder)
    _check_length(source, (meta["train_tokens"], meta["val_tokens"]), min_tokens)


def _check_length(
    source: Source, sizes: Collection[int], min_tokens: int, unit: str = "tokens"
) -> None:
    if min(sizes) < min_tokens:
        least = "1" if min_tokens == 1 else f"block_size + 1 = {min_tokens}"
        raise InputError(
            f"{source.name}: each split must have at least {least} {unit}, but of {sum(sizes)} one "
            f"gets {min(sizes)} ({source.split_in_words}): use more text or a smaller --block_size"
        )


def _read_journal(folder: Path) -> dict | None:
    """Return a folder's progress.json if there is one to resume from."""
    kinds = {
        "tokenizer": str, "tokenizer_hash": str, "source_stat": str | None, "shard_tokens": int,
        "dtype": str, "facts": dict, "position": dict, "splits": dict,
    }  # fmt: skip
    counts = "open_tokens", "open_crc32", "crc32"
    try:
        journal = read_json(folder / PROGRESS)
        is_valid = (
            all(isinstance(journal[name], kind) for name, kind in kinds.items())
            and all(shards.lists_files(journal["splits"], split, *counts) for split in SPLITS)
            and journal["dtype"] in ("uint16", "uint32")
            and journal["shard_tokens"] >= 1
        )
        return journal if is_valid else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _belongs(
    journal: dict, spec: TokenizerSpec, stat: str | None, source_info: dict | None = None
) -> bool:
    """Return whether a journal is of the same files, or the same text, with the same tokenizer."""
    same_stat = stat is not None and journal["source_stat"] == stat
    same_text = "sha256" in journal["facts"] and journal["facts"] == source_info
    return journal["tokenizer"] == spec.label and (same_stat or same_text)


def _scan(source: Source, spec: TokenizerSpec) -> dict:
    with _bar(source, "reading") as bar:
        return source.scan(spec.label == "char", lambda done: bar.update(done - bar.n))


def _bar(source: Source, what: str, done: int = 0):
    from tqdm import tqdm

    return tqdm(
        desc=what, total=source.size, initial=done, unit=source.unit, unit_scale=True,
        dynamic_ncols=True, disable=None, leave=False, delay=1,
    )  # fmt: skip


@dataclass
class _Preparation:
    """The preparation of one folder, which this process has locked."""

    source: Source
    folder: Path
    spec: TokenizerSpec
    source_info: dict  # what `source.scan` returned
    stat: str | None  # of the source
    has_written: bool = False

    def run(self, min_tokens: int, shard_tokens: int) -> None:
        try:
            tokenizer, journal = self._resume() or self._begin(shard_tokens)
            self._tokenize(tokenizer, journal, min_tokens)
        except InputError:
            if self.has_written and _read_journal(self.folder) is None:
                self._delete()  # there is nothing to resume from
            raise
        except KeyboardInterrupt:
            print(f"\nstopped: the same command resumes {self.folder}", file=sys.stderr)
            raise

    def _resume(self) -> tuple[Tokenizer, dict] | None:
        """Return the tokenizer and journal of an earlier process, or print why that cannot be."""
        path, journal, why = self.folder / PROGRESS, _read_journal(self.folder), ""
        if journal is None:
            if path.exists() and path.read_bytes().strip() != b"{}":  # as before the first journal
                why = f"its {PROGRESS} is damaged"
        elif journal["tokenizer"] != self.spec.label:
            why = f"it was started with the tokenizer {journal['tokenizer']}"
        elif not _belongs(journal, self.spec, self.stat, self.source_info):
            why = f"{self.source.name} changed"
        elif (tokenizer := self._load_tokenizer(journal["tokenizer_hash"])) is None:
            why = f"its {TOKENIZER_FILE} changed"
        elif not all(ShardWriter.recover(self.folder, split, journal) for split in SPLITS):
            why = "token files are missing or cut off"
        else:
            self.source_info = journal["facts"]
            return tokenizer, journal | {"source_stat": self.stat}
        if why:
            print(f"{self.folder}: starting over, since {why}", file=sys.stderr)
        return None

    def _load_tokenizer(self, expected_hash: str) -> Tokenizer | None:
        with contextlib.suppress(InputError):
            tokenizer = load_tokenizer(self.folder)
            if tokenizer and tokenizer_hash(tokenizer) == expected_hash:
                return tokenizer
        return None

    def _begin(self, shard_tokens: int) -> tuple[Tokenizer, dict]:
        """Return a new tokenizer and journal; delete what the folder had before."""
        texts = first_texts(self.source.pieces(self.source_info), BPE_CHARS)
        tokenizer = self.spec.make(self.source_info.get("chars", ""), texts)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        replaced = shards.written(self.folder)
        freed_bytes = sum(path.stat().st_size for path in replaced)
        _estimate(self.source, self.folder, tokenizer, np.dtype(dtype).itemsize, freed_bytes)
        # First of all, so that nobody takes an incomplete folder for a complete one.
        write_atomically(self.folder / PROGRESS, b"{}\n")
        self.has_written = True
        (self.folder / "meta.json").unlink(missing_ok=True)
        for path in replaced:
            path.unlink()
        save_tokenizer(tokenizer, self.folder)
        return tokenizer, {
            "tokenizer": self.spec.label,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "source_stat": self.stat,
            "shard_tokens": shard_tokens,
            "dtype": dtype,
            "facts": self.source_info,
            "position": None,
            "splits": dict.fromkeys(SPLITS),
        }

    def _tokenize(self, tokenizer: Tokenizer, journal: dict, min_tokens: int) -> None:
        separator = np.zeros(0, np.int64)
        if tokenizer.separator:
            separator = tokenizer.encode_prompt(tokenizer.separator)  # as a token, not as text
        writers = {split: ShardWriter(self.folder, split, journal) for split in SPLITS}
        first_tokens = sum(writer.n_tokens for writer in writers.values())
        if first_tokens:
            print(f"resuming {self.folder} from {first_tokens:,} tokens")
        start_s = saved_s = time.monotonic()
        n_shards = 0
        # The journal is written between batches; small shards need small batches.
        max_bytes = min(BATCH_BYTES, 4 * journal["shard_tokens"])
        pieces = self.source.pieces(self.source_info, journal["position"])
        try:
            with _bar(self.source, str(self.folder), journal.get("done", 0)) as bar:
                for batch in read_ahead(in_batches(pieces, max_bytes)):
                    texts = [piece.text for piece in batch if piece.text is not None]
                    encoded = iter(tokenizer.encode_batch(texts))
                    for piece in batch:
                        ids = separator if piece.text is None else next(encoded)
                        writers[piece.split].append(ids)
                    n = sum(writer.n_tokens for writer in writers.values())
                    speed = (n - first_tokens) / (time.monotonic() - start_s)
                    bar.set_postfix_str(f"{n:,} tokens, {speed:,.0f}/s", refresh=False)
                    bar.update(batch[-1].done - bar.n)
                    n_full = sum(len(writer.files) for writer in writers.values())
                    is_due = n_full > n_shards or time.monotonic() - saved_s > JOURNAL_S
                    if is_due and batch[-1].position is not None:
                        at = {"position": batch[-1].position, "done": batch[-1].done}
                        at["splits"] = {split: writer.sync() for split, writer in writers.items()}
                        write_atomically(self.folder / PROGRESS, json.dumps(journal | at).encode())
                        n_shards, saved_s = n_full, time.monotonic()
            self._finish(tokenizer, journal, writers, min_tokens)
        finally:
            for writer in writers.values():
                writer.close()

    def _finish(
        self, tokenizer: Tokenizer, journal: dict, writers: dict[str, ShardWriter], min_tokens: int
    ) -> None:
        try:
            if self.source.stat() != self.stat and not self._is_unchanged():
                raise InputError(
                    f"{self.source.name}: must not change while it is read, but did: run the "
                    "command again"
                )
            _check_length(self.source, [w.n_tokens for w in writers.values()], min_tokens)
        except InputError:
            for writer in writers.values():
                writer.close()
            self._delete()
            raise
        splits = {split: writer.finish() for split, writer in writers.items()}
        meta = {
            "source": self.source.name,
            "source_sha256": self.source_info.get("sha256"),
            "source_revision": self.source_info.get("revision"),
            "source_stat": self.stat,
            "split": self.source.split_in_words,
            "tokenizer": self.spec.label,
            "tokenizer_hash": journal["tokenizer_hash"],
            "dtype": journal["dtype"],
            "vocab_size": tokenizer.vocab_size,
            "train_tokens": splits["train"]["tokens"],
            "val_tokens": splits["val"]["tokens"],
            "splits": splits,
        }
        write_json(self.folder / "meta.json", meta)
        (self.folder / PROGRESS).unlink()
        delete_partials(self.folder)  # of a killed process
        n_chars = self.source_info.get("characters")
        of_chars = f"{n_chars:,} characters, " if n_chars else ""
        is_char = isinstance(tokenizer, CharTokenizer)
        kind = "distinct" if is_char else f"tokens in the vocabulary ({self.spec.label})"
        print(
            f"prepared {self.source.name}: {of_chars}{tokenizer.vocab_size:,} {kind}; "
            f"{meta['train_tokens']:,} tokens for training, {meta['val_tokens']:,} for validation"
        )

    def _is_unchanged(self) -> bool:
        """Read the source again: only its time may have changed."""
        return "sha256" in self.source_info and _scan(self.source, self.spec) == self.source_info

    def _delete(self) -> None:
        delete_partials(self.folder)
        for path in shards.written(self.folder):
            path.unlink()
        for name in (TOKENIZER_FILE, PROGRESS):
            (self.folder / name).unlink(missing_ok=True)


def _estimate(
    source: Source, folder: Path, tokenizer: Tokenizer, id_bytes: int, freed_bytes: int
) -> None:
    """Print what a large source needs, and refuse one whose tokens the disk cannot hold.

    Args:
        freed_bytes: of files in the folder that the new ones replace.
    """
    free_bytes = shutil.disk_usage(folder).free + freed_bytes
    if source.text_bytes <= LARGE_BYTES and source.text_bytes * id_bytes < free_bytes:
        return  # there are at most as many tokens as bytes
    tokens_per_s, bytes_per_token = measure_speed(tokenizer)
    n_tokens = source.text_bytes / bytes_per_token
    if tokenizer.vocab_size == GPT2_VOCAB_SIZE:
        n_tokens = getattr(source, "gpt2_tokens", n_tokens)
    disk_bytes = n_tokens * id_bytes
    if disk_bytes > free_bytes:
        raise InputError(
            f"{folder}: about {disk_bytes / 1e9:,.1f} GB must be free for the tokens of "
            f"{source.name}, but only {free_bytes / 1e9:,.1f} GB are: free some space or pass "
            "another folder with --data_dir"
        )
    downloaded = getattr(source, "download_bytes", 0)
    download = f", {downloaded / 1e9:,.0f} GB of download (not stored)" if downloaded else ""
    print(
        f"{source.name} needs about {n_tokens / 1e9:,.2f}B tokens = {disk_bytes / 1e9:,.1f} GB of "
        f"{free_bytes / 1e9:,.0f} GB free in {folder}{download}, less than 1 GB of memory, and "
        f"{n_tokens / tokens_per_s / 3600:,.1f} hours on the {os.cpu_count()} cores of this "
        "machine. You can stop it at any time; the same command resumes it",
        file=sys.stderr,
    )


def measure_speed(tokenizer: Tokenizer) -> tuple[float, float]:
    """Return tokens/s and bytes per token, measured on Python's manual.

    A character tokenizer may not know the manual's characters: its figures are typical ones.
    """
    if isinstance(tokenizer, CharTokenizer):
        return CHARS_PER_S, 1.0
    from pydoc_data.topics import topics

    texts = [*topics.values()]
    start_s = time.perf_counter()
    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    return n_tokens / (time.perf_counter() - start_s), sum(map(len, texts)) / n_tokens
