"""Where each array of the state lies: rules by name and by shape, and the table for eyes."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from nanogpt_jax import mesh as meshes
from nanogpt_jax import sharding
from nanogpt_jax.config import MESH_AXES, PRESETS, with_vocab_size
from nanogpt_jax.sharding import partition_spec

ONE, TENSOR, FSDP, BOTH = (
    dict(zip(MESH_AXES, sizes, strict=True))
    for sizes in [(4, 1, 1), (1, 1, 4), (1, 4, 1), (2, 4, 4)]
)
GPTS = [name for name, preset in PRESETS.items() if preset().model.architecture == "gpt"]


def names_and_leaves(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def device_bytes(state, mesh):
    """The bytes of a state that one device holds."""
    leaves = jax.tree.leaves(state)
    places = jax.tree.leaves(sharding.tree_shardings(mesh, state))
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(leaves, places, strict=True)
    )


@pytest.mark.parametrize("prefix", ["params.", "opt_state.1.0.mu.", "opt_state.1.0.nu."])
@pytest.mark.parametrize(
    ("name", "shape", "over_tensor", "over_both"),
    [
        ("wte.embedding", (64, 12), ("tensor", None), ("tensor", None)),
        ("wpe.embedding", (8, 12), (None, None), ("fsdp", None)),
        ("h_0.attn.c_attn.kernel", (12, 36), (None, "tensor"), ("fsdp", "tensor")),
        ("h_0.attn.c_attn.kernel", (12, 3, 12), (None, None, "tensor"), ("fsdp", None, "tensor")),
        ("h_0.attn.c_attn.bias", (36,), ("tensor",), ("tensor",)),
        ("h_10.attn.c_proj.kernel", (12, 12), ("tensor", None), ("tensor", "fsdp")),
        ("h_0.attn.c_proj.bias", (12,), (None,), (None,)),
        ("h_0.mlp.c_fc.kernel", (12, 48), (None, "tensor"), ("fsdp", "tensor")),
        ("h_0.mlp.c_fc.bias", (48,), ("tensor",), ("tensor",)),
        ("h_0.mlp.c_proj.kernel", (48, 12), ("tensor", None), ("tensor", "fsdp")),
        ("h_0.mlp.c_proj.bias", (12,), (None,), (None,)),
        ("h_0.ln_1.scale", (12,), (None,), (None,)),
        ("ln_f.bias", (12,), (None,), (None,)),
        ("lm_head.kernel", (12, 64), (None, "tensor"), ("fsdp", "tensor")),
    ],
)
def test_the_tensor_axis_goes_by_name_and_fsdp_takes_one_that_is_left(
    prefix, name, shape, over_tensor, over_both
):
    assert partition_spec(prefix + name, shape, ONE) == PartitionSpec(*[None] * len(shape))
    assert partition_spec(prefix + name, shape, TENSOR) == PartitionSpec(*over_tensor)
    assert partition_spec(prefix + name, shape, BOTH) == PartitionSpec(*over_both)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 12), (None, "fsdp")),
        ((12, 8), ("fsdp", None)),
        ((8, 13), ("fsdp", None)),
        ((9, 13), (None, None)),
        ((4096,), (None,)),
        ((), ()),
    ],
)
def test_fsdp_takes_the_largest_axis_that_divides_and_leaves_vectors_whole(shape, spec):
    assert partition_spec("params.any", shape, FSDP) == PartitionSpec(*spec)


def test_of_an_embedding_only_rows_are_shared_out_and_of_an_odd_vocabulary_none():
    for sizes in (TENSOR, FSDP, BOTH):
        assert partition_spec("params.wte.embedding", (65, 128), sizes) == PartitionSpec(None, None)
    assert partition_spec("params.wte.embedding", (64, 128), FSDP) == PartitionSpec("fsdp", None)


def test_every_leaf_has_a_place_and_the_averages_lie_where_their_parameter_lies():
    state = sharding.abstract_state(with_vocab_size(PRESETS["small"]()))
    places = sharding.tree_shardings(abstract_mesh(1, 2, 2), state)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    of_params = dict(names_and_leaves(places.params))
    adam = places.opt_state[1][0]
    assert dict(names_and_leaves(adam.mu)) == of_params == dict(names_and_leaves(adam.nu))
    assert {spec for place in of_params.values() for spec in place.spec} == {None, "fsdp", "tensor"}


@pytest.mark.parametrize("preset", GPTS)
def test_every_matrix_of_every_gpt_is_shared_out_over_eight_devices(preset):
    """So each holds an eighth of the state, vectors aside, and the embedding of 65 characters."""
    config = with_vocab_size(PRESETS[preset]())
    state = sharding.abstract_state(config)
    mesh = abstract_mesh(1, 8, 1)
    places = dict(names_and_leaves(sharding.tree_shardings(mesh, state)))
    in_whole = {name: leaf for name, leaf in names_and_leaves(state) if not any(places[name].spec)}
    matrices = {name.split(".")[-2] for name, leaf in in_whole.items() if leaf.ndim >= 2}
    assert matrices == ({"wte"} if config.model.vocab_size == 65 else set())
    bytes_in_whole = sum(leaf.size * leaf.dtype.itemsize for leaf in in_whole.values())
    all_bytes = device_bytes(state, abstract_mesh(8, 1, 1))
    assert device_bytes(state, mesh) == (all_bytes - bytes_in_whole) / 8 + bytes_in_whole


def test_arrays_really_lie_as_the_rules_say():
    state = sharding.abstract_state(with_vocab_size(PRESETS["tiny"]()))
    mesh = meshes.make_mesh((1, 2, 2))
    places = sharding.tree_shardings(mesh, state)
    zeros = jax.jit(lambda: jax.tree.map(jax.numpy.zeros_like, state), out_shardings=places)()
    on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(zeros.params))
    assert on_first == device_bytes(state.params, mesh)
    kernel = zeros.params["h_1"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 64)


def table(capsys, *argv):
    """The rows that the command prints, by name, and its last line."""
    sharding.main([*argv])
    *lines, last = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines[1:]]
    return {row[0].strip(): [cell.strip() for cell in row if cell.strip()] for row in rows}, last


def test_the_table_for_gpt2_xl_on_eight_devices(capsys):
    rows, last = table(capsys, "--config=gpt2-xl", "--mesh=fsdp=8", "--batch_size=16")
    kernel = ["(1600, 4800)", "(-, fsdp)", f"{1600 * 4800 * 4 // 8:,}", "x 48"]
    assert rows["params.h_*.attn.c_attn.kernel"][1:] == kernel
    assert rows["opt_state.1.0.mu.h_*.attn.c_attn.kernel"][1:] == kernel
    assert rows["params.ln_f.scale"][1:] == ["(1600,)", "(-)", "6,400"]
    matrices = (50304 + 1024) * 1600 + 48 * 12 * 1600**2
    vectors = 97 * 1600
    scalars_bytes = 6 * 4  # step, skipped, two counts of optax, two of the loss scale
    assert f"state's {12 * (matrices + vectors) + scalars_bytes:,} bytes" in last
    assert f"each device holds {12 * (matrices // 8 + vectors) + scalars_bytes:,};" in last


def test_the_table_without_a_mesh_is_that_of_the_devices_that_are_there(capsys):
    rows, last = table(capsys, "--config=tiny")
    assert rows["params.wte.embedding"][1:] == ["(65, 32)", "(-, -)", "8,320"]
    assert last.startswith("mesh data=4, fsdp=1, tensor=1:")
    whole, on_one = last.split("state's ")[1].split(" bytes each device holds ")
    assert on_one.startswith(whole)
