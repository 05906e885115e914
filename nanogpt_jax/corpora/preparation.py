"""Tokenize a source into a folder; safe to interrupt and resume.

The source is read in items. The tokens of a few consecutive items form a part, a file that is
written atomically; resuming continues after the last part. When all parts are there, they are
joined to token files, and `meta.json` is written last. Progress is stored nowhere else, so the
result is the same byte for byte however often it was killed.
"""

import contextlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nanogpt_jax import files
from nanogpt_jax.corpora import encoding, shards
from nanogpt_jax.corpora.readers import Key, grouped
from nanogpt_jax.corpora.shards import PROGRESS, Counts, read_meta
from nanogpt_jax.corpora.sources import START, Source
from nanogpt_jax.corpora.text import anywhere
from nanogpt_jax.corpora.tokenizer import CharTokenizer, Tokenizer
from nanogpt_jax.corpora.tokenizer_files import TOKENIZER_FILE, load_tokenizer, save_tokenizer
from nanogpt_jax.corpora.tokenizer_spec import TokenizerSpec, tokenizer_hash
from nanogpt_jax.errors import InputError

PART_CHARS = 2**21  # at least, in a part
BPE_CHARS = 100_000_000  # that BPE is trained on, at most
LARGE_BYTES = 10**9  # train.py does not prepare a larger source by itself
BYTES_PER_TOKEN = 3.5  # a low estimate for byte pairs; GPT-2's have 4.4 in English

# The tokenizer, the plan, the key of the last item that is done, and the counts up to it.
Begun: TypeAlias = tuple[Tokenizer, dict, Key, Counts]


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
        if refusal and not read_meta(folder).get("source_sha256"):
            raise InputError(refusal)  # whatever the text is: it need not be read
        old = shards.read_plan(folder)
        info = old["info"] if old and old["stat"] == stat else _identity(source)
        if _is_done(folder, stat, info.get("sha256")):
            with contextlib.suppress(OSError):  # touched or copied: the next start need not read it
                files.write_json(folder / "meta.json", read_meta(folder) | {"source_stat": stat})
        elif refusal:
            raise InputError(refusal)
        else:
            plan = {"stat": stat, "info": info, "shard_tokens": shard_tokens}
            begin = (source, folder, spec, min_tokens, plan)
            # Before the lock: a source that is refused at once leaves nothing behind.
            begun = None if (folder / PROGRESS).exists() else _begin(*begin)
            waiting = f"waiting for another process to finish preparing {folder}"
            try:
                with (
                    writing(folder),
                    files.locked(folder, lambda: print(waiting, file=sys.stderr), is_beside=True),
                ):
                    if not _is_done(folder, stat, info.get("sha256")):  # by another process
                        begun = _resume(source, folder, plan) or begun or _begin(*begin)
                        _prepare(source, folder, min_tokens, *begun)
            except KeyboardInterrupt:
                print(f"\nstopped: the same command resumes {folder}", file=sys.stderr)
                raise
    meta = read_meta(folder)
    _check_length(source, (meta["train_tokens"], meta["val_tokens"]), min_tokens)
    return folder


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing to a dataset's folder into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: must be writable, but: {error.strerror}; free some space or pass another "
            "folder with --data_dir"
        ) from None


def _is_done(folder: Path, stat: str, sha256: str | None = None) -> bool:
    """Return whether a folder has all tokens of a source, which may have been touched or copied."""
    meta = read_meta(folder)
    same_stat = stat in (meta.get("source_stat"), meta.get("source"))  # the latter of the Hub's
    same_text = sha256 is not None and meta.get("source_sha256") == sha256
    return (same_stat or same_text) and shards.are_complete(folder, meta)


def _identity(source: Source) -> dict:
    with _progress(source, "checking") as advance:
        return source.identify(advance)


def _check_length(
    source: Source, sizes: Collection[int], min_tokens: int, unit: str = "tokens"
) -> None:
    if min(sizes) < min_tokens:
        least = "1" if min_tokens == 1 else f"block_size + 1 = {min_tokens}"
        raise InputError(
            f"{source.name}: each split must have at least {least} {unit}, but of {sum(sizes)} one "
            f"gets {min(sizes)} ({source.split_in_words}): use more text or a smaller --block_size"
        )


@contextlib.contextmanager
def _progress(source: Source, what: str, done: int = 0) -> Iterator[Callable[[float], object]]:
    """Show a bar; yield the function that moves it to how many of the source's bytes are done."""
    from tqdm import tqdm

    with tqdm(
        desc=what, total=source.size, initial=done, unit="B", unit_scale=True, dynamic_ncols=True,
        disable=None, leave=False, delay=1,
    ) as bar:  # fmt: skip
        yield lambda done: bar.update(int(done) - bar.n)


def _prepare(
    source: Source, folder: Path, min_tokens: int,
    tokenizer: Tokenizer, plan: dict, key: Key, counts: Counts,
) -> None:  # fmt: skip
    """Tokenize a source after the item with a key, and join all parts."""
    if key != START:
        print(f"resuming {folder} from {counts.train + counts.val:,} tokens")
    items = source.items(plan["info"], tokenizer.can_cut, key)
    batches = grouped(items, lambda item: sum(len(text or "") for text in item.texts), PART_CHARS)
    with _progress(source, str(folder), counts.done) as advance:
        for batch in files.read_ahead(batches, 1):
            ids = encoding.encode_items(batch, source, plan, tokenizer, counts)
            if key == START:
                # Only now: a source that cannot be read leaves an older corpus as it was.
                shards.begin(folder, plan)
                save_tokenizer(tokenizer, folder)
            key = batch[-1].key
            shards.write_part(folder, key, counts, ids)
            advance(counts.done)
    try:
        if source.stat() != plan["stat"] and not _identity(source).items() <= plan["info"].items():
            raise InputError(
                f"{source.name}: must not change while it is read, but did: run the command again"
            )
        _check_length(source, (counts.train, counts.val), min_tokens)
    except InputError:
        if key != START:
            shards.delete(folder)
        raise
    _finish(source, folder, tokenizer, plan, counts)


