"""Get a corpus onto disk, as nanoGPT lays it out: `train.bin`, `val.bin`, `meta.json`. No JAX.

A corpus is a name (`shakespeare_char`, `pydocs`), a UTF-8 text file, a folder of text files, or a
folder that already has `train.bin` and `val.bin`, made by nanoGPT or by anything else.
"""

import contextlib
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt_jax import download
from nanogpt_jax import tokenizer as tokenizers
from nanogpt_jax.data import SPLITS, check_whole, open_tokens
from nanogpt_jax.errors import InputError, did_you_mean
from nanogpt_jax.tokenizer import CharTokenizer

SHAKESPEARE, PYDOCS = "shakespeare_char", "pydocs"
NAMES = (SHAKESPEARE, PYDOCS)
TRAIN_FRACTION = 0.9
SHAKESPEARE_VAL_TOKENS = 111_540
SHAKESPEARE_FINGERPRINT = "a320d332271226fa"


@dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, checked, with what is needed to read them."""

    name: str
    splits: dict[str, np.ndarray]  # "train" and "val", each of shape (n_tokens,)
    vocab_size: int
    tokenizer: CharTokenizer | None  # None: `.bin` files without one; training needs none
    fingerprint: str  # of all token ids: a run is only resumed on the text it began with


def resolve(dataset: str | None, data_dir: Path, min_tokens: int) -> Path:
    """Return the folder with a dataset's `train.bin` and `val.bin`; prepare it where it must be.

    Only where the user named nothing, and nothing can be downloaded, Python's own manual stands in
    for tiny Shakespeare, with a notice.

    Args:
        dataset: a name, a path, or None for the default.
        data_dir: where datasets are prepared.
        min_tokens: what each split must have; nothing is written for a text that is too short.

    Raises:
        InputError: an unknown name, a text that cannot be read, is empty or too short.
        download.Unavailable: a dataset that was named and cannot be downloaded.
    """
    if dataset is not None:
        return prepare(dataset, data_dir, min_tokens)
    try:
        return prepare(SHAKESPEARE, data_dir, min_tokens)
    except download.Unavailable as error:
        folder = prepare(PYDOCS, data_dir, min_tokens)
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


def prepare(dataset: str, data_dir: Path, min_tokens: int = 1) -> Path:
    """Return the folder of a named dataset, prepared; see `resolve`."""
    data_dir = Path(data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise InputError(f"data_dir must be a folder, but {data_dir} is a file")
    if dataset == SHAKESPEARE:
        folder = data_dir / SHAKESPEARE
        source = folder / "input.txt"
        if not source.exists() and (folder / "train.bin").exists():
            return folder  # prepared elsewhere, and brought here without its text
        if not source.exists():
            _store_shakespeare(source)
        return _write_splits(_read_text(source), folder, str(source), min_tokens)
    if dataset == PYDOCS:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
        return _write_splits(text, data_dir / PYDOCS, "pydoc_data.topics", min_tokens)
    for path in (data_dir / dataset, Path(dataset)):
        if any((path / f"{split}.bin").exists() for split in SPLITS):
            return path
        if path.is_file() or path.is_dir():
            return _write_splits(
                _read_text(path), _folder_of(path, data_dir), str(path), min_tokens
            )
    prepared = [path.name for path in data_dir.glob("*") if path.is_dir()]
    hint = did_you_mean(dataset, {*NAMES, *prepared})
    hint = hint or f" If you have its train.bin and val.bin, put them into {data_dir / dataset}"
    raise InputError(
        f"dataset must be one of {', '.join(NAMES)}, a text file or a folder, but there is no "
        f"{dataset!r}.{hint}"
    )


def known_val_tokens(dataset: str | None, data_dir: Path) -> int | None:
    """Return the size of a dataset's validation split; None where it is not prepared here."""
    places = [data_dir / (dataset or SHAKESPEARE)]
    if dataset is not None:
        places += [Path(dataset), _folder_of(Path(dataset), data_dir)]
    for folder in places:
        path = folder / "val.bin"
        if path.is_file():
            return (
                path.stat().st_size // np.dtype(_read_meta(folder).get("dtype", "uint16")).itemsize
            )
    return None


def _folder_of(text: Path, data_dir: Path) -> Path:
    """Return where one's own text is prepared: a hash keeps two books called input.txt apart."""
    place = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:8]
    return data_dir / f"{text.resolve().stem}-{place}"


