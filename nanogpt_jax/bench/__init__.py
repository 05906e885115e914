"""Command lines that measure or compute: speed, reports, profiles, price, placement."""

from nanogpt_jax.bench.absent import compile_for as compile_for


def time_step(config, machine, tokens) -> tuple[float, float]:
    """Do what `step.time_step` does; until then, JAX is not imported."""
    from nanogpt_jax.bench import step

    return step.time_step(config, machine, tokens)
