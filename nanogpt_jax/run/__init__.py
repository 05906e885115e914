"""A training run: its folder, lock, checkpoints, metrics, signals and pictures.

What needs JAX is imported only when it is asked for.
"""

from typing import TYPE_CHECKING

from nanogpt_jax.run.folder import (
    CHECKPOINTS,
    OUT,
    check_usable,
    has_checkpoint,
    newest,
    read_model_config,
)
from nanogpt_jax.run.plots import (
    describe_loss,
    new_figure,
    read_metrics,
    running_mean,
    save_figure,
)
from nanogpt_jax.run.run import Run

if TYPE_CHECKING:
    from nanogpt_jax.run.checkpoint import Checkpoints

__all__ = [
    "CHECKPOINTS",
    "OUT",
    "Checkpoints",
    "Run",
    "check_usable",
    "describe_loss",
    "has_checkpoint",
    "new_figure",
    "newest",
    "read_metrics",
    "read_model_config",
    "running_mean",
    "save_figure",
]


def __getattr__(name: str):
    if name == "Checkpoints":
        from nanogpt_jax.run.checkpoint import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
