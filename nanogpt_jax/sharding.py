"""The mesh of devices, and where each array of a run is stored.

The mesh has three axes: `data` and `fsdp` split a batch's rows, `fsdp` splits the parameters too,
and `tensor` splits the heads, the hidden layer and the vocabulary. On one device all are 1.

Two rules place the arrays, both from outside the model. Tensor parallelism goes by name: a short
table says which axis of a parameter is split over `tensor`. Full sharding goes by shape: the
largest remaining axis that divides evenly is split over `fsdp`; of an embedding, only its rows.
Gradients and optimizer state share their parameter's sharding.
"""

import contextlib
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nanogpt_jax.config import MESH_AXES, ROW_AXES, TrainConfig, mesh_sizes
from nanogpt_jax.errors import InputError

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
    return with_shardings(abstract, tree_shardings(make_mesh((1, 1, 1)), abstract))


def with_shardings(abstract, shardings):
    """Return a tree of shapes, each with its place: what a restore or a lowering is aimed at."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def resolve_sizes(asked: str, n_devices: int) -> tuple[int, int, int]:
    """Return the sizes of the axes data, fsdp and tensor: -1 is what the others leave.

    Raises:
        InputError: there are not so many devices.
    """
    sizes = mesh_sizes(asked)
    given = math.prod(size for size in sizes if size > 0)
    count = given * max(1, n_devices // given) if -1 in sizes else given
    if count > n_devices or (-1 in sizes and count < n_devices):
        number = f"a multiple of {given}" if -1 in sizes else given
        raise InputError(f"mesh {asked} needs {number} devices, but has {n_devices}")
    data, fsdp, tensor = (size if size > 0 else count // given for size in sizes)
    return data, fsdp, tensor


def choose_sizes(
    config: TrainConfig, n_devices: int, use_all: bool = False
) -> tuple[int, int, int]:
    """Return the sizes of the axes data, fsdp and tensor for a run.

    Where no mesh is asked for and batch_size cannot be divided by the number of devices, as many
    are used as it can be divided by.

    Args:
        use_all: all devices must take part, since they are those of several processes.

    Raises:
        InputError: not so many devices, or the batch or the heads cannot be shared out.
    """
    asked = config.compute.mesh
    sizes = resolve_sizes(asked, n_devices)
    if use_all and math.prod(sizes) < n_devices:
        raise InputError(
            f"mesh {asked} takes {math.prod(sizes)} devices, but all {n_devices} of several hosts "
            "must take part"
        )
    rows, tensor = sizes[0] * sizes[1], sizes[2]
    if config.batch_size % rows and not asked and not use_all:
        rows = next(n for n in range(rows, 0, -1) if config.batch_size % n == 0)
        sizes = (rows, 1, 1)
    if config.batch_size % rows:
        raise InputError(
            f"batch_size must be a multiple of data x fsdp = {rows} devices, but is "
            f"{config.batch_size}: {_suggestion(config, rows)}"
        )
    if config.model.n_head % tensor:
        raise InputError(
            f"n_head must be a multiple of the mesh's tensor={tensor}, but is {config.model.n_head}"
        )
    return sizes


def _suggestion(config: TrainConfig, rows: int) -> str:
    """Return the flags of the same update, or of one about as large, whose rows can be shared."""
    sequences = config.batch_size * config.gradient_accumulation_steps
    most = max(1, round(sequences / (rows * math.ceil(config.batch_size / rows))))
    exact = [n for n in range(most, 0, -1) if sequences % (rows * n) == 0]
    n_micro = exact[0] if exact else most
    batch_size = rows * max(1, round(sequences / (rows * n_micro)))
    flags = f"--batch_size {batch_size} --gradient_accumulation_steps {n_micro}"
    same = "makes the same update" if batch_size * n_micro == sequences else "comes near"
    return f"{flags} {same}"


def make_mesh(sizes: tuple[int, int, int], devices=None) -> Mesh:
    """Return the mesh of the first devices that these sizes need.

    Args:
        devices: of `jax.devices()` (the default) or of a topology.
    """
    devices = (jax.devices() if devices is None else devices)[: math.prod(sizes)]
    grid = np.array(devices).reshape(sizes)  # those of a host lie side by side
    if devices[0].platform == "tpu":
        # Neighbours in the mesh shall be neighbours in the pod. Where that cannot be, as with some
        # devices left out or several pods, any order computes the same.
        with contextlib.suppress(ValueError, NotImplementedError, AssertionError):
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto axes: the compiler shares the work out, told only where inputs and outputs lie.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device has in whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, axis: int) -> NamedSharding:
    """Return the sharding of a batch whose rows lie along this axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROW_AXES))


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put an array that every process has onto the devices, each process onto its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
