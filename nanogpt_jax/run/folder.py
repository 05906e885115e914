"""The folder of a run: where it lies, what it holds, whether a run may go on in it. No JAX.

out/small/config.json      all that was asked, with versions and device
          metrics.jsonl    one JSON object a line
          loss.png         the loss's picture
          tokenizer.json   what decodes the model's tokens
          checkpoints/     Orbax: the newest and the best
          tensorboard/ and wandb/ where they were asked for
"""

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from nanogpt_jax import corpora, files
from nanogpt_jax.config import (
    ComputeConfig,
    ModelConfig,
    TrainConfig,
    check_value,
    field_types,
    to_flat_dict,
)
from nanogpt_jax.errors import InputError, reading

OUT = Path("out")
CONFIG, METRICS, PICTURE, CHECKPOINTS = "config.json", "metrics.jsonl", "loss.png", "checkpoints"
TENSORBOARD, WANDB = "tensorboard", "wandb"
# What may change from one start of a run to the next: it does not touch the updates themselves.
FREE_FIELDS = {
    "config", "out_dir", "dataset", "data_dir", "tokenizer", "max_iters", "eval_interval",
    "eval_first", "log_interval", "eval_only", "overwrite", "tensorboard", "wandb", "compile_cache",
    "compile_for", "coordinator_address", "num_processes", "process_id", "heartbeat_timeout_s",
    *field_types(ComputeConfig),
    "known_tokens",  # a corpus may have got its tokenizer only now; the weights are the same
}  # fmt: skip


def choose(config: TrainConfig, dataset_name: str, default_dataset: str) -> Path:
    """Return the run's folder: --out_dir, else out/CONFIG, with the dataset where it is another."""
    if config.out_dir is not None:
        return Path(config.out_dir)
    path = Path(config.config)
    if path.name == CONFIG:  # a run's own: go on with it
        return path.parent
    name = path.stem
    return OUT / (name if dataset_name == default_dataset else f"{name}-{dataset_name}")


def check_usable(folder: Path) -> None:
    """Check that a folder can be made or written and is free or holds a run, without making it.

    Raises:
        InputError: see `files.check_writable`; or it holds other things.
    """
    files.check_writable(folder)
    others = [path for path in folder.glob("*") if path.suffix != ".partial"]  # left by a kill
    if others and not (folder / CONFIG).exists():
        raise InputError(
            f"out_dir must be empty or hold a run, but {folder} has no {CONFIG}: name another"
        )


def check_room(folder: Path, checkpoint_bytes: int) -> None:
    """Check that the disk has room for the newest checkpoint, the best, and one being written.

    Raises:
        InputError: it has not, those that are there already counted in.
    """
    checkpoints = folder / CHECKPOINTS
    counted = [checkpoints / str(step) for step in saved_steps(checkpoints)]
    there = sum(path.stat().st_size for step in counted for path in step.rglob("*"))
    usage = shutil.disk_usage(files.check_place(checkpoints, "out_dir"))
    free = usage.free
    if usage.total and there + free < 3 * checkpoint_bytes:  # 0 where the system does not know
        raise InputError(
            f"out_dir must have room for three checkpoints of {checkpoint_bytes / 2**20:,.1f} MiB "
            f"(newest, best, and one being written), but on the disk of {folder} only "
            f"{free / 2**20:,.1f} MiB are free: make room, or name another --out_dir"
        )


