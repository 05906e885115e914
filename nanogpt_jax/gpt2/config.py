"""A GPT-2 as Hugging Face's `transformers` keeps it: shape, names and tokenizer. No JAX.

FOLDER/config.json             the shape
       model.safetensors       the weights, or several such files and their index; see pretrained.py
       tokenizer.json          what encodes and decodes
       tokenizer_config.json   which class of `transformers` reads that
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from nanogpt_jax import corpora
from nanogpt_jax.config import GPT2, GPT2_SHAPES, RANGES, ModelConfig
from nanogpt_jax.corpora import END_OF_TEXT, BPETokenizer, Tokenizer
from nanogpt_jax.errors import InputError, reading
from nanogpt_jax.files import read_json
from nanogpt_jax.gpt2 import hub

MOST_CONFIG_BYTES = 2**20
SIZES = {  # our fields and theirs
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu"}
READ_ACTIVATIONS = {**ACTIVATIONS, "gelu_pytorch_tanh": "gelu_tanh"}
# What a GPT-2 there can be besides, and is not here. A field left out has this value.
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "auto_map": None,  # a model with code of its own
    "quantization_config": None,
}
OURS = "nanogpt_jax"  # a field that `transformers` keeps, and does not read


def read_config(source: str) -> ModelConfig:
    """Return the shape of a GPT-2, of a name without reading anything; dropout is 0.

    Raises:
        InputError: there is none, or it is of another kind than model.py computes.
    """
    if hub.is_name(source):
        sizes = {"block_size": hub.BLOCK_SIZE, "vocab_size": hub.VOCAB_SIZE, **GPT2_SHAPES[source]}
        return ModelConfig(bias=True, activation="gelu_tanh", **sizes)
    path = hub.find(source, hub.CONFIG)
    loaded = _read_object(path)

    def require(ok: bool, name: str, requirement: str) -> None:
        if not ok:
            came = f"got {loaded[name]!r:.80}" if name in loaded else "but is missing"
            raise InputError(f"{path}: {name} must be {requirement}, {came}")

    if "made_with" in loaded and "model_type" not in loaded:
        raise InputError(
            f"{path}: is a run's own, where init_from takes a GPT-2 of Hugging Face's: "
            f"python -m nanogpt_jax.gpt2.convert export {source} FOLDER makes one of it"
        )
    require(loaded.get("model_type") == "gpt2", "model_type", "gpt2")
    sizes = {}
    for ours, theirs in SIZES.items():
        size, most = loaded.get(theirs), RANGES[ours][1]
        is_int = isinstance(size, int) and not isinstance(size, bool)
        require(is_int and 1 <= size <= most, theirs, f"a whole number from 1 to {most}")
        sizes[ours] = size
    for name, only in FIXED.items():
        require(loaded.get(name, only) == only, name, f"{json.dumps(only)} or left out")
    hidden = 4 * sizes["n_embd"]
    require(loaded.get("n_inner") in (None, hidden), "n_inner", f"null or 4 n_embd = {hidden}")
    activation = loaded.get("activation_function", "gelu_new")
    known = isinstance(activation, str) and activation in READ_ACTIVATIONS
    require(known, "activation_function", f"one of {', '.join(READ_ACTIVATIONS)}")
    extra = loaded.get(OURS, {"bias": True})
    ok = isinstance(extra, dict) and extra.keys() == {"bias"} and isinstance(extra["bias"], bool)
    require(ok, OURS, 'like {"bias": false} or left out')
    try:
        return ModelConfig(bias=extra["bias"], activation=READ_ACTIVATIONS[activation], **sizes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict:
    with reading(path, "a short JSON file"):
        loaded = read_json(path, MOST_CONFIG_BYTES)
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: must hold one JSON object")
    return loaded


def fit(config: ModelConfig, source: str) -> ModelConfig:
    """Return the shape of a model that begins with the weights of a GPT-2.

    It is theirs, but for the context, which may be shorter, the dropout and the vocabulary's
    padding, which `config` says.

    Raises:
        InputError: the context is longer than theirs, or `read_config` refuses.
    """
    theirs = read_config(source)
    if config.block_size > theirs.block_size:
        raise InputError(
            f"block_size must be at most {theirs.block_size} with the weights of {source}, "
            f"got {config.block_size}: add --block_size {theirs.block_size}"
        )
    if config.vocab_size is not None and config.vocab_size < theirs.vocab_size:
        raise InputError(
            f"vocab_size must be at least {theirs.vocab_size} with the weights of {source}, "
            f"got {config.vocab_size}: leave it out"
        )
    return replace(
        theirs,
        block_size=config.block_size,
        dropout=config.dropout,
        vocab_size=config.vocab_size or theirs.vocab_size,
        known_tokens=theirs.vocab_size,
    )


def tokenizer_of(source: str) -> str | None:
    """Return the file of a GPT-2's tokenizer, downloaded where it must be; None if it has none.

    Raises:
        InputError: it cannot be downloaded.
    """
    if hub.is_name(source):
        return str(hub.find(source, hub.TOKENIZER))
    path = Path(source, hub.TOKENIZER)
    return str(path) if path.is_file() else None


def check_tokenizer(source: str, tokenizer: Tokenizer | None, asked: str | None) -> None:
    """Check that a corpus has the tokens that a GPT-2's weights know.

    Args:
        tokenizer: the corpus's; of one that has none it cannot be said.
        asked: --tokenizer, which is taken at its word where the weights come without one.

    Raises:
        InputError: it has others, or nobody says which the weights know.
    """
    theirs = tokenizer_of(source)
    if tokenizer is None or (theirs is None and asked is not None):
        return
    if theirs is None:
        raise InputError(
            f"{source} has no {hub.TOKENIZER}, so the tokens that its weights know are not known: "
            "put the one that belongs to them there, or name it with --tokenizer"
        )
    if tokenizer.token_bytes != corpora.read_tokenizer(Path(theirs)).token_bytes:
        raise InputError(
            f"dataset must be of the tokens that the weights of {source} know, but has others: "
            f"leave --tokenizer out, and name the text itself"
        )


def check_fits(config: ModelConfig, source: str) -> ModelConfig:
    """Check that the weights of a GPT-2 can fill a model, and return their own shape.

    The context may be shorter, and the vocabulary padded; all else is as the weights have it.

    Raises:
        InputError: they cannot, or `read_config` refuses.
    """
    theirs = read_config(source)

    def require(ok: bool, name: str, requirement: str) -> None:
        if not ok:
            raise InputError(
                f"{name} must be {requirement} with the weights of {source}, "
                f"got {getattr(config, name)!r}"
            )

    for name in ("architecture", "n_layer", "n_head", "n_embd", "bias", *GPT2):
        value = getattr(theirs, name)
        require(getattr(config, name) == value, name, f"{value}")
    positions, tokens = theirs.block_size, theirs.vocab_size
    require(config.block_size <= positions, "block_size", f"at most {positions}")
    padded = config.vocab_size is not None and config.vocab_size >= tokens
    require(padded, "vocab_size", f"at least {tokens}")
    known = config.known_tokens or config.vocab_size  # zero rows would be likely tokens
    require(known <= tokens, "known_tokens", f"from 1 to {tokens}")
    return theirs


def tensor_name(name: str) -> str:
    """Translate our "h_0.attn.c_attn.kernel" to "h.0.attn.c_attn.weight"."""
    module, _, leaf = re.sub(r"^h_(\d+)\.", r"h.\1.", name).rpartition(".")
    return f"{module}.bias" if leaf == "bias" else f"{module}.weight"


def end_of_text_id(tokenizer: Tokenizer | None) -> int | None:
    """Return the id of the token between two documents; None where there is none."""
    has_one = isinstance(tokenizer, BPETokenizer) and tokenizer.separator == END_OF_TEXT
    return int(tokenizer.encode_prompt(END_OF_TEXT)[0]) if has_one else None


def check_is_gpt2(config: ModelConfig, run: Path) -> None:
    """Check that `transformers` has a model like a run's.

    Raises:
        InputError: it is of the lecture, or has a part that GPT-2 has not.
    """
    if config.architecture != "gpt":
        raise InputError(
            f"{run}: `transformers` has no model like the lecture's {config.architecture}, only a "
            "run of architecture gpt can be exported"
        )
    for name, value in GPT2.items():
        allowed = [*ACTIVATIONS.values()] if name == "activation" else [value]
        if getattr(config, name) not in allowed and name != "zero_init":  # how it began is past
            raise InputError(
                f"{run}: {name} must be {' or '.join(map(str, allowed))} in a GPT-2, which alone "
                f"can be exported, but is {getattr(config, name)}"
            )


def config_files(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the files that describe a model of ours, the weights aside: name -> content.

    Args:
        config: its vocab_size without padding.

    Raises:
        InputError: the tokenizer has more tokens than the model, or a lone surrogate.
    """
    end = end_of_text_id(tokenizer)
    ends = {"bos_token_id": end, "eos_token_id": end}
    names = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    fixed = {name: value for name, value in FIXED.items() if value is not None}
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.activation]
    model = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    model |= {**names, "n_inner": None, "activation_function": activation, **fixed, **dropouts}
    model |= {**ends, OURS: {"bias": config.bias}}
    files = {"generation_config.json": _to_json(ends)}
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                f"the tokenizer must have at most the model's {config.vocab_size} tokens, but has "
                f"{tokenizer.vocab_size}"
            )
        ends = {} if end is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        files[hub.TOKENIZER] = _tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = _to_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": config.block_size,
                **ends,
            }
        )
    return {**files, hub.CONFIG: _to_json(model)}  # the last: without it nothing loads


def _to_json(content: dict) -> str:
    return json.dumps(content, indent=1) + "\n"


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the file of Hugging Face's `tokenizers`; of characters, each is a word."""
    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.to_json()
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Words

    try:
        words = Words(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}, ""))
    except UnicodeEncodeError:
        raise InputError("the tokenizer must be of whole characters, not surrogates") from None
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return words.to_str()
