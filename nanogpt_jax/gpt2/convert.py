"""Export a run for Hugging Face's `transformers`: python -m nanogpt_jax export RUN FOLDER

Writes the run whose folder is RUN to the new FOLDER, where AutoModelForCausalLM.from_pretrained
and AutoTokenizer.from_pretrained load it.
"""

import contextlib
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from nanogpt_jax.config import Checked, ModelConfig, parse_args, split_words
from nanogpt_jax.errors import InputError
from nanogpt_jax.gpt2 import config as gpt2_config
from nanogpt_jax.gpt2 import hub, weights
from nanogpt_jax.hardware import size_in_words

if TYPE_CHECKING:
    from nanogpt_jax import TrainedModel


def load_params(source: str, config: ModelConfig, abstract_params) -> dict:
    """Return the parameters of a GPT-2, each device reading only its part of each tensor.

    A shorter context takes the first positions. The rows of a padded vocabulary are zero, and
    `GPT.head` masks them. Raises InputError if the tensors are not exactly those of the model.

    Args:
        source: one of hub.py's names, or a folder.
        config: `read_config(source)`, or one of another context or vocabulary.
        abstract_params: the model's shapes with their shardings.
    """
    import jax
    from jax.tree_util import tree_leaves_with_path, tree_map_with_path

    theirs = gpt2_config.read_config(source)
    rows = {"wpe.weight": theirs.block_size, "wte.weight": theirs.vocab_size}
    shapes = {}
    for path, leaf in tree_leaves_with_path(abstract_params):
        name = gpt2_config.tensor_name(path)
        shapes[name] = (rows.get(name, leaf.shape[0]), *leaf.shape[1:])
    tensors = weights.open_tensors(source)
    weights.check(tensors, shapes, theirs.bias, source)

    def read(path, leaf):
        read_part = partial(_read_part, tensors[gpt2_config.tensor_name(path)], leaf.shape)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read_part)

    return tree_map_with_path(read, abstract_params)


def _read_part(tensor: weights.Tensor, shape: tuple[int, ...], index) -> np.ndarray:
    """Return a device's part of an array with fewer or more rows than the tensor."""
    rows, *columns = (slice(*axis.indices(n)[:2]) for axis, n in zip(index, shape, strict=True))
    values = np.zeros([axis.stop - axis.start for axis in (rows, *columns)], np.float32)
    end = min(rows.stop, tensor.shape[0])
    if rows.start < end:
        values[: end - rows.start] = tensor.read((slice(rows.start, end), *columns))
    return values


@dataclass(frozen=True)
class ExportConfig(Checked):
    """What to export."""

    checkpoint: Literal["best", "latest"] = "best"  # best: the lowest validation loss


def main(argv: list[str]) -> None:
    """Export a run; validate the request before importing JAX."""
    words, flags = split_words(argv, "a folder")
    config = parse_args(ExportConfig, flags, __doc__)
    if len(words) != 2:
        raise InputError(
            f"export takes two words, a run's folder and a new one, got {len(words)}; for example: "
            "python -m nanogpt_jax export out/small small-gpt"
        )
    export(Path(words[0]), Path(words[1]), config.checkpoint)


def export(run: Path, folder: Path, checkpoint: Literal["best", "latest"] = "best") -> None:
    """Write a run's model and tokenizer to a new folder that `transformers` can load."""
    import nanogpt_jax

    source = nanogpt_jax.find(run)
    if source.folder is None:
        raise InputError(f"{run}: this is a Hugging Face GPT-2 already; name a run's folder")
    config = source.config
    gpt2_config.check_exportable(config, run)
    unpadded = replace(config, vocab_size=config.known_tokens or config.vocab_size)
    files = gpt2_config.config_files(unpadded, source.tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: must be a new folder or an empty one, but holds files")
        try:
            loaded = nanogpt_jax.load(source, checkpoint=checkpoint, dtype="float32")
            _write_weights(loaded, folder / hub.WEIGHTS)
            for name, content in files.items():
                (folder / name).write_text(content, encoding="utf-8")
            # safetensors makes its file readable by the owner only.
            shutil.copymode(folder / hub.CONFIG, folder / hub.WEIGHTS)
        except BaseException:
            for name in (hub.WEIGHTS, *files):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}): name another folder"
        ) from None
    if not config.bias:
        print("the model has no biases; GPT-2 needs them, so they are written as zeros")
    if source.tokenizer is None:
        print(f"the run has no {hub.TOKENIZER}, so none is written: its .bin files came without")
    print(f"{run}, step {loaded.step}: {size_in_words(unpadded)} written to {folder}")


def _write_weights(run: "TrainedModel", path: Path) -> None:
    """Write a model's parameters under GPT-2's names."""
    from jax.tree_util import tree_leaves_with_path
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {}
    for tree_path, array in tree_leaves_with_path(run.params):
        name = f"transformer.{gpt2_config.tensor_name(tree_path)}"
        arrays[name] = np.ascontiguousarray(array)  # save_file writes the memory as it is
        if not run.config.bias and not name.endswith(("wte.weight", "wpe.weight")):
            zeros = np.zeros(array.shape[-1], np.float32)
            arrays[f"{name.removesuffix('.weight')}.bias"] = zeros
    embedding = f"transformer.{weights.EMBEDDING}"
    arrays[embedding] = arrays[embedding][: run.config.known_tokens]  # without padding
    try:
        save_file(arrays, path, {"format": "pt"})  # some versions of `transformers` require it
    except SafetensorError as error:
        raise OSError(str(error)) from None
