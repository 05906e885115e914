"""Tokenize a source into a folder; safe to interrupt and resume.

Token files only grow. Meanwhile the folder has a `progress.json`: how much of the source has been
read, and how many tokens each split had then. To resume, the files are cut back to that, so they
come out byte for byte as if nothing had happened. `meta.json` is written last.
"""

import contextlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nanogpt_jax import files
from nanogpt_jax.config import SPLITS
from nanogpt_jax.corpora import shards
from nanogpt_jax.corpora.shards import PROGRESS, read_meta
from nanogpt_jax.corpora.sources import Piece, Source, train_characters
from nanogpt_jax.corpora.text import PIECE_BYTES
from nanogpt_jax.corpora.tokenizer import (
    TOKENIZER_FILE,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
)
from nanogpt_jax.corpora.tokenizer_spec import TokenizerSpec
from nanogpt_jax.errors import InputError

BATCH_BYTES = 2**21  # tokenized at once, on all cores; the tokenizer needs some 200 MB for it
BATCH_PIECES = 2**15
SAVE_S = 10.0  # of work that a kill can lose
BPE_CHARS = 100_000_000  # that BPE is trained on, at most
LARGE_BYTES = 10**9  # of a source that is estimated before it is prepared
GPT2_VOCAB_SIZE = 50257
CHARS_PER_S = 20e6


def prepare_folder(
    source: Source, folder: Path, spec: TokenizerSpec, min_tokens: int, shard_tokens: int,
    refusal: str | None = None,
) -> Path:  # fmt: skip
    """Tokenize a source into a folder unless that is done already; return the folder.

    Args:
        min_tokens: what each split must have.
        shard_tokens: the most a file may have; a preparation that resumes keeps its own.
        refusal: the error if the source must not be prepared now.

    Raises:
        InputError: the source cannot be used, or the folder cannot be written.
    """
    stat = source.stat()
    if not _is_done(folder, stat):
        if refusal and not _is_done(folder, stat, read_meta(folder).get("source_sha256")):
            raise InputError(refusal)  # whatever the text is: it need not be read
        journal = _read_journal(folder)
        if journal and stat and journal["source_stat"] == stat:
            info = journal["source_info"]
        else:
            info = _scan(source, spec)
        if _is_done(folder, stat, info.get("sha256")):
            with contextlib.suppress(OSError):  # touched or copied: spare the next start the scan
                if stat:
                    files.write_json(
                        folder / "meta.json", read_meta(folder) | {"source_stat": stat}
                    )
        elif refusal:
            raise InputError(refusal)
        else:
            new = {
                "source_stat": stat, "source_info": info, "position": None, "done": 0,
                "tokens": dict.fromkeys(SPLITS, 0), "shard_tokens": shard_tokens,
            }  # fmt: skip
            _prepare(source, folder, spec, min_tokens, new)
    meta = read_meta(folder)
    _check_length(source, (meta["train_tokens"], meta["val_tokens"]), min_tokens)
    return folder


def unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path}: must be writable, but: {error.strerror}; free some space or pass another folder "
        "with --data_dir"
    )


def _is_done(folder: Path, stat: str | None, sha256: str | None = None) -> bool:
    """Return whether a folder has all tokens of a source, which may have been touched or copied."""
    meta = read_meta(folder)
    same_stat = stat is not None and meta.get("source_stat") == stat
    same_text = sha256 is not None and meta.get("source_sha256") == sha256
    return (same_stat or same_text) and shards.are_complete(folder, meta)


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
    """Return the content of a folder's progress.json, or None if it has none or is damaged."""
    try:
        crc32, content = files.read_json(folder / PROGRESS)
        return json.loads(content) if zlib.crc32(content.encode()) == crc32 else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _write_journal(folder: Path, journal: dict) -> None:
    content = json.dumps(journal)
    stored = json.dumps([zlib.crc32(content.encode()), content])
    files.write_atomically(folder / PROGRESS, stored.encode())


def _scan(source: Source, spec: TokenizerSpec) -> dict:
    with _bar(source, "reading") as bar:
        return source.scan(spec.label == "char", lambda done: bar.update(done - bar.n))


def _bar(source: Source, what: str, done: int = 0):
    from tqdm import tqdm

    return tqdm(
        desc=what, total=source.size, initial=done, unit=source.unit, unit_scale=True,
        dynamic_ncols=True, disable=None, leave=False, delay=1,
    )  # fmt: skip


