"""Devices, and where each array lives. One device so far: the first one JAX finds."""

import jax
from jax.sharding import SingleDeviceSharding


def place(abstract):
    """Return a tree of shapes with the place of each array: what a restore is aimed at.

    Args:
        abstract: a tree from `jax.eval_shape`.
    """
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )


def describe_device() -> str:
    """Return the device in words, like "cpu" or "gpu: NVIDIA H200"."""
    device = jax.devices()[0]
    others = f", the first of {jax.device_count()}" if jax.device_count() > 1 else ""
    kind = "" if device.device_kind == device.platform else f": {device.device_kind}"
    return f"{device.platform}{kind}{others}"
