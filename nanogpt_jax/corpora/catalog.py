"""Get a corpus onto disk, as nanoGPT lays it out: `train.bin`, `val.bin`, `meta.json`. No JAX.

A corpus is a name, a text file, JSONL or parquet file, a folder of them, or a folder that already
has `train.bin` and `val.bin`, made by nanoGPT or by anything else.
"""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np

from nanogpt_jax import files
from nanogpt_jax.corpora import costs, download, shards
from nanogpt_jax.corpora import tokenizer as tokenizers
from nanogpt_jax.corpora.choice import Choice
from nanogpt_jax.corpora.dataset import Corpus, open_corpus, tokenizer_of_nanogpt
from nanogpt_jax.corpora.documents import HUB, Hub, JsonLines, Parquet
from nanogpt_jax.corpora.prepare import is_prepared, prepare_folder
from nanogpt_jax.corpora.shards import PROGRESS, SHARD_TOKENS
from nanogpt_jax.corpora.text import Texts
from nanogpt_jax.errors import InputError, did_you_mean
from nanogpt_jax.files import check_place

__all__ = ["Corpus", "known_val_tokens", "open_corpus", "prepare", "resolve"]

SHAKESPEARE, SHAKESPEARE_BPE, PYDOCS = "shakespeare_char", "shakespeare", "pydocs"
NAMES = (SHAKESPEARE, SHAKESPEARE_BPE, PYDOCS, *HUB)
SHAKESPEARE_VAL_TOKENS = 111_540
SHAKESPEARE_FINGERPRINT = "a320d332271226fa"
KINDS = {".parquet": Parquet, ".jsonl": JsonLines, ".jsonl.gz": JsonLines, ".txt": Texts}


def resolve(
    dataset: str | None,
    data_dir: Path,
    min_tokens: int,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
) -> Path:
    """Return the folder with a dataset's `train.bin` and `val.bin`; prepare it where it must be.

    Only where the user named nothing, and nothing can be downloaded, Python's own manual stands in
    for tiny Shakespeare, with a notice. What takes hours is not begun, but refused.

    Args:
        dataset: a name, a path, or None for the default.
        data_dir: where datasets are prepared.
        min_tokens: what each split must have; nothing is written for a text that is too short.
        tokenizer: char, gpt2, bpe or a tokenizer.json; None: what the dataset usually has.
        vocab_size: of bpe.

    Raises:
        InputError: an unknown name, a text that cannot be read, is empty or too short.
        download.Unavailable: a dataset that was named and cannot be downloaded.
    """
    if dataset in HUB:
        folder = _named_folder(dataset, Path(data_dir), _choice(dataset, tokenizer, vocab_size))
        finished = (folder / "meta.json").exists() and not (folder / PROGRESS).exists()
        if not finished and not shards.is_foreign(folder):
            raise InputError(_how_to_prepare(HUB[dataset], data_dir, tokenizer, vocab_size))
        if finished:
            return folder
    if dataset is not None:
        return prepare(dataset, data_dir, min_tokens, tokenizer, vocab_size, is_training=True)
    try:
        return prepare(SHAKESPEARE, data_dir, min_tokens, tokenizer, vocab_size)
    except download.Unavailable as error:
        folder = prepare(PYDOCS, data_dir, min_tokens, tokenizer, vocab_size)
        stars = "*" * 88
        print(
            f"\n{stars}\n"
            "  THIS WILL NOT BE SHAKESPEARE: it could not be downloaded. Training goes on with\n"
            "  `pydocs`, the manual that ships inside every Python, so the model will write\n"
            "  Python prose, and its losses are not those of the README.\n"
            f"  To train on Shakespeare, save\n    {download.SHAKESPEARE_URLS[0]}\n"
            f"  as\n    {Path(data_dir, SHAKESPEARE, 'input.txt')}\n"
            f"  and run the same command again. What went wrong: {error.reason}\n{stars}\n",
            flush=True,
        )
        return folder


