"""Command lines that measure or compute: speed, races, profiles, memory, price, placement."""

from nanogpt_jax.bench.absent import compile_for as compile_for
