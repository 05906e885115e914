"""How many updates a run makes, and over how many its learning rate falls. No JAX."""

from pathlib import Path

from nanogpt_jax.config import TrainConfig, replace_fields
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import Processes, duration, updates_within
from nanogpt_jax.run.folder import CHECKPOINTS, read_config, saved_steps


def settled(folder: Path, config: TrainConfig) -> TrainConfig:
    """Return a configuration that says over how many updates the rate falls: max_iters by default.

    With --minutes, both are those that an earlier start of the run in this folder found.
    """
    found = {"lr_decay_iters": config.optim.lr_decay_iters or config.max_iters}
    if config.minutes and not config.overwrite and saved_steps(folder / CHECKPOINTS):
        old = read_config(folder)
        if old["minutes"] == config.minutes:
            found = {name: old[name] for name in ("max_iters", "lr_decay_iters")}
    return replace_fields(config, found)


def fitted(
    config: TrainConfig, val_tokens: int, started_s: float, step_s: float, processes: Processes
) -> TrainConfig:
    """Return a configuration with as many updates of step_s as its minutes leave after started_s.

    The same in all processes. Raises InputError if not even one fits.
    """
    left_s = 60 * config.minutes - started_s
    n = processes.max(updates_within(config, val_tokens, left_s, step_s))
    if n < 1:
        raise InputError(
            f"minutes must leave time for an update of {duration(step_s)} and its evaluations "
            f"after {duration(started_s)} of starting, got {config.minutes:g}"
        )
    print(f"{n:,} updates of {1e3 * step_s:,.1f} ms fit, with their evaluations")
    follows = config.optim.lr_decay_iters == config.max_iters
    return replace_fields(config, {"max_iters": n} | ({"lr_decay_iters": n} if follows else {}))
