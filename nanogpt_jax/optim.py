"""The learning rate's schedule, which parameters decay, and the optax chain."""

import jax
import jax.numpy as jnp
import optax

from nanogpt_jax.config import OptimConfig

MUON_STEPS = 3  # of Newton and Schulz; with AOL's scaling three do what five do without
ADAMW_RMS = 0.2  # root mean square of AdamW's updates, before the learning rate


def learning_rate_schedule(config: OptimConfig, max_iters: int) -> optax.Schedule:
    """Return the learning rate of step 0, 1, ...: linear warm-up, then a way down to min_lr.

    Warm-up begins at learning_rate / (warmup_iters + 1), not at 0, so the first step counts.
    From lr_decay_iters (None: max_iters) on it is min_lr. Source: nanoGPT's train.py; of wsd: Hu et
    al., "MiniCPM", 2024.
    """
    decay_iters = config.lr_decay_iters or max_iters

    def schedule(step):
        if not config.decay_lr:
            return jnp.full(jnp.shape(step), config.learning_rate)
        warming = config.learning_rate * (step + 1) / (config.warmup_iters + 1)
        span = max(1, decay_iters - config.warmup_iters)
        progress = jnp.clip((step - config.warmup_iters) / span, 0, 1)
        if config.schedule == "cosine":
            height = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            height = jnp.minimum(1, (1 - progress) / config.cooldown)
        decaying = config.min_lr + height * (config.learning_rate - config.min_lr)
        decaying = jnp.where(step < decay_iters, decaying, config.min_lr)
        return jnp.where(step < config.warmup_iters, warming, decaying)

    return schedule


def decay_mask(params):
    """Return which parameters decay: those of rank 2 and more, embeddings included.

    Biases and LayerNorm's scales, of rank 1, do not: pulling them to 0 has no regularising sense.
    """
    return jax.tree.map(lambda param: param.ndim >= 2, params)


def make_optimizer(config: OptimConfig, max_iters: int) -> optax.GradientTransformation:
    """Return the optimizer behind a clip of the gradient's global norm."""
    make = {"adamw": _adamw, "muon": _muon_and_adamw}[config.optimizer]
    clips = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip > 0 else []
    return optax.chain(*clips, make(config, learning_rate_schedule(config, max_iters)))


def _adamw(
    config: OptimConfig, schedule: optax.Schedule, nesterov: bool = False
) -> optax.GradientTransformation:
    """Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019."""
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        nesterov=nesterov,
    )


def _muon_and_adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    def labels(params):
        return jax.tree.map({True: "muon", False: "adamw"}.get, is_for_muon(params))

    parts = {"muon": _muon(config, schedule), "adamw": _adamw(config, schedule, nesterov=True)}
    return optax.partition(parts, labels)


def is_for_muon(params):
    """Return which parameters Muon is for: the matrices of the blocks, not embedding or head."""
    return jax.tree_util.tree_map_with_path(
        lambda path, param: param.ndim == 2 and path[0].key.startswith("h_"), params
    )


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return Muon, each update as large as AdamW's are as a rule (`consistent_rms`).

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et
    al., "Muon is scalable for LLM training", 2025; of the scaling that saves Newton-Schulz steps,
    AOL: Boissin et al., "Turbo-Muon", 2025.
    """

    def dimensions(parts):
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(0, x.ndim - 1), parts)

    muon = optax.contrib.muon(
        schedule,
        ns_steps=MUON_STEPS,
        beta=config.muon_momentum,
        weight_decay=config.weight_decay,
        preconditioning="aol",
        consistent_rms=ADAMW_RMS,
        muon_weight_dimension_numbers=dimensions,
    )

    def update(grads, state, params=None):
        updates, state = muon.update(_parted(grads), state, _parted(params))
        return jax.tree.map(lambda x: x.reshape(len(x), -1), updates), state

    return optax.GradientTransformation(lambda params: muon.init(_parted(params)), update)


def _parted(tree):
    """Return matrices with q, k and v, which lie side by side, apart, as (D, 3, D): each shall be
    orthogonal by itself."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.reshape(len(x), 3, -1) if path[-2].key == "c_attn" else x, tree
    )
