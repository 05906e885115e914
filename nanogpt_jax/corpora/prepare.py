"""Tokenise a source into a folder, so that it can stop at any moment and go on. No JAX.

While it is at work the folder has a `progress.json`: how far the source is read and how long each
token file is then. What was written since is cut off again when it goes on, so the files come out
byte for byte as if nothing had happened. `meta.json`, written last, says: all is there.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from nanogpt_jax.corpora import costs, shards
from nanogpt_jax.corpora import tokenizer as tokenizers
from nanogpt_jax.corpora.shards import (
    PROGRESS,
    SHARD_TOKENS,
    SPLITS,
    ShardWriter,
    read_meta,
)
from nanogpt_jax.corpora.text import in_batches, read_ahead, train_characters
from nanogpt_jax.corpora.tokenizer import CharTokenizer, Tokenizer
from nanogpt_jax.errors import InputError
from nanogpt_jax.files import locked, read_json, write_atomically, write_json

BATCH_BYTES = 2**21  # tokenised at once, on all cores: some 200 MB of the tokenizer's own
JOURNAL_S = 10.0  # what a kill can lose


def prepare_folder(
    source, folder: Path, choice, min_tokens: int = 1, shard_tokens: int = SHARD_TOKENS
) -> Path:
    """Tokenise a source into a folder, or go on with that, unless it was done; return the folder.

    Args:
        source: of sources.py or documents.py.
        choice: of choice.py, the tokenizer.
        min_tokens: what each split must have.
        shard_tokens: what a file has at most; what was begun goes on with its own.

    Raises:
        InputError: a source that cannot be used, a full disk, another tokenizer than asked for.
    """
    stat = source.stat()
    if _is_done(folder, source_stat=stat):
        _check_done(source, folder, min_tokens)
        return folder
    begun = _journal(folder)
    is_known = begun and _is_of(begun, choice, stat)
    facts = begun["facts"] if is_known else _scan(source, choice)
    if _is_done(folder, source_sha256=facts.get("sha256")):
        with contextlib.suppress(OSError):  # touched, or copied: next time it need not be read
            meta = read_meta(folder)
            if meta.get("source_stat") != stat:
                write_json(folder / "meta.json", meta | {"source_stat": stat})
        _check_done(source, folder, min_tokens)
        return folder
    if choice.label == "char" and "characters" in facts:
        _check_length(source, facts["characters"], min_tokens)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, lambda: _say_taken(folder)):
            folder.mkdir(exist_ok=True)  # one that was waited for may have left nothing behind
            # Another process may have done it meanwhile.
            if not _is_done(folder, stat, facts.get("sha256")):
                _Preparation(source, folder, choice, facts, stat).run(min_tokens, shard_tokens)
    except OSError as error:
        raise InputError(f"{folder}: must be writable, but: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # nothing was written: leave nothing behind
            folder.rmdir()
    return folder


def _say_taken(folder: Path) -> None:
    print(f"{folder}: another process prepares it: waiting", file=sys.stderr)


def is_prepared(source, folder: Path, choice) -> bool:
    """Return whether a source, touched or copied perhaps, lies tokenised in a folder."""
    if _is_done(folder, source_stat=source.stat()):
        return True
    is_whole = _is_done(folder, source_sha256=read_meta(folder).get("source_sha256"))
    return is_whole and _is_done(folder, source_sha256=_scan(source, choice).get("sha256"))


def _is_done(
    folder: Path, source_stat: str | None = None, source_sha256: str | None = None
) -> bool:
    meta = read_meta(folder)
    same_stat = source_stat is not None and meta.get("source_stat") == source_stat
    same_text = source_sha256 is not None and meta.get("source_sha256") == source_sha256
    return (
        (same_stat or same_text)
        and not (folder / PROGRESS).exists()
        and shards.are_whole(folder, meta)
    )


def _journal(folder: Path) -> dict | None:
    """Return progress.json, where it says of something to go on from."""
    kinds = {
        "tokenizer": str, "tokenizer_hash": str, "source_stat": str | None, "shard_tokens": int,
        "dtype": str, "facts": dict, "position": dict, "splits": dict,
    }  # fmt: skip
    try:
        begun = read_json(folder / PROGRESS)
        is_one = (
            all(isinstance(begun[name], kind) for name, kind in kinds.items())
            and all(ShardWriter.is_state(begun["splits"][split], split) for split in SPLITS)
            and begun["dtype"] in ("uint16", "uint32")
            and begun["shard_tokens"] >= 1
        )
        return begun if is_one else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _is_of(begun: dict, choice, stat: str | None, facts: dict | None = None) -> bool:
    """Return whether a journal is of a source in its tokens: of the same files, or their facts."""
    same_stat = stat is not None and begun["source_stat"] == stat
    same_text = "sha256" in begun["facts"] and begun["facts"] == facts
    return begun["tokenizer"] == choice.label and (same_stat or same_text)


def _scan(source, choice) -> dict:
    with _bar(source, "reading") as bar:
        return source.scan(choice.label == "char", lambda done: bar.update(done - bar.n))


def _bar(source, what: str, done: int = 0):
    from tqdm import tqdm

    return tqdm(
        desc=what, total=source.size, initial=done, unit=source.unit, unit_scale=True,
        dynamic_ncols=True, disable=None, leave=False, delay=1,
    )  # fmt: skip


def _check_done(source, folder: Path, min_tokens: int) -> None:
    meta = read_meta(folder)
    shortest = min(meta["train_tokens"], meta["val_tokens"])
    if shortest < min_tokens:
        raise _too_short(source, shortest, min_tokens)


def _too_short(source, shortest: int, min_tokens: int) -> InputError:
    return InputError(
        f"{source.name}: each split must have at least {_least(min_tokens)} tokens, but one gets "
        f"{shortest} ({source.split_in_words}): use more text or a smaller --block_size"
    )


def _least(min_tokens: int) -> str:
    return "1" if min_tokens == 1 else f"block_size + 1 = {min_tokens}"


def _check_length(source, n_chars: int, min_tokens: int) -> None:
    cut = train_characters(n_chars)
    shortest = min(cut, n_chars - cut)
    if shortest < min_tokens:
        raise InputError(
            f"{source.name}: each split must have at least {_least(min_tokens)} characters, but "
            f"of {n_chars} one gets {shortest}: use more text or a smaller --block_size"
        )


class _Preparation:
    """The work on one folder."""

    def __init__(self, source, folder, choice, facts, stat):
        self.source, self.folder, self.choice, self.facts = source, folder, choice, facts
        self.stat, self._has_begun = stat, False

    def run(self, min_tokens: int, shard_tokens: int) -> None:
        """Do what is left of it."""
        try:
            tokenizer, begun = self._go_on() or self._begin(shard_tokens)
            self._tokenise(tokenizer, begun, min_tokens)
        except InputError:
            if self._has_begun and _journal(self.folder) is None:
                self._delete()  # nothing to go on from
            raise
        except KeyboardInterrupt:
            print(f"\nstopped: the same command goes on with {self.folder}", file=sys.stderr)
            raise

    def _go_on(self) -> tuple[Tokenizer, dict] | None:
        """Return the tokenizer and journal of an earlier process; say why there is none to use."""
        path, begun = self.folder / PROGRESS, _journal(self.folder)
        if begun is None:
            if path.exists() and path.read_bytes().strip() != b"{}":  # as it is before the first
                self._say_anew(f"its {PROGRESS} is damaged")
            return None
        if not _is_of(begun, self.choice, self.stat, self.facts):
            if begun["tokenizer"] != self.choice.label:
                self._say_anew(f"it was begun in tokens of {begun['tokenizer']}")
            else:
                self._say_anew(f"{self.source.name} changed")
            return None
        try:
            tokenizer = tokenizers.load(self.folder)
        except InputError:
            tokenizer = None
        if tokenizer is None or tokenizers.hash_of(tokenizer) != begun["tokenizer_hash"]:
            self._say_anew(f"its {tokenizers.FILE_NAME} changed")
            return None
        states, dtype = begun["splits"], begun["dtype"]
        if not all(ShardWriter.recover(self.folder, s, dtype, states[s]) for s in SPLITS):
            self._say_anew("token files are missing or cut off")
            return None
        self.facts = begun["facts"]
        return tokenizer, begun | {"source_stat": self.stat}

    def _say_anew(self, why: str) -> None:
        print(f"{self.folder}: is begun anew, since {why}", file=sys.stderr)

    def _begin(self, shard_tokens: int) -> tuple[Tokenizer, dict]:
        """Make the tokenizer, and place in the folder; return it and the first journal."""
        tokenizer = self.choice.make(self.source, self.facts)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        replaced = shards.written(self.folder)
        freed = sum(path.stat().st_size for path in replaced)
        costs.say(self.source, self.folder, tokenizer, np.dtype(dtype).itemsize, freed)
        # First of all, so that nobody takes for whole what is not yet, or not any more.
        write_atomically(self.folder / PROGRESS, b"{}\n")
        self._has_begun = True
        (self.folder / "meta.json").unlink(missing_ok=True)
        for path in replaced:
            path.unlink()
        write_atomically(self.folder / tokenizers.FILE_NAME, f"{tokenizer.to_json()}\n".encode())
        return tokenizer, {
            "tokenizer": self.choice.label,
            "tokenizer_hash": tokenizers.hash_of(tokenizer),
            "source_stat": self.stat,
            "shard_tokens": shard_tokens,
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
                self.folder, split, begun["dtype"], begun["shard_tokens"], begun["splits"][split]
            )
            for split in SPLITS
        }
        begun_tokens = sum(writer.tokens for writer in writers.values())
        if begun_tokens:
            print(f"going on with {self.folder} from {begun_tokens:,} tokens")
        begun_s = saved_s = time.monotonic()
        n_shards = 0
        # What is done is noted after a batch: of small shards each, and not only every hundredth.
        most_bytes = min(BATCH_BYTES, 4 * begun["shard_tokens"])
        pieces = self.source.pieces(self.facts, begun["position"])
        try:
            with _bar(self.source, str(self.folder), begun.get("done", 0)) as bar:
                for batch in read_ahead(in_batches(pieces, most_bytes)):
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
        changed = self.source.stat() != self.stat and not self._is_the_same()
        if changed or shortest < min_tokens:
            for writer in writers.values():
                writer.close()
            self._delete()
        if changed:
            raise InputError(f"{self.source.name}: changed while it was read: start again")
        if shortest < min_tokens:
            raise _too_short(self.source, shortest, min_tokens)
        splits = {split: writer.finish() for split, writer in writers.items()}
        meta = {
            "source": self.source.name,
            "source_sha256": self.facts.get("sha256"),
            "source_revision": self.facts.get("revision"),
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
        write_json(self.folder / "meta.json", meta)
        (self.folder / PROGRESS).unlink()
        self._tidy()
        n_chars = self.facts.get("characters")
        of_chars = f"{n_chars:,} characters, " if n_chars else ""
        is_char = isinstance(tokenizer, CharTokenizer)
        kind = "distinct" if is_char else f"known to {self.choice.label}"
        print(
            f"prepared {self.source.name}: {of_chars}{tokenizer.vocab_size:,} {kind}; "
            f"{meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate"
        )

    def _is_the_same(self) -> bool:
        """Read the source again: it may have been touched only."""
        return "sha256" in self.facts and _scan(self.source, self.choice) == self.facts

    def _tidy(self) -> None:
        """Delete what a process that was killed left of small files it wrote."""
        for path in self.folder.glob("*.json.*.partial"):
            path.unlink()

    def _delete(self) -> None:
        self._tidy()
        for path in shards.written(self.folder):
            path.unlink()
        for name in (tokenizers.FILE_NAME, PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
