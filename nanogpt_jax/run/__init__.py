"""A training run: its folder, lock, checkpoints, metrics, signals and pictures."""

# ruff: noqa: F401 (what other packages import)

from nanogpt_jax.run.folder import OUT, check_usable, newest, read_model_config
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
from nanogpt_jax.run.pretrained import adopt, adopt_tokenizer, load_params
from nanogpt_jax.run.run import Run
