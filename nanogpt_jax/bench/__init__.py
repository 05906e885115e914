"""Command lines that measure or compute: speed, races, profiles, memory, price, placement."""

# ruff: noqa: F401 (what others import)

from typing import TYPE_CHECKING

from nanogpt_jax.bench.absent import compile_for

if TYPE_CHECKING:
    from nanogpt_jax.bench.step import jit_steps


def __getattr__(name: str):
    if name == "jit_steps":
        from nanogpt_jax.bench.step import jit_steps

        return jit_steps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
