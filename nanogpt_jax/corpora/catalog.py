"""Find a corpus by name or path, and prepare it like nanoGPT: `train.bin`, `val.bin`, `meta.json`.

A corpus is a name; a text, JSON or Parquet file or a folder of them; or a folder that already has
`train.bin` and `val.bin`, made by nanoGPT or by anything else.
"""

import contextlib
import hashlib
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nanogpt_jax import files
from nanogpt_jax.config import TrainConfig
from nanogpt_jax.corpora import download, preparation, shards, tokens
from nanogpt_jax.corpora.dataset import Corpus, open_corpus, tokenizer_of_nanogpt
from nanogpt_jax.corpora.readers import TEXT
from nanogpt_jax.corpora.shards import SHARD_TOKENS
from nanogpt_jax.corpora.sources import HUB, Files, Hub, Source
from nanogpt_jax.corpora.tokenizer_files import load_tokenizer, save_tokenizer
from nanogpt_jax.corpora.tokenizer_spec import TokenizerSpec
from nanogpt_jax.errors import InputError, did_you_mean
from nanogpt_jax.hardware import Processes

SHAKESPEARE, SHAKESPEARE_BPE, PYDOCS = "shakespeare_char", "shakespeare", "pydocs"
NAMES = (SHAKESPEARE, SHAKESPEARE_BPE, PYDOCS, *HUB)
SHAKESPEARE_VAL_TOKENS = 111_540
SHAKESPEARE_FINGERPRINT = "a320d332271226fa"


@dataclass(frozen=True)
class Request:
    """The corpus that a user asks for."""

    dataset: str | None  # a name or a path; None: tiny Shakespeare, or Python's manual
    data_dir: Path
    min_tokens: int = 1  # of each split; nothing is written for a shorter text
    tokenizer: str | None = None  # char, gpt2, bpe or a tokenizer.json; None: the usual one
    vocab_size: int | None = None  # of bpe
    shard_tokens: int = SHARD_TOKENS  # the most in a file
    text_key: str = "text"  # the key or column of a document's text
    default_tokenizer: str | None = None  # of a text, in place of its usual one

    def __post_init__(self):  # the shell does not expand ~ after --data_dir=
        object.__setattr__(self, "data_dir", Path(os.path.expanduser(self.data_dir)))


def load(
    config: TrainConfig, processes: Processes, tokenizer: str | None = None
) -> tuple[Corpus, TrainConfig]:
    """Open the corpus of a run, prepared first if need be, and fill in the model's vocabulary.

    Args:
        processes: the first prepares what is missing while the others wait.
        tokenizer: for a text if the config names none, such as that of pretrained weights.

    Raises:
        InputError: the corpus cannot be prepared here, is damaged, or too short for block_size.
    """
    request = replace(request_of(config), default_tokenizer=tokenizer)
    folder = processes.first_alone(lambda: resolve(request), "prepared")
    model = config.model
    corpus = open_corpus(folder, request.min_tokens, model.vocab_size, model.known_tokens)
    known = corpus.known_tokens if corpus.known_tokens != corpus.vocab_size else None
    if known and model.architecture != "gpt":
        raise InputError(
            f"vocab_size must be {known}, the tokens of {corpus.name}, since the lecture's models "
            f"cannot mask others, got {corpus.vocab_size}: leave it out"
        )
    model = replace(model, vocab_size=corpus.vocab_size, known_tokens=known)  # the rest is padding
    return corpus, replace(config, model=model)


def request_of(config: TrainConfig) -> Request:
    """Return what a training asks for."""
    return Request(
        config.dataset, Path(config.data_dir), config.model.block_size + 1, config.tokenizer,
        config.model.vocab_size, text_key=config.text_key,
    )  # fmt: skip


