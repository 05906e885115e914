"""Metrics for TensorBoard and Weights & Biases, whose packages are imported only on request.

Neither is needed: metrics.jsonl and loss.png have everything. No JAX.
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
    """Receives each row of metrics.jsonl."""

    log: Callable[[dict], None]
    close: Callable[[], None]


def check(config: TrainConfig) -> None:
    """Raise InputError if a package is missing or Weights & Biases is not logged in."""
    for flag, package in PACKAGES.items():
        # A folder of that name, as in old runs, is found too, but has no origin.
        spec = importlib.util.find_spec(package)
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
            raise InputError("--wandb needs a login: run `wandb login`, or set WANDB_MODE=offline")


def open_loggers(config: TrainConfig, folder: Path, resumed_at: int | None) -> list[Logger]:
    """Return the requested loggers. What was logged past `resumed_at`, before a kill, is replaced.

    Raises InputError with the reason if Weights & Biases refuses.
    """
    first_step = 0 if resumed_at is None else resumed_at + 1
    loggers = [_tensorboard(folder / TENSORBOARD, first_step)] if config.tensorboard else []
    return [*loggers, _wandb(config, folder)] if config.wandb else loggers


def _tensorboard(folder: Path, first_step: int) -> Logger:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_step)  # hides events from there on
    names = {"train_loss": "loss/train", "val_loss": "loss/val"}  # on one page, side by side

    def log(row: dict) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(names.get(name, name), value, row["step"])

    return Logger(log, writer.close)


def _wandb(config: TrainConfig, folder: Path) -> Logger:
    import wandb

    id_file = folder / WANDB / "id"  # lets a resumed run continue its curves
    if not id_file.exists():
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanogpt_jax"), name=folder.name,
            dir=str(folder), config=to_flat_dict(config),
            id=id_file.read_text(encoding="utf-8"), resume="allow",
        )  # fmt: skip
    except wandb.Error as error:
        raise InputError(f"--wandb: Weights & Biases refuses: {error}") from error
    # If it already has a step, as after a kill, it keeps the first row: they are equal.
    return Logger(lambda row: run.log(row, step=row["step"]), run.finish)