def _how_to_prepare(source, data_dir: Path, tokenizer: str | None, size: int | None) -> str:
    flags = f" --tokenizer {tokenizer}" if tokenizer else ""
    flags += f" --vocab_size {size}" if tokenizer == "bpe" and size else ""
    flags += f" --data_dir {data_dir}" if Path(data_dir) != Path("data") else ""
    command = f"python data/prepare.py {source.name}{flags}"
    if not isinstance(source, Hub):
        return f"{source.name} must be prepared before training, since that takes long: {command}"
    return (
        f"{source.name} must be prepared before training, since that takes hours: {command}. It "
        f"needs about {source.gpt2_tokens / 5e8:,.0f} GB of disk ({source.gpt2_tokens / 1e9:,.2f}B "
        f"tokens) and downloads about {source.download_bytes / 1e9:,.0f} GB, which are not stored"
    )


def prepare(
    dataset: str,
    data_dir: Path,
    min_tokens: int = 1,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    is_training: bool = False,
) -> Path:
    """Return the folder of a named dataset, prepared, however long it takes; see `resolve`.

    Args:
        shard_tokens: most tokens of a file.
        is_training: refuse what takes long.
    """
    data_dir = Path(data_dir)
    check_place(data_dir, "data_dir")
    if dataset in NAMES:
        choice = _choice(dataset, tokenizer, vocab_size)
        folder = _named_folder(dataset, data_dir, choice)
        if shards.is_foreign(folder):  # prepared elsewhere, and brought here
            if tokenizer is not None or tokenizers.load(folder) is None:
                _give_tokenizer(folder, tokenizer or choice.label, vocab_size)
            return folder
        source = _named_source(dataset, data_dir)
        return prepare_folder(source, folder, choice, min_tokens, shard_tokens)
    for path in (data_dir / dataset, Path(dataset)):
        shards.check_finished(path)
        if shards.has_tokens(path):
            if tokenizer is not None:
                _give_tokenizer(path, tokenizer, vocab_size)
            return path
        if path.is_file() or path.is_dir():
            source = find_source(path)
            usual = "char" if isinstance(source, Texts) else "gpt2"
            choice = Choice.of(tokenizer or usual, vocab_size)
            folder = _folder_of(path, data_dir, choice.label)
            is_large = source.text_bytes > costs.LARGE_BYTES
            if is_training and is_large and not is_prepared(source, folder, choice):
                raise InputError(_how_to_prepare(source, data_dir, tokenizer, vocab_size))
            return prepare_folder(source, folder, choice, min_tokens, shard_tokens)
    prepared = [path.name for path in data_dir.glob("*") if path.is_dir()]
    hint = did_you_mean(dataset, {*NAMES, *prepared})
    hint = hint or f" If you have its train.bin and val.bin, put them into {data_dir / dataset}"
    raise InputError(
        f"dataset must be one of {', '.join(NAMES)}, a text file or a folder, but there is no "
        f"{dataset!r}.{hint}"
    )


def _choice(name: str, tokenizer: str | None, vocab_size: int | None) -> Choice:
    usual = "char" if name in (SHAKESPEARE, PYDOCS) else "gpt2"
    return Choice.of(tokenizer or usual, vocab_size)


def _named_folder(name: str, data_dir: Path, choice: Choice) -> Path:
    is_usual = choice.label == _choice(name, None, None).label
    return data_dir / (name if is_usual else f"{name}-{choice.label}")