def _resume(source: Source, folder: Path, new: dict) -> Begun | None:
    """Return how far an earlier process got, or print why its work cannot be reused."""
    plan, part = shards.read_plan(folder), shards.last_part(folder)
    if part is None or not (folder / PROGRESS).exists():
        return None
    tokenizer = load_tokenizer(folder)
    if plan is None or tokenizer is None:
        why = f"its {PROGRESS} is damaged or of another version"
    elif not new["info"].items() <= plan["info"].items():
        why = f"{source.name} changed"
    elif tokenizer_hash(tokenizer) != plan["tokenizer_hash"]:
        why = f"its {TOKENIZER_FILE} changed"
    else:
        return tokenizer, plan | {"stat": new["stat"]}, *part
    print(f"{folder}: starting over because {why}", file=sys.stderr)
    return None


def _begin(source: Source, folder: Path, spec: TokenizerSpec, min_tokens: int, new: dict) -> Begun:
    """Return the tokenizer, plan and beginning of a new preparation; write nothing."""
    with _progress(source, "reading") as advance:
        info = new["info"] | source.survey(new["info"], spec.is_char, advance)
    if spec.is_char and source.is_cut:
        n_train = encoding.train_characters(info["characters"])
        _check_length(source, (n_train, info["characters"] - n_train), min_tokens, "characters")
    tokenizer = spec.make(info.get("chars", ""), _first_texts(source, info, BPE_CHARS))
    try:
        tokenizer.encode(info.get("chars", ""))
    except InputError as error:  # it names all that a file's tokenizer does not know
        raise InputError(f"{source.name}: {error}, or train from scratch") from None
    sample = "".join(_first_texts(source, info, 10_000))[:10_000]
    if tokenizer.decode(tokenizer.encode(sample)) != sample:
        raise InputError(
            f"{source.name}: the tokenizer must decode its tokens back to the same text, but does "
            "not: pass another --tokenizer"
        )
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    _check_space(source, folder, tokenizer, np.dtype(dtype).itemsize)
    plan = new | {"info": info, "dtype": dtype, "items": shards.ITEMS}
    plan |= {"tokenizer": spec.label, "tokenizer_hash": tokenizer_hash(tokenizer)}
    return tokenizer, plan, START, Counts()


def _first_texts(source: Source, info: dict, max_chars: int) -> Iterator[str]:
    """Yield the first texts of a source, until they have max_chars characters."""
    n_chars = 0
    for item in source.items(info, anywhere):
        for text in filter(None, item.texts):
            yield text
            n_chars += len(text)
            if n_chars >= max_chars:
                return


def _finish(source: Source, folder: Path, tokenizer: Tokenizer, plan: dict, counts: Counts) -> None:
    splits = {split: shards.join(folder, split, plan) for split in ("val", "train")}
    meta = {
        "source": source.name,
        "source_sha256": plan["info"].get("sha256"),
        "source_revision": plan["info"].get("revision"),
        "source_stat": plan["stat"],
        "split": source.split_in_words,
        "tokenizer": plan["tokenizer"],
        "tokenizer_hash": plan["tokenizer_hash"],
        "dtype": plan["dtype"],
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": counts.train,
        "val_tokens": counts.val,
        "splits": splits,
    }
    shards.finish(folder, meta)
    kind = f"tokens in the vocabulary ({plan['tokenizer']})"
    kind = "distinct" if plan["tokenizer"] == "char" else kind
    skipped = f" (and {counts.skipped:,} empty ones)" if counts.skipped else ""
    texts = f"{counts.documents:,} texts{skipped}, " if source.has_separators else ""
    print(
        f"prepared {source.name}: {texts}{counts.chars:,} characters, "
        f"{tokenizer.vocab_size:,} {kind}; {counts.train:,} tokens for training, "
        f"{counts.val:,} for validation ({source.split_in_words})"
    )
    if source.files_in_words:
        print(source.files_in_words)


def _check_space(source: Source, folder: Path, tokenizer: Tokenizer, id_bytes: int) -> None:
    """Print what a large source needs, and refuse one whose tokens the disk cannot hold."""
    free_bytes = shutil.disk_usage(files.check_place(folder, "data_dir")).free
    free_bytes += sum(path.stat().st_size for path in shards.written(folder))  # will be replaced
    n_tokens = source.text_bytes / (1 if isinstance(tokenizer, CharTokenizer) else BYTES_PER_TOKEN)
    need = (
        f"the tokens of {source.name} need about {n_tokens * id_bytes / 1e9:,.2f} GB in {folder}, "
        f"where {free_bytes / 1e9:,.2f} GB are free"
    )
    if n_tokens * id_bytes > free_bytes:
        raise InputError(f"{need}: free some space or pass another folder with --data_dir")
    if source.text_bytes > LARGE_BYTES:
        print(f"{need}. Stop at any time; the same command continues", file=sys.stderr)
