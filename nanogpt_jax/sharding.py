"""Where each array of a run lives: python -m nanogpt_jax.sharding --config NAME [--mesh ...]

Two rules, both from outside the model. Tensor parallelism goes by name: a short table says which
axis of a parameter is shared out over the mesh's axis `tensor`. Full sharding goes by shape: the
largest axis that is left and can be divided is shared out over `fsdp`; of an embedding only its
rows. What belongs to a parameter, its gradient and the optimizer's averages, lies where it lies.
The print needs no such devices.
"""

import collections
import math
import re
from functools import partial

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nanogpt_jax import mesh as meshes
from nanogpt_jax import steps
from nanogpt_jax.config import MESH_AXES, TrainConfig, mesh_sizes
from nanogpt_jax.errors import run_command
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.presets import parse_train_config, with_vocab_size
from nanogpt_jax.rungs import make_model

# Each pair of products is split so that only its result is summed over the devices: columns of the
# first, rows of the second. The columns of c_attn are q, k and v side by side, so their parts are
# exchanged once before attention; those of SwiGLU's c_fc and its gates likewise. Source: Shoeybi et
# al., "Megatron-LM", 2019, section 3.
TENSOR_AXIS = {
    "wte.embedding": 0,
    "attn.c_attn.kernel": -1,  # of (D, 3 D), and of Muon's mean (D, 3, D)
    "attn.c_attn.bias": 0,
    "attn.c_proj.kernel": 0,
    "mlp.c_fc.kernel": 1,
    "mlp.c_fc.bias": 0,
    "mlp.c_proj.kernel": 0,
    "lm_head.kernel": 1,
}


def partition_spec(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Return how an array is laid over the mesh.

    Args:
        name: its path, like "h_0.attn.c_attn.kernel"; what stands before it ("opt_state.1.0.mu.")
            is of no account.
        sizes: devices along each axis of the mesh.
    """
    spec: list[str | None] = [None] * len(shape)
    for suffix, axis in TENSOR_AXIS.items():
        if name.endswith(suffix) and sizes["tensor"] > 1 and shape[axis] % sizes["tensor"] == 0:
            spec[axis] = "tensor"
    if len(shape) >= 2 and sizes["fsdp"] > 1:  # vectors are too small to be worth the exchange
        free = [i for i, n in enumerate(shape) if spec[i] is None and n % sizes["fsdp"] == 0]
        if name.endswith("embedding"):  # a lookup in columns would spread the stream over D
            free = [i for i in free if i == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def tree_shardings(mesh: Mesh | AbstractMesh, abstract):
    """Return the sharding of every array of a tree, from its names and shapes.

    Args:
        abstract: a state, or a part of it, from `jax.eval_shape`.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, partition_spec(name, leaf.shape, dict(mesh.shape)))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def whole_note(mesh: Mesh | AbstractMesh, params) -> str:
    """Return a line about parameters that `fsdp` leaves whole, "" where they are few."""
    fsdp = mesh.shape["fsdp"]
    leaves, shardings = jax.tree.leaves(params), jax.tree.leaves(tree_shardings(mesh, params))
    whole = sum(
        leaf.size
        for leaf, sharding in zip(leaves, shardings, strict=True)
        if "fsdp" not in sharding.spec
    )
    share = whole / sum(leaf.size for leaf in leaves)
    if fsdp == 1 or share <= 0.05:
        return ""
    return (
        f"{share:.0%} of the parameters have no axis that fsdp={fsdp} divides: "
        "a smaller fsdp saves more\n"
    )


def on_one_device(abstract):
    """Return a tree of shapes, each placed on the first device."""
    return with_shardings(abstract, tree_shardings(meshes.make_mesh((1, 1, 1)), abstract))


def with_shardings(abstract, shardings):
    """Return a tree of shapes, each with its place: what a restore or a lowering is aimed at."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def abstract_state(config: TrainConfig) -> steps.TrainState:
    """Return the shapes of a run's state."""
    init = partial(steps.init_state, make_model(config.model), make_optimizer(config.optim, 1))
    return jax.eval_shape(init, jax.random.key(0))


def main(argv: list[str]) -> None:
    """Print shape, placement and bytes a device of each array of the state."""
    config = with_vocab_size(parse_train_config(argv, __doc__))
    asked = [size for size in mesh_sizes(config.compute.mesh) if size > 0]
    sizes = meshes.resolve_sizes(config.compute.mesh, max(jax.device_count(), math.prod(asked)))
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    state = abstract_state(config)
    rows = collections.Counter()  # layers are alike: one line for all
    total_bytes = device_bytes = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(tree_shardings(mesh, state)),
        strict=True,
    ):
        bytes_here = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total_bytes += leaf.size * leaf.dtype.itemsize
        device_bytes += bytes_here
        name = re.sub(r"h_\d+", "h_*", jax.tree_util.keystr(path, simple=True, separator="."))
        placement = ", ".join(str(axis or "-") for axis in sharding.spec)
        rows[name, str(leaf.shape), f"({placement})", f"{bytes_here:,}"] += 1
    table = [("array", "shape", "placement", "bytes a device", ""), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    for row, count in [(table[0], 1), *rows.items()]:
        name, shape, placement, size = row[:4]
        times = f"  x {count}" if count > 1 else ""
        print(
            f"{name:{widths[0]}}  {shape:{widths[1]}}  {placement:{widths[2]}}  "
            f"{size:>{widths[3]}}{times}"
        )
    print(
        f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}: of the state's {total_bytes:,} "
        f"bytes each device holds {device_bytes:,}; gradients and activations come on top"
    )
    print(whole_note(mesh, state.params), end="")


if __name__ == "__main__":
    run_command(main)
