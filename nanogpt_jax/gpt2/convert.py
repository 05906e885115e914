"""GPT-2's weights in, and a run's out: python -m nanogpt_jax.gpt2.convert export OUT_DIR FOLDER

It writes the run in OUT_DIR to FOLDER as Hugging Face's `transformers` reads it there, with
AutoModelForCausalLM.from_pretrained("FOLDER") and AutoTokenizer.
"""

import contextlib
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from nanogpt_jax import corpora
from nanogpt_jax.config import ModelConfig, check_fields, check_value, parse_args, split_settings
from nanogpt_jax.errors import InputError, run_command
from nanogpt_jax.gpt2 import config as huggingface
from nanogpt_jax.gpt2 import hub, weights
from nanogpt_jax.hardware.flops import size_in_words
from nanogpt_jax.run import folder as run_folder


def load_params(source: str, config: ModelConfig, abstract_params):
    """Return the parameters of a GPT-2, each tensor read straight to where it shall lie.

    Where the model's context is shorter, the first positions are taken; rows of a padded vocabulary
    are zero, and `GPT.head` masks them.

    Args:
        source: a name of hub.py's, or a folder.
        config: `huggingface.read_config(source)`, maybe with a smaller block_size, or a larger
            vocab_size and its known_tokens.
        abstract_params: the model's shapes, each with the sharding that it shall have.

    Raises:
        InputError: the weights do not fit; none may be missing, left over, of another shape or not
            finite.
    """
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    theirs = huggingface.check_fits(config, source)
    leaves = flatten_dict(abstract_params, sep=".")
    rows = {"wpe.embedding": theirs.block_size, "wte.embedding": theirs.vocab_size}
    names = {name: huggingface.tensor_name(name) for name in leaves}
    shapes = {
        names[name]: (rows.get(name, leaf.shape[0]), *leaf.shape[1:])
        for name, leaf in leaves.items()
    }
    tensors = weights.open_tensors(source)
    weights.check(tensors, shapes, theirs.bias, source)
    filled = {
        name: jax.make_array_from_callback(
            leaf.shape, leaf.sharding, partial(_read_part, tensors[names[name]], leaf.shape)
        )
        for name, leaf in leaves.items()
    }
    return unflatten_dict(filled, sep=".")


def _read_part(tensor: weights.Tensor, shape: tuple[int, ...], index: tuple[slice, ...]):
    """Return a device's part of an array, whose rows may be fewer or more than the tensor's."""
    parts = [axis.indices(n)[:2] for axis, n in zip(index, shape, strict=True)]
    values = np.zeros([end - begin for begin, end in parts], np.float32)
    parts = [
        (min(begin, n), min(end, n)) for (begin, end), n in zip(parts, tensor.shape, strict=True)
    ]
    if all(begin < end for begin, end in parts):
        there = tuple(slice(end - begin) for begin, end in parts)
        values[there] = tensor.read(tuple(slice(*part) for part in parts))
    return values


@dataclass(frozen=True)
class ExportConfig:
    """What to export."""

    checkpoint: Literal["best", "latest"] = "best"
    """The checkpoint of lowest validation loss, or the newest."""

    def __post_init__(self):
        check_fields(self)


def main(argv: list[str]) -> None:
    """Export a run; what is wrong is said before JAX is loaded."""
    n_words = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words, settings = argv[:n_words], split_settings(argv[n_words:], ExportConfig)
    asked = parse_args(ExportConfig, settings, ExportConfig(), __doc__)
    if words[:1] != ["export"] or len(words) != 3:
        raise InputError(
            "export, the folder of a run and a new folder must be given, in this order, like "
            "python -m nanogpt_jax.gpt2.convert export out/small small-gpt"
        )
    for word in words:
        check_value("a folder", str, word)
    export(Path(words[1]), Path(words[2]), asked.checkpoint)


def export(run: Path, folder: Path, checkpoint: str = "best") -> None:
    """Write a run's model and tokenizer to a new folder as `transformers` reads them.

    Raises:
        InputError: there is no such run, it is no GPT-2, or the folder is not free.
    """
    config = run_folder.read_model_config(run)
    huggingface.check_is_gpt2(config, run)
    if not run_folder.has_checkpoint(run):
        raise InputError(f"{run} has no checkpoint yet: train it first")
    tokenizer = corpora.load_tokenizer(run)
    known = replace(config, vocab_size=config.known_tokens or config.vocab_size)
    files = huggingface.config_files(known, tokenizer)
    written = [folder / name for name in (hub.WEIGHTS, *files)]
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: must be a new folder or an empty one, but holds files")
        try:
            step = _write_weights(run, config, checkpoint, written[0])
            for path, content in zip(written[1:], files.values(), strict=True):
                path.write_text(content, encoding="utf-8")
            shutil.copymode(written[-1], written[0])  # safetensors lets its owner alone read it
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                if is_new:
                    folder.rmdir()
            raise
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    if not config.bias:
        print("the model has no biases, where GPT-2 needs some: they are written as zeros")
    if tokenizer is None:
        print(f"the run has no {hub.TOKENIZER}, so none is written: its .bin files came without")
    print(f"{run}, step {step}: {size_in_words(known)} written to {folder}")


def _write_weights(run: Path, config: ModelConfig, checkpoint: str, path: Path) -> int:
    """Write a checkpoint's parameters under GPT-2's names, and return its step."""
    import jax
    from flax.traverse_util import flatten_dict
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from nanogpt_jax import sharding, steps
    from nanogpt_jax.model import GPT
    from nanogpt_jax.run.checkpoint import Checkpoints

    checkpoints = Checkpoints(run / run_folder.CHECKPOINTS, read_only=True)
    prefer = checkpoints.best_step() if checkpoint == "best" else None
    abstract = jax.eval_shape(partial(steps.init_params, GPT(config)), jax.random.key(0))
    restored = checkpoints.restore_params(sharding.on_one_device(abstract), prefer)
    checkpoints.close()
    if restored is None:
        raise InputError(f"{run} has no checkpoint yet: train it first")
    params, step = restored
    arrays = {}
    for name, array in flatten_dict(params, sep=".").items():
        values = np.ascontiguousarray(array)  # as it lies in memory it is written
        values = values[: config.known_tokens] if name == "wte.embedding" else values
        name = f"transformer.{huggingface.tensor_name(name)}"
        arrays[name] = values
        if not config.bias and not name.endswith(("wte.weight", "wpe.weight")):
            zeros = np.zeros(values.shape[-1], np.float32)
            arrays[f"{name.removesuffix('.weight')}.bias"] = zeros
    try:
        save_file(arrays, path, {"format": "pt"})  # which `transformers` wants to see
    except SafetensorError as error:
        raise OSError(str(error)) from None
    return step


if __name__ == "__main__":
    run_command(main)
