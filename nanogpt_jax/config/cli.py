"""Turn the command line and JSON files into configurations.

Both become settings first, a dict from field name to text: `--n_layer 6`, `--n-layer=6` and
{"n_layer": 6} are the same setting. `configure` parses its text; the dataclass checks the value.
"""

import contextlib
import os
import sys
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from nanogpt_jax import files
from nanogpt_jax.config.fields import Config, check_value, field_types, replace_fields
from nanogpt_jax.errors import InputError, did_you_mean, reading

# nanoGPT's flags that do not exist here, and what to do instead.
NANOGPT_FLAGS = {
    "device": "JAX finds the GPU or TPU by itself; put JAX_PLATFORMS=cpu in front to use the CPU",
    "compile": "not needed, JAX always compiles",
    "backend": "not needed, all devices are used; several hosts join with --coordinator_address",
    "always_save_checkpoint": "not needed, the newest and the best checkpoint are always kept",
    "wandb_log": "use --wandb; metrics.jsonl in the run's folder has the same numbers",
    "wandb_project": "put WANDB_PROJECT=name in front; the default is nanogpt_jax",
    "wandb_run_name": "not needed, --out_dir names the run",
}
NANOGPT_CONFIG = "nanoGPT's config files are presets here: --config shakespeare, or small on a CPU."
# What a run's config.json says about the machine and about a single start. Nobody else's start
# should repeat it: compiled functions are code, and out_dir with overwrite deletes a run.
START_FIELDS = {
    "out_dir", "overwrite", "compile_cache", "compile_for", "coordinator_address", "num_processes",
    "process_id",
}  # fmt: skip
# Fields of earlier versions, each with the value at which it did nothing.
REMOVED_FIELDS = {"ngram_rows": 0, "embedding_shortcut": False, "logit_cap": 0.0}


def parse_args(cls: type[Config], argv: list[str], about: str | None) -> Config:
    """Return the configuration that a command line asks for, or print help, `about` first."""
    return configure(cls(), split_flags(argv, cls), about)


def split_words(argv: list[str], what: str) -> tuple[list[str], list[str]]:
    """Split a command line into words, each the name of `what`, and flags."""
    n_words = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    for word in argv[:n_words]:
        check_value(what, str, word)
    return argv[:n_words], argv[n_words:]


def split_flags(argv: list[str], cls: type) -> dict[str, str]:
    """Return the settings of a command line, "help" among them if it asks for help."""
    known, settings, rest = field_types(cls), {}, list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            settings["help"] = ""
            continue
        if not word.startswith("--") or word == "--":
            hint = f" {NANOGPT_CONFIG}" if word.endswith(".py") else ""
            raise InputError(f"{word!r} is not a flag; flags look like --n_layer 6.{hint}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            hint = f" nanoGPT's flag: {NANOGPT_FLAGS[name]}." if name in NANOGPT_FLAGS else ""
            hint = hint or did_you_mean(name, known)
            raise InputError(f"there is no flag --{name}.{hint} (--help lists them)")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and known[name] is bool:
            value = "True"
        elif not equals:
            raise InputError(f"--{name} needs a value, like --{name}=...")
        is_missing = name == "config" or (name == "dataset" and not os.path.exists(value))
        if value.endswith(".py") and is_missing:
            raise InputError(f"--{name} must not be a Python file, got {value!r}. {NANOGPT_CONFIG}")
        if value.startswith("~/") and name not in ("start", "stop"):
            value = os.path.expanduser(value)  # which the shell does not do after --name=
        settings[name] = value
    return settings


def read_settings(path: Path, cls: type) -> dict[str, str]:
    """Read settings from a JSON file of flat fields; from a run's, all but its `START_FIELDS`."""
    with reading(path, "a JSON file"):
        loaded = files.read_json(path)
    if not isinstance(loaded, dict):
        raise InputError(f'{path}: must contain one JSON object, like {{"n_layer": 4}}')
    if loaded.pop("made_with", None) is not None:
        loaded = {name: value for name, value in loaded.items() if name not in START_FIELDS}
        if str(loaded.get("config")).endswith(".json"):  # every field of that file is here too
            del loaded["config"]
    loaded = without_removed(loaded)
    for name, value in loaded.items():
        if name not in field_types(cls):
            hint = did_you_mean(name, field_types(cls))
            raise InputError(f"{path}: there is no field {name!r}.{hint}")
        if isinstance(value, list | dict):
            raise InputError(f"{path}: {name} must be a single value, got {value!r}")
    return {name: str(value) for name, value in loaded.items()}


def without_removed(loaded: dict[str, Any]) -> dict[str, Any]:
    """Return a file's fields without those of earlier versions that did nothing."""
    return {k: v for k, v in loaded.items() if (k, v) not in REMOVED_FIELDS.items()}


def configure(default: Config, settings: dict[str, str], about: str | None) -> Config:
    """Return `default` with settings applied, or print the help that they ask for and exit."""
    if "help" in settings:
        import tyro  # only for help, which shows the comments of the fields

        tyro.cli(
            type(default), default=default, args=["--help"], prog=Path(sys.argv[0]).name,
            description=about or "", use_underscores=True,
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
        )  # fmt: skip
    types = field_types(type(default))
    return replace_fields(default, {name: _parse(types[name], settings[name]) for name in settings})


def _parse(hint: Any, text: str) -> Any:
    """Return a text as a value of a field's type; if it is none, the field will refuse the text."""
    kind, *others = get_args(hint) or (hint,)
    if text == "None" and NoneType in others:
        return None
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
