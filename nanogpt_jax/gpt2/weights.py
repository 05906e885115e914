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
    """Open a GPT-2's weights, downloaded if necessary; return its tensors by name."""
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
    """Return the weight files: one, or those next to it that an index names. Refuse a pickle."""
    folder = Path(source)
    if hub.is_name(source) or (folder / hub.WEIGHTS).is_file():
        return [hub.find(source, hub.WEIGHTS)]
    if (folder / INDEX).is_file():
        requirement = f'like {{"weight_map": {{"{EMBEDDING}": "a.safetensors"}}}}'
        with reading(folder / INDEX, f"{requirement}, with the names of files next to it"):
            names = {*read_json(folder / INDEX)["weight_map"].values()}
            if not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name) for name in names):
                raise ValueError("it names others")
        return [hub.find(source, name) for name in sorted(names)]
    for pickle in sorted(folder.glob("*.bin")):
        raise InputError(
            f"{pickle}: this is a pickle, which can run any code when it is opened. If you trust "
            f"it, load it with `transformers` and let save_pretrained write {hub.WEIGHTS}"
        )
    return [hub.find(source, hub.WEIGHTS)]  # which says what is missing


def check(tensors: dict[str, Tensor], shapes: dict[str, tuple], bias: bool, source: str) -> None:
    """Check that the tensors are exactly those with the given names and shapes.

    Three kinds may come in addition: masks, a head that equals the embedding, and zero biases for a
    model without biases.
    """
    modules = {name.removesuffix(".weight") for name in shapes} - {"wte", "wpe"}
    zeros = set() if bias else {f"{module}.bias" for module in modules} & tensors.keys()
    missing = shapes.keys() - tensors.keys()
    unknown = tensors.keys() - shapes.keys() - zeros - {HEAD}
    unknown = {name for name in unknown if not MASK.fullmatch(name)}
    if missing or unknown:
        parts = [f"lack {_some(missing)}"] if missing else []
        parts += [f"have {_some(unknown)} in addition"] if unknown else []
        raise InputError(
            f"{source}: the weights must be the {len(shapes)} tensors that {hub.CONFIG} describes, "
            f"but {' and '.join(parts)}: take {hub.CONFIG} and the weights from the same model"
        )

    def require(ok: bool, name: str, requirement: str) -> None:
        if not ok:
            raise InputError(f"{tensors[name].path}: {name} must {requirement}")

    for name, shape in shapes.items():
        found = tensors[name].shape
        wrong = f"have the shape {shape}, as {hub.CONFIG} says, but has {found}"
        require(found == shape, name, f"{wrong}: take both files from the same model")
    for name in sorted(zeros):
        wrong = "be zero in a model without biases, but is not"
        is_zero = not tensors[name].read().any()
        require(is_zero, name, f'{wrong}: set "bias" to true in {hub.CONFIG}')
    if HEAD in tensors:
        wrong = f"equal {EMBEDDING}, since a GPT-2 shares them, but differs"
        head, embedding = tensors[HEAD], tensors[EMBEDDING]
        is_shared = head.shape == embedding.shape and (head.read() == embedding.read()).all()
        require(is_shared, HEAD, f"{wrong}: a model with a head of its own cannot be loaded")


def _some(names: set[str]) -> str:
    shown = ", ".join(f"{name!r:.80}" for name in sorted(names)[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
