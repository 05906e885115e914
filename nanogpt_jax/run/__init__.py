"""A training run: its folder, lock, checkpoints, metrics, signals and pictures."""

# ruff: noqa: F401 (what other packages import)

from typing import TYPE_CHECKING

from nanogpt_jax.run.folder import CHECKPOINTS, OUT, check_usable, newest, read_model_config
from nanogpt_jax.run.plots import (
    describe,
    describe_loss,
    loss_figure,
    new_figure,
    read_metrics,
    read_run,
    running_mean,
    save_figure,
)
from nanogpt_jax.run.run import Run

if TYPE_CHECKING:
    from nanogpt_jax.run.checkpoint import Checkpoints


def __getattr__(name: str):
    if name == "Checkpoints":  # with JAX and Orbax
        from nanogpt_jax.run.checkpoint import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
