"""Command lines that measure or compute: speed, races, profiles, memory, price, placement."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanogpt_jax.bench.step import JittedSteps, jit_steps

__all__ = ["JittedSteps", "jit_steps"]


def __getattr__(name: str):
    if name in __all__:
        from nanogpt_jax.bench import step

        return getattr(step, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
