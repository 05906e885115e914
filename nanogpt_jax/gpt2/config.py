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

from nanogpt_jax.config import GPT2_PARTS, GPT2_SHAPES, RANGES, SCRATCH, ModelConfig, TrainConfig
from nanogpt_jax.corpora import END_OF_TEXT, BPETokenizer, Tokenizer, read_tokenizer
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.files import read_json
from nanogpt_jax.gpt2 import hub

MAX_CONFIG_BYTES = 2**20
SIZES = {  # our fields and theirs
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu"}
READ_ACTIVATIONS = {**ACTIVATIONS, "gelu_pytorch_tanh": "gelu_tanh"}
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
    """Return whether a source is a GPT-2: a name on the Hub, or a folder with one's config.json.

    A Path is always a folder.
    """
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

    if "made_with" in loaded and "model_type" not in loaded:
        raise InputError(
            f"{path}: this is a nanogpt_jax run, where init_from takes a Hugging Face GPT-2: "
            f"convert it with python -m nanogpt_jax export {source} FOLDER"
        )
    require(loaded.get("model_type") == "gpt2", "model_type", "gpt2")
    sizes = {}
    for ours, theirs in SIZES.items():
        size, largest = loaded.get(theirs), RANGES[ours][1]
        ok = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= largest
        require(ok, theirs, f"a whole number from 1 to {largest}")
        sizes[ours] = size
    for name, only in FIXED.items():
        require(loaded.get(name, only) == only, name, f"{json.dumps(only)} or left out")
    hidden = 4 * sizes["n_embd"]
    require(loaded.get("n_inner") in (None, hidden), "n_inner", f"null or 4 n_embd = {hidden}")
    activation = loaded.get("activation_function", "gelu_new")
    ok = isinstance(activation, str) and activation in READ_ACTIVATIONS
    require(ok, "activation_function", f"one of {', '.join(READ_ACTIVATIONS)}")
    extra = loaded.get(OURS, {"bias": True})
    ok = isinstance(extra, dict) and extra.keys() == {"bias"} and isinstance(extra["bias"], bool)
    require(ok, OURS, 'like {"bias": false} or left out')
    try:
        sizes |= {"bias": extra["bias"], "activation": READ_ACTIVATIONS[activation]}
        return replace(ModelConfig(), **sizes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict:
    with reading(path, "a JSON file with one object"):
        loaded = read_json(path, MAX_CONFIG_BYTES)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}")
    return loaded


def adopt_shape(config: TrainConfig) -> TrainConfig:
    """Return a configuration whose model has the shape of the GPT-2 that init_from names.

    The context (which may be shorter), dropout and padding of the vocabulary stay as requested.
    """
    if config.init_from == SCRATCH:
        return config
    source, ours = config.init_from, config.model
    theirs = read_config(source)
    if ours.block_size > theirs.block_size:
        raise InputError(
            f"block_size must be at most {theirs.block_size} with the weights of {source}, "
            f"got {ours.block_size}: add --block_size {theirs.block_size}"
        )
    n_tokens = theirs.vocab_size or 0
    if ours.vocab_size is not None and ours.vocab_size < n_tokens:
        raise InputError(
            f"vocab_size must be at least {n_tokens} with the weights of {source}, "
            f"got {ours.vocab_size}: leave it out"
        )
    model = replace(
        theirs,
        block_size=ours.block_size,
        dropout=ours.dropout,
        vocab_size=ours.vocab_size or n_tokens,
        known_tokens=n_tokens,
    )
    return replace(config, model=model)


def tokenizer_of(source: str) -> str | None:
    """Return the path of a GPT-2's tokenizer, downloaded if necessary; None if it has none."""
    if hub.is_name(source):
        return str(hub.find(source, hub.TOKENIZER))
    path = Path(source, hub.TOKENIZER)
    return str(path) if path.is_file() else None


def check_tokenizer(source: str, tokenizer: Tokenizer | None, requested: str | None) -> None:
    """Check that a corpus has the tokens that a GPT-2's weights know.

    Args:
        tokenizer: of the corpus; None cannot be checked.
        requested: --tokenizer, which is trusted if the weights come without a tokenizer.
    """
    theirs = tokenizer_of(source)
    if tokenizer is None or (theirs is None and requested is not None):
        return
    if theirs is None:
        raise InputError(
            f"{source} has no {hub.TOKENIZER}, so the tokens that its weights know are unknown: "
            "put the tokenizer they were trained with there, or name it with --tokenizer"
        )
    if tokenizer.token_bytes != read_tokenizer(Path(theirs)).token_bytes:
        raise InputError(
            f"dataset must consist of the tokens that the weights of {source} know, but has "
            "others: drop --tokenizer, and pass the text itself as --dataset"
        )


def tensor_name(path) -> str:
    """Return GPT-2's name, like "h.0.attn.c_attn.weight", of a path in a tree of our parameters."""
    *modules, leaf = (entry.key for entry in path)
    name = ".".join(modules).replace("h_", "h.", 1)
    return f"{name}.bias" if leaf == "bias" else f"{name}.weight"


def check_exportable(config: ModelConfig, run: Path) -> None:
    """Check that the model of a run is a GPT-2, so that `transformers` can load it."""
    if config.architecture != "gpt":
        raise InputError(
            f"{run}: `transformers` has no model like the lecture's {config.architecture}: export "
            "a run whose architecture is gpt"
        )
    for name, value in GPT2_PARTS.items():
        allowed = [*ACTIVATIONS.values()] if name == "activation" else [value]
        if getattr(config, name) not in allowed and name != "zero_init":  # only the start differs
            raise InputError(
                f"{run}: only a GPT-2 can be exported, whose {name} must be "
                f"{' or '.join(map(str, allowed))}, but is {getattr(config, name)}"
            )


def config_files(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return name -> content of the files that describe one of our models, except its weights.

    Args:
        config: with a vocab_size that does not count padding.
    """
    end_id = None
    if isinstance(tokenizer, BPETokenizer) and tokenizer.separator == END_OF_TEXT:
        end_id = int(tokenizer.encode_prompt(END_OF_TEXT)[0])
    ends = {"bos_token_id": end_id, "eos_token_id": end_id}
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    model = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_inner": None,
        "activation_function": activation,
        **{name: value for name, value in FIXED.items() if value is not None},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **ends,
        OURS: {"bias": config.bias},
    }
    files = {"generation_config.json": _to_json(ends)}
    if tokenizer is not None:
        if tokenizer.vocab_size > (config.vocab_size or 0):
            raise InputError(
                f"the tokenizer must have at most the model's {config.vocab_size} tokens, but has "
                f"{tokenizer.vocab_size}: put the run's own {hub.TOKENIZER} back"
            )
        files[hub.TOKENIZER] = _tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = _to_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.block_size,
                **(
                    {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
                    if end_id is not None
                    else {}
                ),
            }
        )
    return {**files, hub.CONFIG: _to_json(model)}  # last: nothing loads without it


def _to_json(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return a tokenizer in Hugging Face's format, in which each character is a word."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.to_json()
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Words

    try:
        words = Words(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}, ""))
    except UnicodeEncodeError:
        raise InputError(
            "the tokenizer must have whole characters, but has a lone surrogate: prepare the text "
            "again in UTF-8"
        ) from None
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return words.to_str()
