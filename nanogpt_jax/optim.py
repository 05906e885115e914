"""The learning rate's schedule, which parameters decay, and the optax chain."""

import jax
import jax.numpy as jnp
import optax

from nanogpt_jax.config import OptimConfig


def learning_rate_schedule(config: OptimConfig, max_iters: int) -> optax.Schedule:
    """Return the learning rate of step 0, 1, ...: linear warm-up, then a cosine down to min_lr.

    Warm-up begins at learning_rate / (warmup_iters + 1), not at 0, so the first step counts.
    From lr_decay_iters (None: max_iters) on it is min_lr. Source: nanoGPT's train.py.
    """
    decay_iters = config.lr_decay_iters or max_iters

    def schedule(step):
        if not config.decay_lr:
            return jnp.full(jnp.shape(step), config.learning_rate)
        warming = config.learning_rate * (step + 1) / (config.warmup_iters + 1)
        span = max(1, decay_iters - config.warmup_iters)
        progress = jnp.clip((step - config.warmup_iters) / span, 0, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        decaying = config.min_lr + cosine * (config.learning_rate - config.min_lr)
        decaying = jnp.where(step < decay_iters, decaying, config.min_lr)
        return jnp.where(step < config.warmup_iters, warming, decaying)

    return schedule


def decay_mask(params):
    """Return which parameters decay: those of rank 2 and more, embeddings included.

    Biases and LayerNorm's scales, of rank 1, do not: pulling them to 0 has no regularising sense.
    """
    return jax.tree.map(lambda param: param.ndim >= 2, params)


def make_optimizer(config: OptimConfig, max_iters: int) -> optax.GradientTransformation:
    """Return AdamW behind a clip of the gradient's global norm.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config, max_iters),
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    clips = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip > 0 else []
    return optax.chain(*clips, adamw)