def resolve(request: Request) -> Path:
    """Return the folder of a dataset, prepared first unless that takes hours.

    Only if no dataset is named and nothing can be downloaded, Python's own manual replaces tiny
    Shakespeare, with a notice. See `prepare`.
    """
    if request.dataset is not None:
        return prepare(request, is_training=True)
    try:
        return prepare(replace(request, dataset=SHAKESPEARE))
    except download.Unavailable as error:
        stars = "*" * 88
        print(
            f"\n{stars}\n"
            "  THIS WILL NOT BE SHAKESPEARE: it could not be downloaded. Training uses `pydocs`,\n"
            "  Python's own manual, instead: the model will write Python prose, and its losses\n"
            "  will not be those in the README.\n"
            f"  To train on Shakespeare, save\n    {download.SHAKESPEARE_URLS[0]}\n"
            f"  as\n    {request.data_dir / SHAKESPEARE / 'input.txt'}\n"
            f"  and run the same command again. The error was: {error.reason}\n{stars}\n",
            flush=True,
        )
        return prepare(replace(request, dataset=PYDOCS))


def _how_to_prepare(source: Source, request: Request) -> str:
    tokenizer, text_key = request.tokenizer or request.default_tokenizer, request.text_key
    flags = {
        "tokenizer": tokenizer,
        "vocab_size": request.vocab_size if tokenizer == "bpe" else None,
        "text_key": text_key if text_key != "text" else None,
        "data_dir": request.data_dir if request.data_dir != Path("data") else None,
    }
    quoted = {name: shlex.quote(str(value)) for name, value in flags.items() if value}
    given = "".join(f" --{name} {value}" for name, value in quoted.items())
    command = f"python data/prepare.py {shlex.quote(source.name)}{given}"
    if not isinstance(source, Hub):
        return f"{source.name} must be prepared before training, which takes a while: {command}"
    return (
        f"{source.name} must be prepared before training: {command}. This takes "
        f"{source.gpt2_tokens / 5e9:,.1f} hours or less, {source.gpt2_tokens / 5e8:,.0f} GB of "
        f"disk for {source.gpt2_tokens / 1e9:,.2f}B tokens, and a download of "
        f"{source.size / 1e9:,.0f} GB that is not stored"
    )


def prepare(request: Request, is_training: bool = False) -> Path:
    """Prepare a dataset, however long it takes unless `is_training`, and return its folder.

    Raises:
        InputError: the name is unknown, or the text is unreadable, empty or too short.
        download.Unavailable: the dataset cannot be downloaded.
    """
    files.check_place(request.data_dir, "data_dir")
    folder, spec, source = _locate(request)
    dataset, tokenizer = request.dataset or SHAKESPEARE, request.tokenizer
    is_named = dataset in NAMES
    if source is None and (not is_named or shards.is_foreign(folder)):
        if tokenizer or (is_named and load_tokenizer(folder) is None):
            _add_tokenizer(folder, tokenizer or spec.label, spec)
        return folder
    source = source or _named_source(dataset, request.data_dir)
    is_too_large = is_training and source.text_bytes > preparation.LARGE_BYTES
    refusal = _how_to_prepare(source, request) if is_too_large else None
    sizes = request.min_tokens, request.shard_tokens
    return preparation.prepare_folder(source, folder, spec, *sizes, refusal)


def _locate(request: Request) -> tuple[Path, TokenizerSpec, Source | None]:
    """Return the folder of a dataset's tokens, its tokenizer, and the user's text if it is one."""
    dataset, data_dir, text_key = request.dataset or SHAKESPEARE, request.data_dir, request.text_key
    name, source, default = dataset, None, "gpt2"
    if dataset in (SHAKESPEARE, PYDOCS):
        default = "char"
    usual = default  # the tokenizer whose label the folder's name omits
    if dataset not in NAMES:
        path = _existing(dataset, data_dir)
        if shards.has_tokens(path):
            return path, TokenizerSpec.parse(request.tokenizer or default, request.vocab_size), None
        source, usual = Files(path, text_key), "char"
        default = "char" if source.kind == TEXT else "gpt2"
        # A hash keeps two files called input.txt apart. A name has at most 255 bytes.
        key = f"\0{text_key}" if text_key != "text" else ""
        path_hash = hashlib.sha256(os.fsencode(f"{path.resolve()}{key}")).hexdigest()[:8]
        stem = re.sub("[*?[]", "_", path.resolve().stem[:50])  # which out_dir may not have
        name = f"{stem}-{path_hash}"
    requested = request.tokenizer or request.default_tokenizer or default
    spec = TokenizerSpec.parse(requested, request.vocab_size)
    return data_dir / (name if spec.label == usual else f"{name}-{spec.label}"), spec, source


