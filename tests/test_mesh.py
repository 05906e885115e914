"""How devices are laid out, and which of them holds which rows."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from nanogpt_jax import data, steps
from nanogpt_jax import mesh as meshes
from nanogpt_jax.config import ComputeConfig, mesh_sizes, presets
from nanogpt_jax.errors import InputError

TOKENS = np.random.default_rng(0).integers(0, 999, 400).astype(np.uint16)
LENGTH = 9


def asked(mesh="", batch_size=8, gradient_accumulation_steps=1):
    """A configuration with 2 heads."""
    return dataclasses.replace(
        presets.tiny(),
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        compute=ComputeConfig(mesh=mesh),
    )


def suggestion_of(config, rows):
    """The configuration that the error suggests, and the error."""
    with pytest.raises(InputError, match=f"multiple of data x fsdp = {rows} devices") as error:
        meshes.choose_sizes(config, rows, use_all=True)
    flags = re.search(r"--batch_size (\d+) --gradient_accumulation_steps (\d+)", str(error.value))
    batch_size, n_micro = map(int, flags.groups())
    fields = {"batch_size": batch_size, "gradient_accumulation_steps": n_micro}
    return dataclasses.replace(config, **fields), str(error.value)


# What the flag says


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", (-1, 1, 1)),
        ("data=2", (2, 1, 1)),
        ("fsdp=4", (-1, 4, 1)),
        ("fsdp=-1", (1, -1, 1)),
        ("tensor=2,fsdp=-1", (1, -1, 2)),
        ("data=2,fsdp=4,tensor=16", (2, 4, 16)),
        ("tensor=16,data=2,fsdp=4", (2, 4, 16)),
        (" data = -1, tensor = 2 ", (-1, 1, 2)),
    ],
)
def test_a_mesh_is_read_in_any_order_and_data_takes_what_is_left(text, sizes):
    assert mesh_sizes(text) == sizes


@pytest.mark.parametrize(
    "text",
    ["model=2", "data", "data=", "data=0", "data=-2", "data=1.5", "data=two", "data=2,data=2", "4"],
)
def test_a_mesh_that_cannot_be_read_is_refused_with_an_example(text):
    with pytest.raises(InputError, match=r"data=-1,fsdp=1,tensor=1.*came"):
        ComputeConfig(mesh=text)


def test_only_one_axis_can_take_what_is_left():
    with pytest.raises(InputError, match="one -1"):
        ComputeConfig(mesh="data=-1,fsdp=-1")


# Sizes for a number of devices


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        ("", (4, 1, 1)),
        ("fsdp=-1", (1, 4, 1)),
        ("fsdp=2", (2, 2, 1)),
        ("tensor=2", (2, 1, 2)),
        ("data=1", (1, 1, 1)),
        ("data=2", (2, 1, 1)),
        ("data=1,fsdp=2,tensor=2", (1, 2, 2)),
    ],
)
def test_sizes_on_four_devices(mesh, sizes):
    assert meshes.choose_sizes(asked(mesh), 4) == sizes


@pytest.mark.parametrize(("batch_size", "used"), [(8, 8), (12, 6), (10, 5), (7, 7), (11, 1)])
def test_as_many_devices_are_used_as_share_the_batch_where_nothing_is_asked(batch_size, used):
    assert meshes.choose_sizes(asked(batch_size=batch_size), 8) == (used, 1, 1)


def test_a_batch_that_cannot_be_shared_is_an_error_where_all_devices_must_work():
    for config, use_all in ((asked("fsdp=-1", 12), False), (asked(batch_size=12), True)):
        with pytest.raises(InputError, match="multiple of data x fsdp = 8 devices, but is 12"):
            meshes.choose_sizes(config, 8, use_all)


def test_the_tensor_axis_takes_no_rows():
    assert meshes.choose_sizes(asked("fsdp=2,tensor=2", batch_size=4), 8) == (2, 2, 2)


def test_more_devices_than_there_are_is_an_error():
    for mesh in ("data=8", "fsdp=8", "data=4,fsdp=2", "tensor=3"):
        with pytest.raises(InputError, match=f"mesh {mesh} needs .* but has 4"):
            meshes.choose_sizes(asked(mesh, batch_size=24), 4)


def test_no_process_may_be_left_without_work():
    with pytest.raises(
        InputError, match=r"mesh data=2 takes 2 devices, but all 4 of several hosts"
    ):
        meshes.choose_sizes(asked("data=2"), 4, use_all=True)


def test_heads_that_cannot_be_shared_are_an_error():
    with pytest.raises(InputError, match="n_head must be a multiple of the mesh's tensor=4"):
        meshes.choose_sizes(asked("tensor=4"), 4)


# What the error suggests


SUGGESTIONS_ASKED_FOR = [
    (batch_size, n_micro, rows)
    for batch_size, n_micro, rows in itertools.product(
        (1, 3, 5, 6, 10, 12, 64), (1, 2, 5, 30, 40, 41), (2, 4, 6, 8, 16, 256)
    )
    if batch_size % rows
]


def test_a_batch_as_suggested_can_be_shared_and_the_same_update_has_as_many_sequences():
    for batch_size, n_micro, rows in SUGGESTIONS_ASKED_FOR:
        config = asked("", batch_size, n_micro)
        suggested, error = suggestion_of(config, rows)
        assert meshes.choose_sizes(suggested, rows, use_all=True) == (rows, 1, 1)
        is_same = suggested.tokens_per_iter == config.tokens_per_iter
        assert is_same == error.endswith("makes the same update") != error.endswith("comes near")
        assert is_same == (config.batch_size * n_micro % rows == 0)


def test_a_batch_as_suggested_is_off_by_less_than_a_row_a_device():
    for batch_size, n_micro, rows in SUGGESTIONS_ASKED_FOR:
        suggested, _ = suggestion_of(asked("", batch_size, n_micro), rows)
        n_micro_suggested = suggested.gradient_accumulation_steps
        off = suggested.batch_size * n_micro_suggested - batch_size * n_micro
        assert abs(off) < rows * n_micro_suggested


def test_a_batch_as_suggested_needs_no_more_memory_than_the_one_asked_for_on_one_device():
    for batch_size, n_micro, rows in SUGGESTIONS_ASKED_FOR:
        suggested, _ = suggestion_of(asked("", batch_size, n_micro), rows)
        assert suggested.batch_size // rows <= batch_size, (batch_size, n_micro, rows)


# Where rows lie


@pytest.fixture(params=[True, False], ids=["corpus on the device", "windows sent"])
def is_resident(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    return request.param


def put(sizes, offsets_NAB):
    mesh = meshes.make_mesh(sizes)
    places_NAB = meshes.put_places(TOKENS, offsets_NAB, LENGTH, meshes.by_rows(mesh, axis=2))
    return meshes.put_corpus(TOKENS, mesh), places_NAB


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)], ids=str)
def test_the_windows_are_the_same_wherever_the_corpus_lies(is_resident, sizes):
    offsets_NAB = data.batch_offsets(1, "train", 0, len(TOKENS), LENGTH - 1, (3, 2, 8))
    corpus, places_NAB = put(sizes, offsets_NAB)
    assert (corpus is not None) == is_resident
    windows_NABT = jax.jit(steps.read_windows, static_argnums=2)(corpus, places_NAB, LENGTH)
    expected = [TOKENS[offset : offset + LENGTH] for offset in offsets_NAB.ravel()]
    np.testing.assert_array_equal(np.reshape(windows_NABT, (-1, LENGTH)), expected)


@pytest.mark.usefixtures("is_resident")
@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 1)], ids=str)
def test_rows_lie_apart(sizes):
    _, places_NAB = put(sizes, np.arange(48).reshape(3, 2, 8))
    for device, shard in enumerate(places_NAB.addressable_shards):
        assert shard.device == jax.devices()[device]
        assert shard.data.shape[:3] == (3, 2, 2)
        rows_NAB = np.asarray(places_NAB)[:, :, 2 * device : 2 * device + 2]
        np.testing.assert_array_equal(shard.data, rows_NAB)


def test_each_device_reads_only_its_own_rows_from_the_file(monkeypatch):
    read = []

    def read_windows(tokens, offsets, length):
        read.append(offsets.ravel().tolist())
        return windows(tokens, offsets, length)

    windows = data.read_windows
    monkeypatch.setattr(data, "read_windows", read_windows)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    put((4, 1, 1), np.arange(16).reshape(1, 2, 8))
    assert sorted(read) == [[i, i + 1, i + 8, i + 9] for i in (0, 2, 4, 6)]
