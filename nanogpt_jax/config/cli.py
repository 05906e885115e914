"""The command line and JSON files as configurations. No JAX.

Flags carry nanoGPT's names, in any of its forms: `--n_layer 6`, `--batch_size=32`, `--bias`. A
flag, or a field of a JSON file, is first a setting: its name and its value as text.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import TypeVar

from nanogpt_jax import files
from nanogpt_jax.config.schema import field_types
from nanogpt_jax.errors import InputError, did_you_mean, reading

Config = TypeVar("Config")


# What a run's config.json says of the machine that it ran on and of that one start. None of it is
# a reader's: a compiled program is code, and another's out_dir with overwrite deletes a run.
OF_A_START = {
    "out_dir", "overwrite", "compile_cache", "compile_for", "coordinator_address", "num_processes",
    "process_id",
}  # fmt: skip


def read_settings(path: Path, cls: type) -> dict[str, str]:
    """Read a JSON file of flat fields as settings for `parse_args`.

    Of a run's own config.json, which may be a stranger's, `OF_A_START` is left out: its folder is
    where it lies, and what it brings is not run.

    Raises:
        InputError: no such file, not a JSON object, or a field that `cls` does not have.
    """
    with reading(path, "a JSON file"):
        loaded = files.read_json(path)
    if not isinstance(loaded, dict):
        raise InputError(f'{path}: must hold one JSON object, like {{"n_layer": 4}}')
    if loaded.pop("made_with", None) is not None:
        loaded = {name: value for name, value in loaded.items() if name not in OF_A_START}
        if str(loaded.get("config")).endswith(".json"):  # every field of that file stands here
            del loaded["config"]
    for name, value in loaded.items():
        if name not in field_types(cls):
            hint = did_you_mean(name, field_types(cls))
            raise InputError(f"{path}: there is no field {name!r}.{hint}")
        if isinstance(value, list | dict):
            raise InputError(f"{path}: {name} must be a single value, got {value!r}")
    return {name: str(value) for name, value in loaded.items()}


# What nanoGPT's users type and what answers it here, where the answer is not the same flag.
NANOGPT_FLAGS = {
    "device": "JAX finds the GPU or TPU by itself; JAX_PLATFORMS=cpu in front forces the CPU",
    "compile": "leave it out: JAX always compiles",
    "backend": "leave it out: all devices are used; several machines join by --coordinator_address",
    "always_save_checkpoint": "leave it out: the newest and the best checkpoint are always kept",
    "wandb_log": "--wandb here; and metrics.jsonl in the run's folder has all figures",
    "wandb_project": "WANDB_PROJECT=name in front names it, nanogpt_jax if nothing does",
    "wandb_run_name": "leave it out: --out_dir names a run",
}


def split_settings(argv: list[str], cls: type) -> dict[str, str]:
    """Split `--key value`, `--key=value` and bare `--flag` into settings; dashes as underscores.

    Raises:
        InputError: an unknown flag (with its near matches), or one without its value.
    """
    known, settings, rest = field_types(cls), {}, list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            settings["help"] = ""
            continue
        if not word.startswith("--") or word == "--":
            hint = (
                " nanoGPT's config/train_shakespeare_char.py is --config shakespeare here (it "
                "wants a GPU), and its command for CPUs, with all its flags, --config small."
            )
            hint = hint if word.endswith(".py") else ""
            raise InputError(f"{word!r} is not a flag; flags look like --n_layer 6.{hint}")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            hint = f" nanoGPT's flag: {NANOGPT_FLAGS[name]}." if name in NANOGPT_FLAGS else ""
            hint = hint or did_you_mean(name, known)
            raise InputError(f"there is no flag --{name}.{hint} (--help lists them)")
        if not equals:
            bare = not rest or rest[0].startswith("--")
            if bare and known[name] is not bool:
                raise InputError(f"--{name} needs a value, like --{name}=...")
            value = "True" if bare else rest.pop(0)
        is_bool = known[name] is bool and value.lower() in ("true", "false")
        settings[name] = value.capitalize() if is_bool else value
    return settings


def parse_args(cls: type[Config], settings: dict[str, str], default: Config, about: str) -> Config:
    """Build a configuration from settings on top of `default`; tyro parses types and prints help.

    Args:
        settings: flat field -> value as text; with "help" among them, help is printed (exit 0).
        about: what the help says above the flags.

    Raises:
        InputError: a value that is not of the field's type, or that validation refuses.
    """
    import tyro  # only a command line needs it

    argv = [f"--{name}={value}" for name, value in settings.items() if name != "help"]
    argv += ["--help"] if "help" in settings else []
    markers = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                cls,
                prog=Path(sys.argv[0]).name,
                description=about,
                args=argv,
                default=default,
                use_underscores=True,
                config=markers,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # tyro draws a box: keep the sentence above the box's first rule.
        lines = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
        lines = ["" if set(line) <= {"-"} else line for line in lines]  # the rule, in ASCII
        sentence = " ".join(lines[1:]).strip().split("  ")[0]
        sentence = re.sub(r"^Error parsing (\w+: )?", "", sentence)  # our own classes' names
        wrong_type = r": (invalid literal for int|could not convert string to float).*: (?='.*'$)"
        kind = "whole number" if "for int" in sentence else "number"
        sentence = re.sub(wrong_type, f" must be a {kind}, got ", sentence)
        raise InputError(sentence or "the flags cannot be understood") from None