def _existing(dataset: str, data_dir: Path) -> Path:
    """Return the path of a dataset that has no name of ours; refuse an unfinished one."""
    for path in (data_dir / dataset, Path(os.path.expanduser(dataset))):
        if path.exists():
            shards.check_finished(path)
            return path
    prepared = [path.name for path in data_dir.glob("*") if path.is_dir()]
    hint = did_you_mean(dataset, {*NAMES, *prepared})
    if not hint and not Path(dataset).suffix:
        hint = f" Put its train.bin and val.bin, if you have them, into {data_dir / dataset}"
    raise InputError(
        f"dataset must be one of {', '.join(NAMES)}, a text file or a folder, but there is no "
        f"{dataset!r}.{hint}"
    )


def _named_source(name: str, data_dir: Path) -> Source:
    """Return the source of a name; text that is not here yet is stored as input.txt."""
    from pydoc_data.topics import topics

    if name in HUB:
        return HUB[name]
    folders = [name] if name == PYDOCS else [SHAKESPEARE, SHAKESPEARE_BPE]
    paths = [data_dir / folder / "input.txt" for folder in folders]
    path = next((path for path in paths if path.exists()), data_dir / name / "input.txt")
    if not path.exists():
        if name == PYDOCS:
            content = "\n\n".join(topics[key] for key in sorted(topics)).encode()
        else:
            content = download.tiny_shakespeare(path)
        with preparation.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, content)
        print(f"saved {'the manual' if name == PYDOCS else 'tiny Shakespeare'} as {path}")
    return Files(path)


def _add_tokenizer(folder: Path, requested: str, spec: TokenizerSpec) -> None:
    """Put the requested tokenizer into a folder that has none; refuse a folder with another."""
    meta = shards.read_meta(folder)
    dtype = meta.get("dtype", "uint16")
    present = load_tokenizer(folder) or tokenizer_of_nanogpt(folder, dtype)
    if present is not None and not spec.matches(present, meta.get("tokenizer")):
        raise InputError(
            f"{folder}: these files were made with a different tokenizer than {requested}; drop "
            "--tokenizer or pass the original text"
        )
    if present is not None or spec.label == "char":
        return
    if spec.vocab_size is not None:
        raise InputError(
            f"{folder}: bpe must be trained on a text, but the folder has none; pass the "
            "tokenizer.json that the token files were made with"
        )
    try:
        made = spec.make()
    except InputError as error:  # training needs none
        print(f"{folder}: samples will not be readable as text: {error}", file=sys.stderr)
        return
    path = next(iter(shards.files_of(folder, "train", meta)))
    largest = int(np.fromfile(path, dtype, 2**20).max(initial=0))
    if largest >= made.vocab_size:
        raise InputError(
            f"{path}: these files were made with a different tokenizer: {requested} has "
            f"{made.vocab_size} tokens, but an id there is {largest}; pass the original one"
        )
    with preparation.writing(folder):
        save_tokenizer(made, folder)


def known_val_tokens(request: Request) -> int | None:
    """Return the size of a dataset's validation split; None if it is not prepared here."""
    with contextlib.suppress(InputError):
        folder, *_ = _locate(request)
        shards.check_finished(folder)
        meta = shards.read_meta(folder)
        paths = shards.files_of(folder, "val", meta)
        return sum(tokens.check_size(path, meta.get("dtype", "uint16")) for path in paths)
    return None