def _prepare(source: Source, folder: Path, spec: TokenizerSpec, min_tokens: int, new: dict) -> None:
    """Begin, with a new journal, or resume; leave nothing behind if it fails for good."""
    info, stat = new["source_info"], new["source_stat"]
    if spec.label == "char" and (n_chars := info.get("characters")):
        n_train = train_characters(n_chars)
        _check_length(source, (n_train, n_chars - n_train), min_tokens, "characters")
    waiting = f"waiting for another process that prepares {folder}"
    existing = files.check_place(folder.parent, "data_dir")
    try:
        with files.locked(folder, lambda: print(waiting, file=sys.stderr)):
            if _is_done(folder, stat, info.get("sha256")):  # by the other process
                return
            tokenizer, journal = _resume(source, folder, new) or _begin(source, folder, spec, new)
            try:
                _tokenize(source, folder, tokenizer, journal)
                journal["position"] = None  # there is nothing left to resume
                if source.stat() != stat and _scan(source, spec) != journal["source_info"]:
                    raise InputError(
                        f"{source.name}: must not change while it is read, but did: run the "
                        "command again"
                    )
                _check_length(source, journal["tokens"].values(), min_tokens)
            except InputError:
                if journal["position"] is None:
                    _delete(folder)
                raise
            _finish(source, folder, tokenizer, journal)
    except OSError as error:
        raise unwritable(folder, error) from None
    except KeyboardInterrupt:
        print(f"\nstopped: the same command resumes {folder}", file=sys.stderr)
        raise
    finally:
        for place in (folder.absolute(), *folder.absolute().parents):
            if place == existing:
                break
            with contextlib.suppress(OSError):  # it has files
                place.rmdir()


def _resume(source: Source, folder: Path, new: dict) -> tuple[Tokenizer, dict] | None:
    """Return the tokenizer and journal of an earlier process, or print why that cannot be."""
    journal = _read_journal(folder)
    if journal is None and not (folder / PROGRESS).exists():
        return None
    if journal is None:
        why = f"its {PROGRESS} is damaged or of another version"
    elif journal["position"] is None:  # it had only begun
        return None
    elif journal["source_info"] != new["source_info"]:
        why = f"{source.name} changed"
    elif (tokenizer := _tokenizer_of(folder, journal)) is None:
        why = f"its {TOKENIZER_FILE} changed"
    elif not shards.cut_back(folder, journal):
        why = "token files are missing or cut off"
    else:
        return tokenizer, journal | {"source_stat": new["source_stat"]}
    print(f"{folder}: starting over, since {why}", file=sys.stderr)
    return None


def _tokenizer_of(folder: Path, journal: dict) -> Tokenizer | None:
    with contextlib.suppress(InputError):
        tokenizer = load_tokenizer(folder)
        if tokenizer and tokenizer_hash(tokenizer) == journal["tokenizer_hash"]:
            return tokenizer
    return None


def _begin(source: Source, folder: Path, spec: TokenizerSpec, new: dict) -> tuple[Tokenizer, dict]:
    """Return a new tokenizer and journal; delete what the folder had before."""
    texts = _first_texts(source.pieces(new["source_info"]), BPE_CHARS)
    tokenizer = spec.make(new["source_info"].get("chars", ""), texts)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    _estimate(source, folder, tokenizer, np.dtype(dtype).itemsize)
    identity = {"tokenizer": spec.label, "tokenizer_hash": tokenizer_hash(tokenizer)}
    journal = new | identity | {"dtype": dtype}
    # First of all, so that nobody takes an incomplete folder for a complete one.
    _write_journal(folder, journal)
    (folder / "meta.json").unlink(missing_ok=True)
    shards.cut_back(folder, journal)
    save_tokenizer(tokenizer, folder)
    return tokenizer, journal


