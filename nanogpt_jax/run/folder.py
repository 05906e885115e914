"""The folder of a run: where it is, what it holds, whether a run may resume in it. No JAX.

out/small/config.json      the whole request, with versions and device
          metrics.jsonl    one JSON object a line
          loss.png         the picture of the loss
          samples.txt      a line of text by the model at each evaluation
          tokenizer.json   decodes the model's tokens
          checkpoints/     Orbax: the newest and the best
          tensorboard/ and wandb/ if requested
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

from nanogpt_jax import files
from nanogpt_jax.config import (
    PRESETS,
    ComputeConfig,
    ModelConfig,
    TrainConfig,
    check_value,
    field_types,
    to_flat_dict,
    without_removed,
)
from nanogpt_jax.corpora import SHAKESPEARE, TOKENIZER_FILE, Corpus
from nanogpt_jax.errors import InputError, reading

OUT = Path("out")
CONFIG, METRICS, PICTURE, CHECKPOINTS = "config.json", "metrics.jsonl", "loss.png", "checkpoints"
SAMPLES = "samples.txt"
TENSORBOARD, WANDB = "tensorboard", "wandb"
# What may change from one start of a run to the next: it does not affect the updates themselves.
FREE_FIELDS = {
    "config", "out_dir", "dataset", "data_dir", "tokenizer", "text_key", "max_iters",
    "eval_interval", "eval_first", "log_interval", "sample_chars", "eval_only", "overwrite",
    "tensorboard", "wandb", "compile_cache", "compile_for", "coordinator_address", "num_processes",
    "process_id", "heartbeat_timeout_s",
    *field_types(ComputeConfig),
    "known_tokens",  # a corpus may have got its tokenizer only now; the weights are the same
}  # fmt: skip


def named_folder(config: TrainConfig) -> Path | None:
    """Return the run's folder if --out_dir or --config, with a run's own file, names it."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    path = Path(config.config)
    return path.parent if path.name == CONFIG else None


def choose(config: TrainConfig, corpus: Corpus) -> Path:
    """Return the run's folder: --out_dir, else out/CONFIG, with the dataset if it is not usual."""
    if folder := named_folder(config):
        return folder
    path = Path(config.config)
    usual = PRESETS[config.config].dataset if config.config in PRESETS else None
    is_usual = corpus.name == (usual or SHAKESPEARE)
    return OUT / (path.stem if is_usual else f"{path.stem}-{corpus.name}")


def check_usable(folder: Path) -> None:
    """Raise InputError unless a folder can be written and is empty or holds a run."""
    files.check_writable(folder)
    others = [path for path in folder.glob("*") if path.suffix not in (".partial", ".lock")]
    if others and not (folder / CONFIG).exists():
        raise InputError(
            f"out_dir must be empty or hold a run, but {folder} has files and no {CONFIG}: choose "
            "another folder"
        )


def check_room(folder: Path, checkpoint_bytes: int) -> None:
    """Raise InputError unless the disk has room for the newest checkpoint, the best and a new one.

    Those that exist count as room, since they are deleted.
    """
    checkpoints = folder / CHECKPOINTS
    counted = [checkpoints / str(step) for step in saved_steps(checkpoints)]
    existing = sum(path.stat().st_size for step in counted for path in step.rglob("*"))
    usage = shutil.disk_usage(files.check_place(checkpoints, "out_dir"))
    if usage.total and existing + usage.free < 3 * checkpoint_bytes:  # 0 if the system can't tell
        raise InputError(
            f"out_dir must have room for three checkpoints of {checkpoint_bytes / 2**20:,.1f} MiB "
            f"(newest, best, and one being written), but the disk of {folder} has only "
            f"{usage.free / 2**20:,.1f} MiB free: make room, or choose another --out_dir"
        )


def can_resume(folder: Path, config: TrainConfig, fingerprint: str) -> bool:
    """Return whether the folder holds a run that fits `config`; False if it holds none.

    A run without a checkpoint does not count: nothing is lost when it starts with other fields,
    for example after it ran out of memory. Raises InputError if the folder holds something else, or
    a run that differs; it names the fields.

    Args:
        fingerprint: of the corpus's tokens.
    """
    if not config.eval_only:  # which writes nothing
        check_usable(folder)
    if not (folder / CONFIG).exists():
        return False
    old = read_config(folder)
    if os.path.abspath(old["init_from"]) == os.path.abspath(config.init_from):
        old["init_from"] = config.init_from  # the same, in whatever words
    minutes = old["minutes"]
    if not config.minutes:  # it continues for max_iters
        old["minutes"] = 0.0
    if not saved_steps(folder / CHECKPOINTS):
        return False
    differing = [
        f"{name} {old[name]!r} -> {value!r}"
        for name, value in to_flat_dict(config).items()
        if name not in FREE_FIELDS and old[name] != value
    ]
    if old["made_with"].get("dataset_fingerprint") != fingerprint:
        is_same = old["dataset"] == config.dataset
        names = f"dataset {old['dataset']!r} -> {config.dataset!r}"
        name = "the dataset's tokens" if is_same else names
        differing.insert(0, f"{name}, another text or tokenizer")
    if differing:
        follows = old["lr_decay_iters"] != config.optim.lr_decay_iters
        hint = " (lr_decay_iters defaults to max_iters)" if follows else ""
        if minutes and not config.minutes:
            hint = f", or add --minutes {minutes:g}, with which it began"
        remedy = "resume it, choose another --out_dir, or start over with --overwrite"
        remedy = "evaluate it" if config.eval_only else f"{remedy}, which deletes it"
        raise InputError(
            f"{folder} holds a run that differs: {'; '.join(differing)}. Undo these to {remedy}"
            f"{hint}"
        )
    return True


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, newest first."""
    steps = []
    for path in checkpoints.iterdir() if checkpoints.is_dir() else []:
        # A file, or deleted just now by a training in progress.
        with contextlib.suppress(NotADirectoryError, FileNotFoundError):
            # One that a kill cut off has a longer name, or is empty.
            if re.fullmatch("0|[1-9]\\d*", path.name) and any(path.iterdir()):
                steps.append(int(path.name))
    return sorted(steps, reverse=True)


def locked(folder: Path) -> contextlib.AbstractContextManager:
    """Create the folder; return a context in which no other process can train in it.

    Raises InputError if that fails or another process is training there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"out_dir: {folder} cannot be created ({error.strerror}): choose another folder"
        ) from None

    def refuse() -> None:
        raise InputError(
            f"{folder} is being trained by another process: wait for it, or choose another "
            "--out_dir"
        ) from None

    return files.locked(folder, refuse)


