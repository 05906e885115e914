"""The mesh of devices, and how rows of a batch are laid over it.

Its three axes: over `data` and `fsdp` a batch's rows are shared out, over `fsdp` the parameters
too, over `tensor` the heads, the hidden layer and the vocabulary. On one device all are 1.
"""

import contextlib
import math

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanogpt_jax import data
from nanogpt_jax.config import MESH_AXES, ROW_AXES, TrainConfig, mesh_sizes
from nanogpt_jax.errors import InputError


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


def keep_rows_apart(x_BTD, mesh: Mesh | None):
    """Pin the residual stream to its rows' devices.

    Otherwise the compiler may follow a sharded embedding, and give each device a part of D.
    """
    return x_BTD if mesh is None else lax.with_sharding_constraint(x_BTD, by_rows(mesh, 0))


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put an array that every process has onto the devices, each process onto its own."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_places(
    tokens: np.ndarray, offsets: np.ndarray, length: int, sharding: NamedSharding
) -> jax.Array:
    """Put a batch's places onto the devices: see `steps.read_windows`.

    Where the corpus lies on the devices these are the offsets of the windows, else the windows,
    of which each process reads only its own rows.
    """
    if data.is_resident(tokens):
        return put(offsets.astype(np.int32), sharding)
    return jax.make_array_from_callback(
        (*offsets.shape, length),
        sharding,
        lambda index: data.read_windows(tokens, offsets[index[:-1]], length),
    )


def put_corpus(tokens: np.ndarray, mesh: Mesh) -> jax.Array | None:
    """Put a corpus that fits onto every device; None of one that does not."""
    return put(np.asarray(tokens), replicated(mesh)) if data.is_resident(tokens) else None