def check_resumable(folder: Path, config: TrainConfig, fingerprint: str) -> bool:
    """Return whether a run that fits `config` lies in the folder, False if there is none.

    A run without a checkpoint is none: nothing is lost when it starts with other fields, after
    it ran out of memory, say.

    Raises:
        InputError: the folder holds something else, or a run that differs; fields are named.
    """
    check_usable(folder)
    if not (folder / CONFIG).exists():
        return False
    # A field that the run does not name is younger than the run, which had today's default.
    begun = to_flat_dict(TrainConfig()) | read_config(folder)
    if not has_checkpoint(folder):
        return False
    differing = [
        f"{name} {begun.get(name)!r} -> {value!r}"
        for name, value in to_flat_dict(config).items()
        if name not in FREE_FIELDS and begun.get(name) != value
    ]
    if begun.get("made_with", {}).get("dataset_fingerprint") != fingerprint:
        names = f"{begun.get('dataset')!r} -> {config.dataset!r}"
        is_same = begun.get("dataset") == config.dataset
        name = "the dataset's tokens" if is_same else f"dataset {names}"
        differing.insert(0, f"{name}, another text or tokenizer")
    if differing:
        follows = begun.get("lr_decay_iters") != config.optim.lr_decay_iters
        hint = " (lr_decay_iters is max_iters where it is not given)" if follows else ""
        raise InputError(
            f"{folder} holds a run that differs: {'; '.join(differing)}. Take those back to go on "
            f"with it, --out_dir for a new place, or --overwrite to delete it and start anew{hint}"
        )
    return True


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has a checkpoint."""
    return bool(saved_steps(folder / CHECKPOINTS))


def saved_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, the newest first.

    One cut off by a kill has a longer name, and an empty folder is none.
    """
    found = checkpoints.iterdir() if checkpoints.is_dir() else []
    names = [path.name for path in found if path.is_dir() and any(path.iterdir())]
    steps = (int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
    return sorted(steps, reverse=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from training in it meanwhile.

    Raises:
        InputError: it cannot be made, or another process is training there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out_dir: {folder} cannot be made ({error.strerror})") from None

    def refuse() -> None:
        raise InputError(f"{folder} is being trained by another process: wait for it") from None

    with files.locked(folder, refuse):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # nothing was written: leave nothing behind
                folder.rmdir()


def begin(folder: Path, config: TrainConfig, fingerprint: str, made_with: dict) -> None:
    """Make the folder, or bring its config.json up to what was asked now."""
    folder.mkdir(parents=True, exist_ok=True)
    files.delete_partials(folder)
    facts = {**made_with, "dataset_fingerprint": fingerprint}
    files.write_json(folder / CONFIG, to_flat_dict(config) | {"made_with": facts})


def wait_until_seen(folder: Path, seconds: float = 60) -> None:
    """Wait until a folder that the first process has begun is seen here too.

    Raises:
        InputError: it is not, within a time in which a network's file system notices.
    """
    deadline_s = time.monotonic() + seconds
    while not (folder / CONFIG).exists():
        if time.monotonic() > deadline_s:
            raise InputError(f"out_dir must be shared by all processes, but {folder} is not here")
        time.sleep(0.5)


def delete(folder: Path) -> None:
    """Delete a run's files for --overwrite, and nothing else that lies beside them.

    Raises:
        InputError: the folder holds files, but no run.
    """
    check_usable(folder)
    if (folder / CONFIG).exists():
        read_config(folder)  # other programs write a config.json too
        for name in (CHECKPOINTS, TENSORBOARD, WANDB):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (METRICS, PICTURE, corpora.TOKENIZER_FILE, CONFIG):
            (folder / name).unlink(missing_ok=True)


def newest() -> Path:
    """Return the run below out/ with the newest checkpoint.

    Raises:
        InputError: there is none.
    """
    runs = [path.parent for path in OUT.glob(f"*/{CHECKPOINTS}") if has_checkpoint(path.parent)]
    if not runs:
        raise InputError(f"no run lies under {OUT}/ yet: train one with `python train.py`")
    return max(runs, key=lambda run: (run / CHECKPOINTS).stat().st_mtime)


def read_model_config(folder: Path) -> ModelConfig:
    """Return the shape of a run's model.

    Raises:
        InputError: the folder holds no run, or none of a shape that can be.
    """
    begun = read_config(folder)
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    try:
        model = ModelConfig(**{name: begun[name] for name in names & begun.keys()})
        if model.vocab_size is None:
            raise InputError("vocab_size must be a whole number, got None")
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    return model


def read_config(folder: Path) -> dict:
    """Return what a run was asked for: TrainConfig's fields, flat, and made_with.

    Raises:
        InputError: the folder holds no run, or a field has a value that it cannot have.
    """
    path = folder / CONFIG
    with reading(path, "a run's configuration"):
        if not path.exists():
            raise InputError(f"out_dir must hold a run, but there is no {path}")
        loaded = files.read_json(path)
    ours = (
        isinstance(loaded, dict)
        and isinstance(loaded.get("made_with"), dict)
        and loaded.keys() <= {*field_types(TrainConfig), "made_with"}
    )
    if not ours:
        raise InputError(f"{path}: must be a run's configuration, but was made by something else")
    try:
        for name in loaded.keys() - {"made_with"}:
            check_value(name, field_types(TrainConfig)[name], loaded[name])
    except InputError as error:
        raise InputError(f"{path}: must be a run's configuration, but {error}") from None
    return loaded
