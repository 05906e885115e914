"""Tensors in safetensors files, read piece by piece, and checked against what a GPT-2 has. No JAX.

A weight file is foreign: whatever is in it, the answer is its numbers or one line. Pickles are
never opened.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.files import read_json
from nanogpt_jax.gpt2 import hub

INDEX = "model.safetensors.index.json"  # of weights in several files
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # which position sees which: no parameters
TYPES = ("F32", "F16", "BF16")
CHUNK_ROWS = 4096


class Tensor(NamedTuple):
    """A tensor in a file, of which nothing is read yet."""

    path: Path
    name: str  # as the file has it
    shape: tuple[int, ...]
    piece: Any  # safetensors' own: piece[index] reads

    def read(self, index: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
        """Return a part of it, in float32.

        Args:
            index: slices that begin and end within it.

        Raises:
            InputError: it has other than finite floating-point numbers, or cannot be read.
        """
        import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it

        if self.piece.get_dtype() not in TYPES:
            raise InputError(
                f"{self.path}: {self.name} must be of type {', '.join(TYPES)}, but is of "
                f"{self.piece.get_dtype()}"
            )
        with reading(self.path, f"a safetensors file with a readable {self.name}"):
            values = np.asarray(self.piece[index], np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: {self.name} must be finite, but has NaN or infinity")
        return values


def open_tensors(source: str) -> dict[str, Tensor]:
    """Return the tensors of a GPT-2 by their names, without the prefix "transformer.".

    Args:
        source: a name of hub.py's, or a folder.

    Raises:
        InputError: there are none, or a file is not what it should be.
    """
    from safetensors import safe_open

    tensors = {}
    for path in _files(source):
        with reading(path, "a safetensors file"):
            file = safe_open(path, "numpy")
            found = [(name, file.get_slice(name)) for name in list(file.keys())]
        for name, piece in found:
            short = name.removeprefix("transformer.")
            if short in tensors:
                raise InputError(f"{path}: {short!r:.80} must come once, but comes twice")
            tensors[short] = Tensor(path, name, tuple(piece.get_shape()), piece)
    return tensors


def _files(source: str) -> list[Path]:
    folder = Path(source)
    if hub.is_name(source) or (folder / hub.WEIGHTS).is_file():
        return [hub.find(source, hub.WEIGHTS)]
    if (folder / INDEX).is_file():
        return [hub.find(source, name) for name in _indexed(folder / INDEX)]
    for pickle in sorted(folder.glob("*.bin")):
        raise InputError(
            f"{pickle}: is a pickle, which can run any code when it is opened. Where you trust it, "
            f"let `transformers` read it and save_pretrained write {hub.WEIGHTS}"
        )
    return [hub.find(source, hub.WEIGHTS)]  # which refuses


def _indexed(path: Path) -> list[str]:
    """Return the names of the files that an index lists; they lie beside it, and nowhere else."""
    requirement = f'like {{"weight_map": {{"{EMBEDDING}": "a.safetensors"}}}}'
    with reading(path, f"{requirement}, with the names of files beside it"):
        names = {*read_json(path)["weight_map"].values()}
        if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names):
            raise ValueError("names others")
        return sorted(names)


def check(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], bias: bool, source: str
) -> None:
    """Check that the tensors are all those of some shapes and, but for what is known, no others.

    Known are masks, a head that equals the embedding, and zeros for biases where there are none.

    Raises:
        InputError: it names what is missing, left over, of another shape, or differs.
    """
    zeros = set()
    if not bias:
        modules = {name.removesuffix(".weight") for name in shapes} - {"wte", "wpe"}
        zeros = {f"{module}.bias" for module in modules} & tensors.keys()
    missing = sorted(shapes.keys() - tensors.keys())
    unknown = tensors.keys() - shapes.keys() - zeros - {HEAD}
    unknown = sorted(name for name in unknown if not MASK.fullmatch(name))
    if missing or unknown:
        parts = [f"lack {_some(missing)}"] if missing else []
        parts += [f"have {_some(unknown)} besides"] if unknown else []
        raise InputError(
            f"{source}: the weights must be the {len(shapes)} tensors that {hub.CONFIG} tells of, "
            f"but {' and '.join(parts)}"
        )
    for name, shape in shapes.items():
        path, _, found, _ = tensors[name]
        if found != shape:
            raise InputError(f"{path}: {name} must have the shape {shape}, but has {found}")
    for name in sorted(zeros):
        if tensors[name].read().any():
            raise InputError(
                f"{tensors[name].path}: {name} must be zero in a model without biases, but is not"
            )
    if HEAD in tensors and not _are_equal(tensors[HEAD], tensors[EMBEDDING]):
        raise InputError(
            f"{tensors[HEAD].path}: {HEAD} must equal {EMBEDDING}, since a GPT's head has the "
            "weights of its embedding, but differs"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name!r:.80}" for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    begins = range(0, one.shape[0], CHUNK_ROWS)
    rows = [(slice(begin, min(begin + CHUNK_ROWS, one.shape[0])),) for begin in begins]
    return all(np.array_equal(one.read(index), other.read(index)) for index in rows)