def begin(folder: Path, config: TrainConfig, made_with: dict) -> None:
    """Create the folder, or update its config.json to the current request."""
    folder.mkdir(parents=True, exist_ok=True)
    files.delete_partials(folder)
    if saved_steps(folder / CHECKPOINTS):  # it resumes: its weights' origin is what it was
        origin = read_config(folder)["made_with"].get("init_from")
        made_with = made_with | ({"init_from": origin} if origin else {})
    files.write_json(folder / CONFIG, to_flat_dict(config) | {"made_with": made_with})


def note_origin(folder: Path, origin: dict) -> None:
    """Add to config.json which checkpoint of the run that init_from names this run starts with."""
    config = read_config(folder)
    config["made_with"]["init_from"] = origin
    files.write_json(folder / CONFIG, config)


def wait_until_visible(folder: Path, seconds: float = 60) -> None:
    """Wait until a run that the first process has begun is visible on this host too.

    Raises InputError if it is not within a time in which a network file system would show it.
    """
    deadline_s = time.monotonic() + seconds
    while not (folder / CONFIG).exists():
        if time.monotonic() > deadline_s:
            raise InputError(
                f"out_dir must be shared by all processes, but {folder} does not exist here: "
                "choose a folder on a shared file system"
            )
        time.sleep(0.5)


def delete(folder: Path) -> None:
    """Delete a run's files, for --overwrite, and nothing else in the folder."""
    check_usable(folder)
    if (folder / CONFIG).exists():
        read_config(folder)  # other programs write a config.json too
        try:
            for name in (CHECKPOINTS, TENSORBOARD, WANDB):
                _delete_folder(folder / name)
            for name in (METRICS, PICTURE, SAMPLES, TOKENIZER_FILE, CONFIG):
                (folder / name).unlink(missing_ok=True)
        except OSError as error:  # a new run would resume what is left of the old one
            raise InputError(
                f"--overwrite must delete the old run, but {error.filename} cannot be deleted "
                f"({error.strerror}): delete it yourself, or choose another --out_dir"
            ) from None


def _delete_folder(path: Path) -> None:
    """Delete a folder if it exists; of one that is a link to another disk, what is in it."""
    if not path.is_symlink():
        if path.exists():
            shutil.rmtree(path)
        return
    print(f"emptying {path.resolve()}, to which {path} is a link")
    for inner in path.glob("*"):
        shutil.rmtree(inner) if inner.is_dir() else inner.unlink()


def newest() -> Path:
    """Return the run under out/ with the newest checkpoint; raise InputError if there is none."""
    runs = [path for path in OUT.glob(f"*/{CHECKPOINTS}") if saved_steps(path)]
    if not runs:
        raise InputError(f"there is no run under {OUT}/ yet: train one with `python train.py`")
    return max(runs, key=lambda checkpoints: checkpoints.stat().st_mtime).parent


def read_model_config(folder: Path) -> ModelConfig:
    """Return the shape of a run's model; raise InputError if there is none or it is impossible."""
    config = read_config(folder)
    try:
        model = ModelConfig(**{name: config[name] for name in field_types(ModelConfig)})
        if model.vocab_size is None:
            raise InputError("vocab_size must be a whole number, got None")
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    return model


def read_config(folder: Path) -> dict:
    """Return a run's request: TrainConfig's fields, flat, and made_with.

    A field that the run does not name is newer than the run, which had today's default. Raises
    InputError if the folder holds no run, or a field has an impossible value.
    """
    path, types = folder / CONFIG, field_types(TrainConfig)
    with reading(path, "a run's configuration"):
        if not path.exists():
            raise InputError(f"{folder} is not a run: there is no {path}")
        loaded = files.read_json(path)
        is_ours = isinstance(loaded, dict) and isinstance(loaded.get("made_with"), dict)
        loaded = without_removed(loaded) if is_ours else {}
        unknown = ", ".join(sorted(loaded.keys() - {*types, "made_with"}))
        if unknown or not is_ours:
            raise ValueError(f"another program or version made it{unknown and f', with {unknown}'}")
    try:
        for name in loaded.keys() - {"made_with"}:
            check_value(name, types[name], loaded[name])
    except InputError as error:
        raise InputError(f"{path}: must be a run's configuration, but {error}") from None
    return to_flat_dict(TrainConfig()) | loaded
