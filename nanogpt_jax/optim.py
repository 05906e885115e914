"""The learning rate's schedule, which parameters decay, and the optax chain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from nanogpt_jax.config import OptimConfig

MUON_STEPS = 3  # Newton-Schulz iterations; with AOL scaling three do what five do without
ADAMW_RMS = 0.2  # usual root mean square of AdamW's updates, before the learning rate


class Optimizer(NamedTuple):
    """An optax.GradientTransformation that also knows its learning rate."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Callable[[jax.Array], jax.Array]  # of the number of updates before this one


def learning_rate_schedule(config: OptimConfig, max_iters: int) -> optax.Schedule:
    """Return the learning rate of update 0, 1, ...: linear warm-up, then a decay to min_lr.

    Warm-up starts at learning_rate / (warmup_iters + 1), not at 0, so the first update counts.
    From lr_decay_iters (None: max_iters) on it is min_lr. Source: nanoGPT's train.py; for wsd, Hu
    et al., "MiniCPM", 2024.
    """
    peak, warmup_iters = config.learning_rate, config.warmup_iters
    if not config.decay_lr:
        return optax.constant_schedule(peak)
    span = (config.lr_decay_iters or max_iters) - warmup_iters
    if span <= 0:
        decay = optax.constant_schedule(config.min_lr)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, span, alpha=config.min_lr / peak if peak else 0)
    else:  # wsd: constant, then a straight line
        cooldown_iters = max(1, round(config.cooldown * span))
        decay = optax.linear_schedule(peak, config.min_lr, cooldown_iters, span - cooldown_iters)
    warmup = optax.linear_schedule(peak / (warmup_iters + 1), peak, max(1, warmup_iters))
    return optax.join_schedules([warmup, decay], [warmup_iters])


def decay_mask(params):
    """Return which parameters decay: those of rank 2 and more, embeddings included, none else."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)


def make_optimizer(config: OptimConfig, max_iters: int) -> Optimizer:
    """Return the optimizer, behind a clip of the gradient's global norm."""
    schedule = learning_rate_schedule(config, max_iters)
    make = {"adamw": _adamw, "muon": _muon_and_adamw}[config.optimizer]
    clips = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip > 0 else []
    tx = optax.chain(*clips, make(config, schedule))
    return Optimizer(*tx, lambda count: jnp.asarray(schedule(count), jnp.float32))


def _adamw(
    config: OptimConfig, schedule: optax.Schedule, nesterov: bool = False
) -> optax.GradientTransformation:
    """Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019."""
    return optax.adamw(
        schedule, config.beta1, config.beta2, eps=1e-8, weight_decay=config.weight_decay,
        mask=decay_mask, nesterov=nesterov,
    )  # fmt: skip


def _muon_and_adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    adamw = _adamw(config, schedule, nesterov=True)
    return optax.partition({"muon": _muon(config, schedule), "adamw": adamw}, muon_or_adamw)


def muon_or_adamw(params):
    """Return what updates each parameter: Muon the blocks' matrices, not embedding or head."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: "muon" if x.ndim == 2 and path[0].key.startswith("h_") else "adamw", params
    )


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return Muon, its updates scaled to the usual size of AdamW's (`consistent_rms`).

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et
    al., "Muon is scalable for LLM training", 2025. AOL scaling, which saves Newton-Schulz steps:
    Boissin et al., "Turbo-Muon", 2025.
    """

    def dimensions(matrices):
        return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(0, x.ndim - 1), matrices)

    muon = contrib.muon(
        schedule,
        ns_steps=MUON_STEPS,
        beta=config.muon_momentum,
        weight_decay=config.weight_decay,
        preconditioning="aol",
        consistent_rms=ADAMW_RMS,
        muon_weight_dimension_numbers=dimensions,
    )

    def update(updates, state, params=None):
        updates, state = muon.update(_split_qkv(updates), state, _split_qkv(params))
        return jax.tree.map(lambda x: x.reshape(len(x), -1), updates), state

    return optax.GradientTransformation(lambda params: muon.init(_split_qkv(params)), update)


def _split_qkv(tree):
    """Return c_attn's matrices as (D, 3, D): q, k and v are each orthogonalised by itself."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.reshape(len(x), 3, -1) if path[-2].key == "c_attn" else x, tree
    )