def open_corpus(folder: Path, min_tokens: int, vocab_size: int | None = None) -> Corpus:
    """Open and check both splits of a prepared folder.

    Args:
        min_tokens: what each split must have, block_size + 1.
        vocab_size: what the model shall have; None: what the folder says.

    Raises:
        InputError: a file is missing, cut off, too short, or has ids past the vocabulary.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    dtype = meta.get("dtype", "uint16")
    for split in SPLITS:
        check_whole(folder / f"{split}.bin", dtype)
    tokenizer = tokenizers.load(folder) or _tokenizer_of_nanogpt(folder, dtype)
    known_size = tokenizer.vocab_size if tokenizer else meta.get("vocab_size")
    if known_size is None and (folder / "meta.pkl").exists() and vocab_size is None:
        largest = max(int(np.fromfile(folder / f"{s}.bin", dtype).max(initial=0)) for s in SPLITS)
        known_size = largest + 1
        print(
            f"{folder}: meta.pkl is not read, since a pickle can run any code. The vocabulary is "
            f"taken as {known_size}, the largest id + 1; to sample text, put the input.txt that "
            "train.bin was made from beside it."
        )
    size = vocab_size or known_size or 50304  # the last is nanoGPT's: GPT-2's vocabulary, padded
    if known_size and size < known_size:
        raise InputError(f"vocab_size must be at least {known_size} for {folder}, got {size}")
    splits, crcs = {}, []
    for split in SPLITS:
        path = folder / f"{split}.bin"
        splits[split], crc = open_tokens(path, dtype, size, min_tokens)
        crcs.append(crc)
        expected = meta.get(f"{split}_tokens", len(splits[split]))
        if len(splits[split]) != expected:
            raise InputError(
                f"{path}: must have {expected} tokens, as meta.json says, but has "
                f"{len(splits[split])}: delete the folder and make it anew"
            )
    fingerprint = "".join(f"{crc:08x}" for crc in crcs)
    return Corpus(folder.name, splits, size, tokenizer, fingerprint)


def _store_shakespeare(path: Path) -> None:
    content = download.tiny_shakespeare(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, content)
    except OSError as error:
        raise InputError(f"{path}: must be writable, but: {error.strerror}") from None
    print(f"downloaded tiny Shakespeare to {path}")


def _read_text(path: Path) -> str:
    """Read one UTF-8 file, or all *.txt below a folder in the order of their names."""
    files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
    if not files:
        raise InputError(f"{path}: must have .txt files, or train.bin and val.bin, but has none")
    texts = []
    for file in files:
        try:
            content = file.read_bytes()
            if (at := content.find(b"\0")) >= 0:
                raise InputError(f"{file}: must be UTF-8 text, but is binary (a 0 at byte {at})")
            text = content.decode("utf-8").removeprefix("\ufeff")  # Windows' byte order mark
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file}: must be UTF-8 text, but byte {error.start} is "
                f"0x{content[error.start]:02x}: save it as UTF-8"
            ) from None
        texts.append(text.replace("\r\n", "\n"))
    text = "\n".join(texts)
    if not text.strip():
        raise InputError(f"{path}: must hold text, but is empty")
    return text


def _write_splits(text: str, folder: Path, source: str, min_tokens: int) -> Path:
    """Tokenise a text and write 90 % to train.bin, the rest to val.bin, unless that was done."""
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    tokenizer = CharTokenizer.from_text(text)
    cut = int(len(text) * TRAIN_FRACTION)
    shortest = min(cut, len(text) - cut)
    if shortest < min_tokens:
        raise InputError(
            f"{source}: each split must have at least block_size + 1 = {min_tokens} characters, "
            f"but of {len(text)} one gets {shortest}: use more text or a smaller --block_size"
        )
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta = {
        "source": source,
        "source_sha256": sha256,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": cut,
        "val_tokens": len(text) - cut,
    }
    written = _read_meta(folder)
    width = np.dtype(dtype).itemsize
    sizes = {folder / f"{split}.bin": meta[f"{split}_tokens"] * width for split in SPLITS}
    if written.get("source_sha256") == sha256 and all(
        path.exists() and path.stat().st_size == size for path, size in sizes.items()
    ):
        return folder
    ids = tokenizer.encode(text).astype(np.dtype(dtype).newbyteorder("<"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)  # it is written last, and says: all is there
        _write_atomically(folder / "train.bin", ids[:cut].tobytes())
        _write_atomically(folder / "val.bin", ids[cut:].tobytes())
        tokenizers.save(tokenizer, folder)
        _write_atomically(folder / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"{folder}: must be writable, but: {error.strerror}") from None
    print(
        f"prepared {source}: {len(text):,} characters, {tokenizer.vocab_size} distinct; "
        f"{meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate"
    )
    return folder


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that no half of it is ever taken for the whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: must be a JSON file, but {error}") from None
    if not isinstance(meta, dict) or meta.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise InputError(f'{path}: must be like {{"dtype": "uint16"}} or "uint32", but is not')
    return meta


def _tokenizer_of_nanogpt(folder: Path, dtype: str) -> CharTokenizer | None:
    """Rebuild the tokenizer of nanoGPT's character datasets, which keep input.txt beside it."""
    source = folder / "input.txt"
    if not source.exists():
        return None
    text = _read_text(source)
    tokenizer = CharTokenizer.from_text(text)
    parts = [
        np.fromfile(folder / f"{s}.bin", dtype) for s in SPLITS if (folder / f"{s}.bin").exists()
    ]
    same = np.array_equal(np.concatenate(parts), tokenizer.encode(text))
    if not same:
        print(f"{folder}: train.bin was not made from input.txt's characters", file=sys.stderr)
    return tokenizer if same else None
