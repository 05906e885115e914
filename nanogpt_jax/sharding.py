"""The mesh of devices, and where each array of a run is stored: rules from outside the model.

The mesh has three axes: `data` and `fsdp` split the rows of a batch, `fsdp` splits the parameters
too, and `tensor` splits the heads, the hidden layer and the vocabulary. On one device all are 1.
"""

import contextlib
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nanogpt_jax.config import MESH_AXES, ROW_AXES, TrainConfig, mesh_sizes
from nanogpt_jax.errors import InputError

# Tensor parallelism goes by name: which axis of an array is split over `tensor`. Each pair of
# products is split so that only its result is summed over the devices: columns of the first, rows
# of the second. The columns of c_attn are q, k and v side by side, so their parts are exchanged
# once before attention; those of SwiGLU's c_fc and its gates likewise. Source: Shoeybi et al.,
# "Megatron-LM", 2019, section 3.
TENSOR_AXIS = {
    "wte.embedding": 0,
    "attn.c_attn.kernel": -1,  # of (D, 3 D), and of Muon's momentum (D, 3, D)
    "attn.c_attn.bias": 0,
    "attn.c_proj.kernel": 0,
    "mlp.c_fc.kernel": 1,
    "mlp.c_fc.bias": 0,
    "mlp.c_proj.kernel": 0,
    "lm_head.kernel": 1,
}


def partition_spec(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """Return how an array is split over the mesh.

    Full sharding goes by shape: the largest axis that `tensor` leaves and `fsdp` divides is split
    over it.

    Args:
        name: its path, like "h_0.attn.c_attn.kernel". Only the end counts, so gradients and
            optimizer state ("opt_state.1.0.mu.h_0...") are split like their parameter.
        sizes: devices along each axis of the mesh.
    """
    spec: list[str | None] = [None] * len(shape)
    for suffix, axis in TENSOR_AXIS.items():
        if name.endswith(suffix) and sizes["tensor"] > 1 and shape[axis] % sizes["tensor"] == 0:
            spec[axis] = "tensor"
    if len(shape) >= 2 and sizes["fsdp"] > 1:  # vectors are too small to be worth the exchange
        free = [i for i, n in enumerate(shape) if spec[i] is None and n % sizes["fsdp"] == 0]
        if name.endswith("embedding"):  # splitting columns would split the residual stream's D
            free = [i for i in free if i == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def place(tree, mesh: Mesh | AbstractMesh) -> Any:
    """Return the shapes of a tree, each with its sharding: the target of a restore or a lowering.

    Args:
        tree: from `jax.eval_shape`.
    """

    def placed(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        sharding = NamedSharding(mesh, partition_spec(name, x.shape, dict(mesh.shape)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, tree)


def unsplit_note(mesh: Mesh | AbstractMesh, params) -> str:
    """Return a line about parameters that `fsdp` cannot split; "" if they are few."""
    fsdp, leaves = mesh.shape["fsdp"], jax.tree.leaves(place(params, mesh))
    total = sum(leaf.size for leaf in leaves)
    unsplit = sum(leaf.size for leaf in leaves if "fsdp" not in leaf.sharding.spec)
    if fsdp == 1 or unsplit <= 0.05 * total:
        return ""
    return (
        f"{unsplit / total:.0%} of the parameters have no axis that fsdp={fsdp} divides: "
        "a smaller fsdp saves more memory\n"
    )


def resolve_sizes(requested: str, n_devices: int) -> tuple[int, int, int]:
    """Return the sizes of the axes data, fsdp and tensor; -1 becomes what the others leave."""
    sizes = mesh_sizes(requested)
    given = math.prod(size for size in sizes if size > 0)
    count = given * max(1, n_devices // given) if -1 in sizes else given
    if count > n_devices or (-1 in sizes and count < n_devices):
        number = f"a multiple of {given}" if -1 in sizes else given
        raise InputError(
            f"mesh {requested} needs {number} devices, but there are {n_devices}: change --mesh or "
            "leave it out"
        )
    data, fsdp, tensor = (size if size > 0 else count // given for size in sizes)
    return data, fsdp, tensor


def choose_sizes(
    config: TrainConfig, n_devices: int, use_all: bool = False
) -> tuple[int, int, int]:
    """Return the sizes of the axes data, fsdp and tensor for a run.

    If no mesh is requested and the number of devices does not divide batch_size, as many are used
    as do. Raises InputError if there are too few, or the batch or the heads cannot be split.

    Args:
        use_all: every device must take part, because they belong to several processes.
    """
    requested = config.compute.mesh
    sizes = resolve_sizes(requested, n_devices)
    if use_all and math.prod(sizes) < n_devices:
        raise InputError(
            f"mesh must use all {n_devices} devices of the hosts, but {requested} uses "
            f"{math.prod(sizes)}: leave --mesh out, or use -1 for one axis"
        )
    rows, tensor = sizes[0] * sizes[1], sizes[2]
    if config.batch_size % rows and not requested and not use_all:
        rows = next(n for n in range(rows, 0, -1) if config.batch_size % n == 0)
        sizes = (rows, 1, 1)
    if config.batch_size % rows:
        raise InputError(
            f"batch_size must be a multiple of data x fsdp = {rows} devices, got "
            f"{config.batch_size}: {_suggestion(config, rows)}"
        )
    if config.model.n_head % tensor:
        raise InputError(
            f"n_head must be a multiple of the mesh's tensor={tensor}, got {config.model.n_head}: "
            "choose a smaller tensor axis"
        )
    return sizes


def _suggestion(config: TrainConfig, rows: int) -> str:
    """Return flags for the same update, or one of similar size, whose rows can be split."""
    sequences = config.batch_size * config.gradient_accumulation_steps
    largest = max(1, round(sequences / (rows * math.ceil(config.batch_size / rows))))
    exact = [n for n in range(largest, 0, -1) if sequences % (rows * n) == 0]
    n_micro = exact[0] if exact else largest
    batch_size = rows * max(1, round(sequences / (rows * n_micro)))
    flags = f"--batch_size {batch_size} --gradient_accumulation_steps {n_micro}"
    is_same = batch_size * n_micro == sequences
    return f"{flags} makes {'the same update' if is_same else 'an update of similar size'}"


def make_mesh(sizes: tuple[int, int, int] = (1, 1, 1), devices=None) -> Mesh:
    """Return the mesh of the first devices that these sizes need.

    Args:
        devices: `jax.devices()` by default, or those of a topology.
    """
    devices = (jax.devices() if devices is None else devices)[: math.prod(sizes)]
    grid = np.array(devices).reshape(sizes)  # the devices of a host are adjacent
    if devices[0].platform == "tpu":
        # Neighbours in the mesh should be neighbours in the pod. If that is impossible, as with
        # some devices left out or several pods, any order computes the same.
        with contextlib.suppress(ValueError, NotImplementedError, AssertionError):
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto axes: the compiler splits the work; we only say where inputs and outputs are stored.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """Return the sharding of a batch whose rows are along this axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROW_AXES))


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put an array that every process has onto the devices, each process onto its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
