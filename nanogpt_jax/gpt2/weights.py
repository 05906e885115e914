"""Read the tensors of safetensors files in parts, and check them against a GPT-2's. No JAX.

Weight files are untrusted: whatever they contain, the result is numbers or a one-line error.
Pickles are never opened.
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
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, not a parameter
DTYPES = ("F32", "F16", "BF16")
CHUNK_ROWS = 4096
RESAVE = "load it with `transformers` and save_pretrained it in float32"


class Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    content: Any  # safetensors' own type: content[index] reads

    def read(self, index: tuple[slice, ...] = (slice(None),)) -> np.ndarray:
        """Return the part at an index within the tensor, in float32."""
        import ml_dtypes  # noqa: F401  registers bfloat16 with numpy

        dtype = self.content.get_dtype()
        if dtype not in DTYPES:
            raise InputError(
                f"{self.path}: {self.name} must have dtype {', '.join(DTYPES)}, but has {dtype}: "
                f"{RESAVE}"
            )
        with reading(self.path, f"a safetensors file with a readable {self.name}"):
            values = np.asarray(self.content[index], np.float32)
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.path}: {self.name} must be finite, but has NaN or infinity: download or "
                "export it again"
            )
        return values


def open_tensors(source: str) -> dict[str, Tensor]:
    """Open a GPT-2's weights, downloading them if necessary; return its tensors by name.

    Args:
        source: one of hub.py's names, or a folder.
    """
    from safetensors import safe_open

    tensors = {}
    for path in _files(source):
        with reading(path, "a safetensors file"):
            file = safe_open(path, "numpy")
            found = [(name, file.get_slice(name)) for name in list(file.keys())]
        for name, part in found:
            short = name.removeprefix("transformer.")
            if short in tensors:
                raise InputError(f"{path}: {short!r:.80} must come once, but comes twice: {RESAVE}")
            tensors[short] = Tensor(path, name, tuple(part.get_shape()), part)
    return tensors


def _files(source: str) -> list[Path]:
    folder = Path(source)
    if not hub.is_name(source) and not (folder / hub.WEIGHTS).is_file():
        if (folder / INDEX).is_file():
            return [hub.find(source, name) for name in _indexed(folder / INDEX)]
        for pickle in sorted(folder.glob("*.bin")):
            raise InputError(
                f"{pickle}: this is a pickle, which can run any code when it is opened. If you "
                f"trust it, load it with `transformers` and let save_pretrained write {hub.WEIGHTS}"
            )
    return [hub.find(source, hub.WEIGHTS)]


def _indexed(path: Path) -> list[str]:
    """Return the files that an index names; they must be next to it."""
    requirement = f'like {{"weight_map": {{"{EMBEDDING}": "a.safetensors"}}}}'
    with reading(path, f"{requirement}, with the names of files next to it"):
        names = {*read_json(path)["weight_map"].values()}
        if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names):
            raise ValueError("it names others")
        return sorted(names)


def check(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], bias: bool, source: str
) -> None:
    """Check that the tensors are exactly those with the given names and shapes.

    Three kinds may come in addition: masks, a head that equals the embedding, and zero biases for a
    model without biases.
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
        parts += [f"have {_some(unknown)} in addition"] if unknown else []
        raise InputError(
            f"{source}: the weights must be the {len(shapes)} tensors that {hub.CONFIG} describes, "
            f"but {' and '.join(parts)}: take {hub.CONFIG} and the weights from the same model"
        )
    for name, shape in shapes.items():
        path, _, found, _ = tensors[name]
        if found != shape:
            raise InputError(
                f"{path}: {name} must have the shape {shape}, as {hub.CONFIG} says, but has "
                f"{found}: take both files from the same model"
            )
    for name in sorted(zeros):
        if tensors[name].read().any():
            raise InputError(
                f"{tensors[name].path}: {name} must be zero in a model without biases, but is not: "
                f'set "bias" to true in {hub.CONFIG}'
            )
    if HEAD in tensors and not _are_equal(tensors[HEAD], tensors[EMBEDDING]):
        raise InputError(
            f"{tensors[HEAD].path}: {HEAD} must equal {EMBEDDING}, since a GPT-2 shares them, but "
            "differs: a model with a head of its own cannot be loaded"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name!r:.80}" for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    starts = range(0, one.shape[0], CHUNK_ROWS)
    rows = [(slice(start, min(start + CHUNK_ROWS, one.shape[0])),) for start in starts]
    return all(np.array_equal(one.read(index), other.read(index)) for index in rows)