def _named_source(name: str, data_dir: Path):
    if name in HUB:
        return HUB[name]
    if name == PYDOCS:
        from pydoc_data.topics import topics

        return Texts("pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics)))
    places = [data_dir / place / "input.txt" for place in (SHAKESPEARE, SHAKESPEARE_BPE)]
    path = next((path for path in places if path.exists()), data_dir / name / "input.txt")
    if not path.exists():
        _store_shakespeare(path)
    return Texts(str(path), [path])


def _store_shakespeare(path: Path) -> None:
    content = download.tiny_shakespeare(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, content)
    except OSError as error:
        raise InputError(f"{path}: must be writable, but: {error.strerror}") from None
    print(f"downloaded tiny Shakespeare to {path}")


def find_source(path: Path):
    """Return the source of a file, or of all files of one kind below a folder, by their names.

    Raises:
        InputError: there are none, or several kinds.
    """
    if path.is_file():
        kind = next((KINDS[end] for end in KINDS if path.name.endswith(end)), Texts)
        return kind(str(path), [path])
    found = {end: sorted(path.rglob(f"*{end}")) for end in KINDS}
    found = {end: files for end, files in found.items() if files}
    if not found:
        raise InputError(
            f"{path}: must have .txt files, or train.bin and val.bin, or .jsonl or .parquet files, "
            "but has none"
        )
    if len(found) > 1:
        counts = " and ".join(f"{len(files)} {end}" for end, files in found.items())
        raise InputError(
            f"{path}: must have files of one kind, but has {counts}: name one folder "
            "or file of them"
        )
    ((end, files),) = found.items()
    return KINDS[end](str(path), files)


def _folder_of(source: Path, data_dir: Path, label: str) -> Path:
    """Return where one's own text is prepared: a hash keeps two books called input.txt apart."""
    place = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:8]
    suffix = "" if label == "char" else f"-{label}"
    return data_dir / f"{source.resolve().stem[:50]}-{place}{suffix}"  # a name has 255 bytes


def _give_tokenizer(folder: Path, asked: str, vocab_size: int | None) -> None:
    """Refuse a folder that has another tokenizer; put the one that was asked for where none is."""
    meta, choice = shards.read_meta(folder), Choice.of(asked, vocab_size)
    dtype = meta.get("dtype", "uint16")
    has = tokenizers.load(folder) or tokenizer_of_nanogpt(folder, dtype)
    if has is not None and not choice.made(has, meta.get("tokenizer")):
        raise InputError(
            f"{folder}: --tokenizer must be the one that its token files were made with, but "
            f"{asked} is another: leave it out, or name the text itself"
        )
    if has is not None or choice.label == "char":
        return
    if choice.vocab_size is not None:
        raise InputError(
            f"{folder}: bpe is trained on a text, but the folder has none: name the "
            f"{tokenizers.FILE_NAME} that its token files were made with"
        )
    try:
        made = choice.make(None, {})
    except InputError as error:  # training needs none
        print(f"{folder}: what is trained on it cannot be read as text: {error}", file=sys.stderr)
        return
    path = folder / shards.files_of(folder, "train", meta)[0]["name"]
    largest = int(np.fromfile(path, dtype, 2**20).max(initial=0))
    if largest >= made.vocab_size:
        raise InputError(
            f"{path}: --tokenizer must be the one it was made with, but {asked} has "
            f"{made.vocab_size} tokens, and an id there is {largest}"
        )
    try:
        content = f"{made.to_json()}\n".encode()
        files.write_atomically(folder / tokenizers.FILE_NAME, content)
    except OSError as error:
        raise InputError(f"{folder}: must be writable, but: {error.strerror}") from None


def known_val_tokens(
    dataset: str | None, data_dir: Path, tokenizer: str | None = None, vocab_size: int | None = None
) -> int | None:
    """Return the size of a dataset's validation split; None where it is not prepared here."""
    data_dir, name = Path(data_dir), dataset or SHAKESPEARE
    if name in NAMES:
        places = [_named_folder(name, data_dir, _choice(name, tokenizer, vocab_size))]
    else:
        labels = [Choice.of(tokenizer, vocab_size).label] if tokenizer else ["char", "gpt2"]
        places = [data_dir / name, Path(name)]
        places += [_folder_of(Path(name), data_dir, label) for label in labels]
    for folder in places:
        if shards.has_tokens(folder):
            meta = shards.read_meta(folder)
            if "val_tokens" in meta:
                return meta["val_tokens"]
            width = np.dtype(meta.get("dtype", "uint16")).itemsize
            files = [folder / file["name"] for file in shards.files_of(folder, "val", meta)]
            return sum(path.stat().st_size for path in files if path.exists()) // width
    return None