def _tokenize(source: Source, folder: Path, tokenizer: Tokenizer, journal: dict) -> None:
    """Append the tokens of the rest of a source to the files, and keep the journal up to date."""
    separator = np.zeros(0, np.int64)
    if tokenizer.separator:
        separator = tokenizer.encode_prompt(tokenizer.separator)  # as a token, not as text
    dtype, shard_tokens = np.dtype(journal["dtype"]).newbyteorder("<"), journal["shard_tokens"]
    tokens = dict(journal["tokens"])  # in the files, perhaps not on the disk yet
    n_before = n_saved = sum(tokens.values())
    if n_before:
        print(f"resuming {folder} from {n_before:,} tokens")
    start_s = saved_s = time.monotonic()
    # The journal is written between batches; small shards need small batches.
    max_bytes = min(BATCH_BYTES, 4 * shard_tokens)
    pieces = source.pieces(journal["source_info"], journal["position"])
    with _bar(source, str(folder), journal["done"]) as bar:
        for batch in _read_ahead(_in_batches(pieces, max_bytes)):
            texts = [piece.text for piece in batch if piece.text is not None]
            encoded = iter(tokenizer.encode_batch(texts))
            parts = {split: [np.zeros(0, dtype)] for split in SPLITS}
            for piece in batch:
                parts[piece.split].append(separator if piece.text is None else next(encoded))
            for split in SPLITS:
                ids = np.concatenate(parts[split], dtype=dtype, casting="unsafe")
                shards.append(folder, split, tokens[split], ids, shard_tokens)
                tokens[split] += len(ids)
            n, now_s = sum(tokens.values()), time.monotonic()
            speed = (n - n_before) / (now_s - start_s)
            bar.set_postfix_str(f"{n:,} tokens, {speed:,.0f}/s", refresh=False)
            bar.update(batch[-1].done - bar.n)
            is_due = n - n_saved >= shard_tokens or now_s - saved_s > SAVE_S
            if is_due and batch[-1].position is not None:
                shards.sync(folder, journal["tokens"], tokens, shard_tokens)
                at = {"position": batch[-1].position, "done": batch[-1].done}
                journal |= at | {"tokens": dict(tokens)}
                _write_journal(folder, journal)
                n_saved, saved_s = n, now_s
    shards.sync(folder, journal["tokens"], tokens, shard_tokens)
    journal["tokens"] = tokens


def _first_texts(pieces: Iterable[Piece], max_chars: int) -> Iterator[str]:
    """Yield the texts of pieces until they have max_chars characters."""
    n_chars = 0
    for piece in pieces:
        if piece.text is not None:
            yield piece.text
            n_chars += len(piece.text)
        if n_chars >= max_chars:
            return


def _in_batches(pieces: Iterable[Piece], max_bytes: int) -> Iterator[list[Piece]]:
    """Yield pieces in batches, each of which ends where reading can resume, if possible."""
    batch, n_bytes = [], 0
    for piece in pieces:
        batch.append(piece)
        n_bytes += len((piece.text or "").encode())
        is_full = n_bytes >= max_bytes or len(batch) >= BATCH_PIECES
        if (is_full and piece.position is not None) or n_bytes >= max_bytes + 4 * PIECE_BYTES:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _read_ahead(batches: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
    """Yield batches; read the next one in a thread meanwhile."""
    pool = ThreadPoolExecutor(1)
    try:
        upcoming = pool.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(next, batches, None)
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _finish(source: Source, folder: Path, tokenizer: Tokenizer, journal: dict) -> None:
    splits = {split: shards.finish(folder, split, journal) for split in SPLITS}
    info = journal["source_info"]
    meta = {
        "source": source.name,
        "source_sha256": info.get("sha256"),
        "source_revision": info.get("revision"),
        "source_stat": journal["source_stat"],
        "split": source.split_in_words,
        "tokenizer": journal["tokenizer"],
        "tokenizer_hash": journal["tokenizer_hash"],
        "dtype": journal["dtype"],
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": splits["train"]["tokens"],
        "val_tokens": splits["val"]["tokens"],
        "splits": splits,
    }
    files.write_json(folder / "meta.json", meta)
    (folder / PROGRESS).unlink()
    files.delete_partials(folder)  # of a killed process
    of_chars = f"{info['characters']:,} characters, " if "characters" in info else ""
    is_char = isinstance(tokenizer, CharTokenizer)
    kind = "distinct" if is_char else f"tokens in the vocabulary ({journal['tokenizer']})"
    print(
        f"prepared {source.name}: {of_chars}{tokenizer.vocab_size:,} {kind}; "
        f"{meta['train_tokens']:,} tokens for training, {meta['val_tokens']:,} for validation"
    )


def _delete(folder: Path) -> None:
    files.delete_partials(folder)
    for path in (*shards.written(folder), folder / TOKENIZER_FILE, folder / PROGRESS):
        path.unlink(missing_ok=True)


def _estimate(source: Source, folder: Path, tokenizer: Tokenizer, id_bytes: int) -> None:
    """Print what a large source needs, and refuse one whose tokens the disk cannot hold."""
    replaced_bytes = sum(path.stat().st_size for path in shards.written(folder))
    free_bytes = shutil.disk_usage(folder).free + replaced_bytes
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
