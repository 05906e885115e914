"""Read and write a GPT-2 as Hugging Face's `transformers` stores it. No JAX.

FOLDER/config.json             the shape
       model.safetensors       the weights, or several such files and their index; see weights.py
       tokenizer.json          encodes and decodes
       tokenizer_config.json   names the class of `transformers` that reads it
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from nanogpt_jax.config import GPT2_PARTS, GPT2_SHAPES, RANGES, ModelConfig
from nanogpt_jax.corpora import END_OF_TEXT, BPETokenizer, Tokenizer
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.files import read_json
from nanogpt_jax.gpt2 import hub

SIZES = {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
SIZES |= {"block_size": "n_positions"}  # our fields and theirs
# Theirs and ours; the first if config.json has none.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# Options of their GPT-2 that ours does not have. A field that is left out has this value.
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "auto_map": None,  # a model with its own code
    "quantization_config": None,
}
OURS = "nanogpt_jax"  # a field that `transformers` keeps but does not read


def is_gpt2(source: str | os.PathLike) -> bool:
    """Return whether a source is a GPT-2: a name on the Hub (as a text), or a folder of one."""
    if isinstance(source, str) and hub.is_name(source):
        return True
    path = os.path.join(source, hub.CONFIG)
    return os.path.isfile(path) and "model_type" in _read_object(Path(path))


def read_config(source: str) -> ModelConfig:
    """Return the shape of a GPT-2, without dropout; for a name on the Hub, nothing is read."""
    if hub.is_name(source):
        sizes = {"block_size": hub.BLOCK_SIZE, "vocab_size": hub.VOCAB_SIZE, **GPT2_SHAPES[source]}
        return replace(ModelConfig(bias=True, activation="gelu_tanh"), **sizes)
    path = hub.find(source, hub.CONFIG)
    loaded = _read_object(path)

    def require(ok: bool, name: str, requirement: str) -> None:
        if not ok:
            got = f"got {loaded[name]!r:.80}" if name in loaded else "but is missing"
            raise InputError(f"{path}: {name} must be {requirement}, {got}")

    require(loaded.get("model_type") == "gpt2", "model_type", "gpt2")
    fields = {}
    for ours, theirs in SIZES.items():
        size, largest = loaded.get(theirs), RANGES[ours][1]
        ok = type(size) is int and 1 <= size <= largest  # a bool is not a size
        require(ok, theirs, f"a whole number from 1 to {largest}")
        fields[ours] = size
    hidden = 4 * fields["n_embd"]
    optional = {  # what each may be, first what it is if it is left out
        **{name: ([only], f"{json.dumps(only)} or left out") for name, only in FIXED.items()},
        "n_inner": ([None, hidden], f"null or 4 n_embd = {hidden}"),
        "activation_function": ([*ACTIVATIONS], f"one of {', '.join(ACTIVATIONS)}"),
        OURS: ([{"bias": True}, {"bias": False}], 'like {"bias": false} or left out'),
    }
    for name, (allowed, requirement) in optional.items():
        require(loaded.setdefault(name, allowed[0]) in allowed, name, requirement)
    fields |= {"activation": ACTIVATIONS[loaded["activation_function"]], **loaded[OURS]}
    try:
        return replace(ModelConfig(), **fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict:
    with reading(path, "a JSON file with one object"):
        loaded = read_json(path, max_bytes=2**20)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
    return loaded


def tensor_name(path) -> str:
    """Return GPT-2's name, like "h.0.attn.c_attn.weight", of a path in a tree of our parameters."""
    *modules, leaf = (entry.key for entry in path)
    name = ".".join(modules).replace("h_", "h.", 1)
    return f"{name}.bias" if leaf == "bias" else f"{name}.weight"


def check_exportable(config: ModelConfig, run: Path) -> None:
    """Check that the model of a run is a GPT-2, so that `transformers` can load it."""
    for name, value in {"architecture": "gpt", **GPT2_PARTS}.items():
        found = getattr(config, name)
        allowed = ["gelu_tanh", "gelu"] if name == "activation" else [value]
        if found not in allowed and name != "zero_init":  # only the start differs
            raise InputError(
                f"{run}: only a GPT-2 can be exported, whose {name} must be "
                f"{' or '.join(map(str, allowed))}, but is {found}: name another run"
            )


def config_files(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return name -> content of the files beside a model's weights; vocab_size without padding."""
    end_id, ends = None, {}
    if isinstance(tokenizer, BPETokenizer) and tokenizer.separator == END_OF_TEXT:
        end_id = int(tokenizer.encode_prompt(END_OF_TEXT)[0])
        ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    end_ids = {"bos_token_id": end_id, "eos_token_id": end_id}
    model = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_inner": None,
        "activation_function": "gelu" if config.activation == "gelu" else "gelu_new",
        **{name: value for name, value in FIXED.items() if value is not None},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **end_ids,
        OURS: {"bias": config.bias},
    }
    reader = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.block_size,
        **ends,
    }
    files = {"generation_config.json": _to_json({**end_ids, "max_length": config.block_size})}
    if tokenizer is not None:
        files |= {hub.TOKENIZER: _tokenizer_json(tokenizer)}
        files |= {"tokenizer_config.json": _to_json(reader)}
    return files | {hub.CONFIG: _to_json(model)}  # last: nothing loads without it


def _to_json(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return a tokenizer in Hugging Face's format, in which each character is a word."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.to_json()
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Words

    with reading(hub.TOKENIZER, "made of UTF-8 text (prepare it again)"):  # no surrogates
        words = Words(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}, ""))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return words.to_str()
