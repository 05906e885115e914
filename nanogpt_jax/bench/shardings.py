"""Show where each array of a run's state is stored: python -m nanogpt_jax shardings --mesh fsdp=8

Prints shape, placement and bytes per device of each array, for any number of devices, whatever
this machine has. All flags of train.py apply, for example --config gpt2-xl.
"""

import collections
import math
import re

import jax
from jax.sharding import AbstractMesh, AxisType

from nanogpt_jax.bench.step import abstract_state
from nanogpt_jax.config import MESH_AXES, mesh_sizes, parse_train_config, with_vocab_size
from nanogpt_jax.run import adopt
from nanogpt_jax.sharding import resolve_sizes, unsplit_note


def main(argv: list[str]) -> None:
    """Print a line for each kind of array, and what one device holds of all of them."""
    config = with_vocab_size(adopt(parse_train_config(argv, __doc__ or ""))[0])
    requested = [size for size in mesh_sizes(config.compute.mesh) if size > 0]
    n_devices = max(jax.device_count(), math.prod(requested))
    sizes = resolve_sizes(config.compute.mesh, n_devices)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    state = abstract_state(config, mesh)
    rows = collections.Counter()  # layers are alike and share a line
    total_bytes = device_bytes = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        leaf_bytes = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total_bytes += leaf.size * leaf.dtype.itemsize
        device_bytes += leaf_bytes
        name = re.sub(r"h_\d+", "h_*", jax.tree_util.keystr(path, simple=True, separator="."))
        placement = ", ".join(str(axis or "-") for axis in leaf.sharding.spec)
        rows[name, str(leaf.shape), f"({placement})", f"{leaf_bytes:,}"] += 1
    header = "array", "shape", "placement", "bytes a device"
    lines = {header: 1, **rows}
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for (*cells, size), count in lines.items():
        left = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False))
        print(*left, f"{size:>{widths[3]}}" + (f"  x {count}" if count > 1 else ""), sep="  ")
    print(
        f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}: each device holds "
        f"{device_bytes:,} of the state's {total_bytes:,} bytes; gradients and activations add to "
        "that"
    )
    print(unsplit_note(mesh, state.params), end="")
