"""Command lines that measure or compute: speed, reports, profiles, price, placement."""

from nanogpt_jax.bench.absent import compile_for as compile_for


def time_step(config, machine, tokens) -> tuple[float, float]:
    """Return what `step.time_step` does; importing this package does not import JAX."""
    from nanogpt_jax.bench import step

    return step.time_step(config, machine, tokens)
