"""Metrics for TensorBoard and Weights & Biases, whose packages are imported only when asked for.

Neither is needed: metrics.jsonl and loss.png have it all. No JAX.
"""

import importlib.util
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nanogpt_jax.config import TrainConfig, to_flat_dict
from nanogpt_jax.errors import InputError
from nanogpt_jax.run.folder import TENSORBOARD, WANDB

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by flag and extra


class Logger(NamedTuple):
    """One that is told each row of metrics.jsonl."""

    log: Callable[[dict], None]
    close: Callable[[], None]


def check(config: TrainConfig) -> None:
    """Check that what was asked for will work, before a run begins, or an old one is deleted.

    Raises:
        InputError: a package is missing, or Weights & Biases is not logged in.
    """
    for flag, package in PACKAGES.items():
        spec = importlib.util.find_spec(package) if getattr(config, flag) else None
        # A folder of that name, as of old runs, is found too, but has no origin.
        if getattr(config, flag) and (spec is None or spec.origin is None):
            raise InputError(
                f"--{flag} needs the package {package}: pip install -e '.[{flag}]', or leave it "
                "out: metrics.jsonl in the run's folder has all figures"
            )
    if config.wandb and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            logged_in = wandb.login()  # asks, on a terminal
        except wandb.Error as error:
            raise InputError(f"--wandb: Weights & Biases refuses: {error}") from error
        if not logged_in:
            raise InputError("--wandb needs a login: `wandb login`, or WANDB_MODE=offline in front")


def open_loggers(config: TrainConfig, folder: Path, begun_at: int | None) -> list[Logger]:
    """Return the loggers that a run was asked for.

    Args:
        begun_at: the step of the checkpoint that the run goes on from; None of a new run. What
            was logged past it, before a kill, is logged again.

    Raises:
        InputError: Weights & Biases refuses; it says why.
    """
    loggers = []
    if config.tensorboard:
        loggers.append(_tensorboard(folder / TENSORBOARD, 0 if begun_at is None else begun_at + 1))
    if config.wandb:
        loggers.append(_wandb(config, folder))
    return loggers


def _tensorboard(folder: Path, first_step: int) -> Logger:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_step)  # hides older events from there on
    names = {"train_loss": "loss/train", "val_loss": "loss/val"}  # on one page, side by side

    def log(row: dict) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(names.get(name, name), value, row["step"])

    return Logger(log, writer.close)


def _wandb(config: TrainConfig, folder: Path) -> Logger:
    import wandb

    id_file = folder / WANDB / "id"  # by which a resumed run goes on with its curves
    if not id_file.exists():
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanogpt_jax"),
            name=folder.name,
            dir=str(folder),
            config=to_flat_dict(config),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
        )
    except wandb.Error as error:
        raise InputError(f"--wandb: Weights & Biases refuses: {error}") from error
    # Of steps that it has already, as after a kill, it keeps the first: they are the same.
    return Logger(lambda row: run.log(row, step=row["step"]), run.finish)
