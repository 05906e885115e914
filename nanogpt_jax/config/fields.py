"""Check the fields of a configuration's dataclass, and turn it into a flat dict and back."""

import os
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin

from nanogpt_jax.errors import InputError
from nanogpt_jax.files import MAX_NAME_BYTES

MAX_INT = 2**30  # steps and tokens are counted in int32 on the device; the sum of two must fit
MAX_FLOAT = 3e38  # anything larger is infinite in float32
# Ranges of whole numbers other than 1 to MAX_INT. The limits on shapes are beyond any GPT: they
# bound what a config.json from somewhere else can request.
RANGES = {
    "n_layer": (1, 2**10), "n_head": (1, 2**10), "n_embd": (1, 2**16),
    "block_size": (1, 2**20), "vocab_size": (1, 2**24),
    "seed": (0, 2**32 - 1), "port": (0, 2**16 - 1),
    "process_id": (-1, MAX_INT), "max_new_tokens": (-1, MAX_INT),
    **dict.fromkeys(("warmup_iters", "eval_iters", "num_processes", "top_k"), (0, MAX_INT)),
    "loss_chunks": (0, MAX_INT), "attention_window": (0, MAX_INT), "sample_chars": (0, 10_000),
}  # fmt: skip
# At least 0 and below 1; all other numbers are only at least 0.
BELOW_ONE = {"dropout", "token_noise", "beta1", "beta2", "muon_momentum"}
FRACTIONS = {"cooldown", "top_p", "mfu"}
TEXTS = {"start", "stop"}  # every other text is a name, usually of a file
NEVER_EMPTY = {"out_dir", "data_dir", "dataset", "tokenizer", "init_from", "stop", "host"}
TYPES_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
MAX_PATH_BYTES = 4000


@dataclass(frozen=True)
class Checked:
    """What configurations have in common: a wrong value of any field is refused."""

    def __post_init__(self):
        for own in fields(self):
            check_value(own.name, own.type, getattr(self, own.name))


Config = TypeVar("Config", bound=Checked)


def check_value(name: str, hint: Any, value: Any) -> None:
    """Refuse a value that its field's type or range does not allow."""
    kind, *others = get_args(hint) or (hint,)
    low, high = RANGES.get(name, (1, MAX_INT))
    if get_origin(hint) is Literal:
        rules = {f"one of {', '.join((kind, *others))}": value in (kind, *others)}
    elif others and value is None:
        rules = {}
    elif type(value) not in ((int, float) if kind is float else (kind,)):
        rules = {TYPES_IN_WORDS.get(kind, kind.__name__): False}
    else:
        rules = {
            f"at least {low}": kind is not int or value >= low,
            f"at most {high}": kind is not int or value <= high,
            "finite and at least 0": kind is not float or 0 <= value <= MAX_FLOAT,
            "at least 0 and below 1": name not in BELOW_ONE or value < 1,
            "above 0 and at most 1": name not in FRACTIONS or 0 < value <= 1,
            "a text of at least one character": name not in NEVER_EMPTY or value,
            "a name that a file can have": kind is not str or name in TEXTS or _is_path(value),
        }
    for requirement, is_met in rules.items():
        if not is_met:
            raise InputError(f"{name} must be {requirement}, got {value!r}")
    if name == "init_from" and value == "resume":  # nanoGPT's way to resume
        raise InputError("init_from=resume: not needed, a run in out_dir resumes automatically")


def _is_path(text: str) -> bool:
    try:
        path = os.fsencode(text.replace(os.sep, "/"))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    longest = max(map(len, path.split(b"/")))
    return b"\0" not in path and len(path) <= MAX_PATH_BYTES and longest <= MAX_NAME_BYTES


def require(ok: bool, config: Any, name: str, requirement: str) -> None:
    if not ok:
        raise InputError(f"{name} must be {requirement}, got {getattr(config, name)!r}")


def field_types(cls: Any) -> dict[str, Any]:
    """Return the type of each flat field of a configuration class."""
    flat = {}
    for own in fields(cls):
        flat |= field_types(own.type) if is_dataclass(own.type) else {own.name: own.type}
    return flat


def to_flat_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as one flat dict, nested parts merged: what config.json contains."""
    flat = {}
    for name, value in vars(config).items():
        flat |= to_flat_dict(value) if isinstance(value, Checked) else {name: value}
    return flat


def replace_fields(config: Config, values: dict[str, Any]) -> Config:
    """Return a configuration with flat fields replaced, in whichever part they are."""
    changes = {}
    for name, old in vars(config).items():
        is_part = isinstance(old, Checked)
        changes[name] = replace_fields(old, values) if is_part else values.get(name, old)
    return replace(config, **changes)
