"""Command lines that measure or compute: speed, reports, profiles, price, placement."""

from nanogpt_jax.bench.absent import compile_for as compile_for
