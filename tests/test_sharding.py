"""The mesh of devices, where each array is stored, and that neither changes what is computed."""

import dataclasses
import itertools
import math
import re
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from nanogpt_jax import data, sharding, steps
from nanogpt_jax.config import (
    MESH_AXES,
    PRESETS,
    ComputeConfig,
    ModelConfig,
    TrainConfig,
    mesh_sizes,
    presets,
    with_vocab_size,
)
from nanogpt_jax.config.presets import MODERN
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware.devices import choose_compute
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.sharding import choose_sizes, make_mesh, partition_spec

ONE, TENSOR, FSDP, BOTH = (
    dict(zip(MESH_AXES, sizes, strict=True))
    for sizes in [(4, 1, 1), (1, 1, 4), (1, 4, 1), (2, 4, 4)]
)
GPTS = [name for name, preset in PRESETS.items() if preset.model.architecture == "gpt"]


def names_and_leaves(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def abstract_state(config):
    model = steps.make_model(config.model)
    tx = make_optimizer(config.optim, config.max_iters)

    def init_state(key):
        return steps.init_state(tx, steps.init_params(model, key))

    return jax.eval_shape(init_state, jax.random.key(0))


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


# Where the state is stored


def shardings_of(tree, mesh):
    return jax.tree.map(lambda leaf: leaf.sharding, sharding.place(tree, mesh))


def device_bytes(state, mesh):
    """The bytes of a state that one device stores."""
    leaves = jax.tree.leaves(state)
    shardings = jax.tree.leaves(shardings_of(state, mesh))
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, shardings, strict=True)
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
def test_the_tensor_axis_goes_by_name_and_fsdp_takes_another(
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
def test_fsdp_splits_the_largest_axis_that_it_divides_but_no_vectors(shape, spec):
    assert partition_spec("params.any", shape, FSDP) == PartitionSpec(*spec)


def test_only_rows_of_an_embedding_are_split_and_none_of_an_odd_vocabulary():
    for sizes in (TENSOR, FSDP, BOTH):
        assert partition_spec("params.wte.embedding", (65, 128), sizes) == PartitionSpec(None, None)
    assert partition_spec("params.wte.embedding", (64, 128), FSDP) == PartitionSpec("fsdp", None)


def test_averages_are_stored_like_their_parameters():
    state = abstract_state(with_vocab_size(PRESETS["small"]))
    shardings = shardings_of(state, abstract_mesh(1, 2, 2))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    of_params = dict(names_and_leaves(shardings.params))
    adam = shardings.opt_state[1][0]
    assert dict(names_and_leaves(adam.mu)) == of_params == dict(names_and_leaves(adam.nu))
    assert {axis for leaf in of_params.values() for axis in leaf.spec} == {None, "fsdp", "tensor"}


@pytest.mark.parametrize("preset", GPTS)
def test_every_matrix_of_every_gpt_is_split_over_eight_devices(preset):
    """So each stores an eighth of the state, but for vectors and the embedding of 65 characters."""
    config = with_vocab_size(PRESETS[preset])
    one_layer = dataclasses.replace(config.model, n_layer=1)  # the others are split alike
    state = abstract_state(dataclasses.replace(config, model=one_layer))
    mesh = abstract_mesh(1, 8, 1)
    shardings = dict(names_and_leaves(shardings_of(state, mesh)))
    whole = {name: leaf for name, leaf in names_and_leaves(state) if not any(shardings[name].spec)}
    matrices = {name.split(".")[-2] for name, leaf in whole.items() if leaf.ndim >= 2}
    assert matrices == ({"wte"} if config.model.vocab_size == 65 else set())
    whole_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in whole.values())
    all_bytes = device_bytes(state, abstract_mesh(8, 1, 1))
    assert device_bytes(state, mesh) == (all_bytes - whole_bytes) / 8 + whole_bytes


def test_arrays_are_really_stored_as_the_rules_say():
    state = abstract_state(with_vocab_size(PRESETS["tiny"]))
    mesh = make_mesh((1, 2, 2))
    shardings = shardings_of(state, mesh)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    stored = jax.device_put(zeros, shardings)
    on_first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(stored.params))
    assert on_first == device_bytes(state.params, mesh)
    kernel = stored.params["h_1"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 64)


def test_a_note_says_if_fsdp_cannot_split_many_parameters():
    config = with_vocab_size(PRESETS["tiny"])  # 65 rows of embedding, which 4 does not divide
    params = abstract_state(config).params
    note = sharding.unsplit_note(abstract_mesh(1, 4, 1), params)
    share = (65 * 32 + 5 * 32) / sum(x.size for x in jax.tree.leaves(params))
    assert note.startswith(f"{share:.0%} of the parameters have no axis that fsdp=4 divides")
    assert sharding.unsplit_note(abstract_mesh(4, 1, 1), params) == ""
    even = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=64))
    assert sharding.unsplit_note(abstract_mesh(1, 4, 1), abstract_state(even).params) == ""


def requested(mesh="", batch_size=8, gradient_accumulation_steps=1):
    """A configuration with 2 heads."""
    return dataclasses.replace(
        presets.TINY,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        compute=ComputeConfig(mesh=mesh),
    )


def suggestion_of(config, rows):
    """The configuration that the error suggests, and the error."""
    with pytest.raises(InputError, match=f"multiple of data x fsdp = {rows} devices") as error:
        choose_sizes(config, rows, use_all=True)
    flags = re.search(r"--batch_size (\d+) --gradient_accumulation_steps (\d+)", str(error.value))
    batch_size, n_micro = map(int, flags.groups())
    fields = {"batch_size": batch_size, "gradient_accumulation_steps": n_micro}
    return dataclasses.replace(config, **fields), str(error.value)


# The flag --mesh


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
def test_axes_come_in_any_order_and_data_takes_the_remaining_devices(text, sizes):
    assert mesh_sizes(text) == sizes


@pytest.mark.parametrize(
    "text",
    ["model=2", "data", "data=", "data=0", "data=-2", "data=1.5", "data=two", "data=2,data=2", "4"],
)
def test_an_invalid_mesh_is_refused_with_an_example(text):
    with pytest.raises(InputError, match=r"data=-1,fsdp=1,tensor=1"):
        ComputeConfig(mesh=text)


def test_only_one_axis_can_take_the_remaining_devices():
    with pytest.raises(InputError, match="one of them -1"):
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
    assert choose_sizes(requested(mesh), 4) == sizes


@pytest.mark.parametrize(("batch_size", "used"), [(8, 8), (12, 6), (10, 5), (7, 7), (11, 1)])
def test_by_default_as_many_devices_are_used_as_divide_the_batch(batch_size, used):
    assert choose_sizes(requested(batch_size=batch_size), 8) == (used, 1, 1)


def test_a_batch_that_cannot_be_split_is_an_error_if_all_devices_must_take_part():
    for config, use_all in ((requested("fsdp=-1", 12), False), (requested(batch_size=12), True)):
        with pytest.raises(InputError, match="multiple of data x fsdp = 8 devices, got 12"):
            choose_sizes(config, 8, use_all)


def test_the_tensor_axis_does_not_split_rows():
    assert choose_sizes(requested("fsdp=2,tensor=2", batch_size=4), 8) == (2, 2, 2)


def test_too_few_devices_is_an_error():
    for mesh in ("data=8", "fsdp=8", "data=4,fsdp=2", "tensor=3"):
        with pytest.raises(InputError, match=f"mesh {mesh} needs .* but there are 4"):
            choose_sizes(requested(mesh, batch_size=24), 4)


def test_no_process_may_be_idle():
    with pytest.raises(
        InputError, match="mesh must use all 4 devices of the hosts, but data=2 uses 2"
    ):
        choose_sizes(requested("data=2"), 4, use_all=True)


def test_heads_that_cannot_be_split_are_an_error():
    with pytest.raises(InputError, match="n_head must be a multiple of the mesh's tensor=4"):
        choose_sizes(requested("tensor=4"), 4)


# The batch that the error suggests


UNEVEN_BATCHES = [
    (batch_size, n_micro, rows)
    for batch_size, n_micro, rows in itertools.product(
        (1, 3, 5, 6, 10, 12, 64), (1, 2, 5, 30, 40, 41), (2, 4, 6, 8, 16, 256)
    )
    if batch_size % rows
]


def test_the_suggested_batch_can_be_split_and_says_truly_if_it_is_the_same_update():
    for batch_size, n_micro, rows in UNEVEN_BATCHES:
        config = requested("", batch_size, n_micro)
        suggested, error = suggestion_of(config, rows)
        assert choose_sizes(suggested, rows, use_all=True) == (rows, 1, 1)
        is_same = suggested.tokens_per_iter == config.tokens_per_iter
        assert (
            is_same
            == error.endswith("makes the same update")
            != error.endswith("makes an update of similar size")
        )
        assert is_same == (config.batch_size * n_micro % rows == 0)


def test_the_suggested_batch_is_off_by_less_than_a_row_per_device():
    for batch_size, n_micro, rows in UNEVEN_BATCHES:
        suggested, _ = suggestion_of(requested("", batch_size, n_micro), rows)
        n_micro_suggested = suggested.gradient_accumulation_steps
        off = suggested.batch_size * n_micro_suggested - batch_size * n_micro
        assert abs(off) < rows * n_micro_suggested


def test_the_suggested_batch_needs_no_more_memory_than_the_requested_one_on_one_device():
    for batch_size, n_micro, rows in UNEVEN_BATCHES:
        suggested, _ = suggestion_of(requested("", batch_size, n_micro), rows)
        assert suggested.batch_size // rows <= batch_size, (batch_size, n_micro, rows)


# Any mesh computes the same

N_STEPS = 8
SMALL = dataclasses.replace(
    presets.TINY,
    batch_size=8,
    gradient_accumulation_steps=2,
    max_iters=N_STEPS,
    model=ModelConfig(
        block_size=16,
        vocab_size=12,
        n_layer=1,
        n_head=2,
        n_embd=16,
        dropout=0.2,
        token_noise=0.1,
        token_shift=True,
        bias=True,
    ),
    optim=dataclasses.replace(presets.TINY.optim, learning_rate=3e-2, warmup_iters=2),
)
SMALL_MODERN = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(SMALL.model, bias=False, attention_window=4, **MODERN),
    optim=dataclasses.replace(
        presets.SMALL_FAST.optim, learning_rate=1e-2, warmup_iters=2, lr_decay_iters=None
    ),
)
TOKENS = np.random.default_rng(0).integers(0, 12, 500).cumsum().astype(np.uint16) % 12


def train(config: TrainConfig, sizes):
    """Train as train.py does: (state, losses, gradient norms, validation loss)."""
    mesh, length = make_mesh(sizes), config.model.block_size + 1
    compute, _ = choose_compute(config.compute, config.model, jax.devices()[0], mesh)
    model = steps.make_model(config.model, compute)
    tx = make_optimizer(config.optim, config.max_iters)
    abstract = abstract_state(config)
    shardings = shardings_of(abstract, mesh)

    @partial(jax.jit, out_shardings=(shardings, sharding.replicated(mesh)))
    def train_step(state, batch, key):
        return steps.train_steps(model, tx, state, batch, key)

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def eval_step(params, batch, counts_B):
        return steps.eval_batch(model, params, batch, counts_B)

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), abstract.params)
    state = jax.device_put(steps.init_state(tx, params), shardings)
    _, dropout_key = steps.stream_keys(config.seed)
    shape = config.gradient_accumulation_steps, config.batch_size
    batches = data.train_batches(TOKENS, config.seed, length - 1, shape, mesh)
    metrics = []
    for _ in range(config.max_iters):
        state, now = train_step(state, next(batches), dropout_key)
        metrics.append(now)
    losses, norms = (
        [getattr(now, name).item() for now in metrics] for name in ("loss", "grad_norm")
    )
    val_batches = data.EvalLoader(TOKENS, length - 1, config.batch_size, mesh)
    return state, losses, norms, steps.evaluate(eval_step, state.params, val_batches)


@pytest.fixture(scope="module")
def on_one_device():
    return train(SMALL, (1, 1, 1))


def assert_same_training(on_mesh, on_one):
    """The same losses, which decrease; so dropout's masks and the noise are the same too."""
    state, losses, norms, val_loss = on_mesh
    _, losses_on_one, norms_on_one, val_loss_on_one = on_one
    assert len(state.params["wte"]["embedding"].devices()) == 4
    assert state.step == N_STEPS
    np.testing.assert_allclose(losses, losses_on_one, atol=1e-5)
    np.testing.assert_allclose(norms, norms_on_one, rtol=1e-4)
    assert val_loss == pytest.approx(val_loss_on_one, abs=1e-5)
    assert losses[-1] < losses[0] - 0.005


def test_a_mesh_trains_like_one_device(on_one_device):
    assert_same_training(train(SMALL, (1, 2, 2)), on_one_device)


@pytest.mark.slow
def test_more_meshes_train_like_one_device(on_one_device):
    for sizes in ((4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2)):
        assert_same_training(train(SMALL, sizes), on_one_device)


@pytest.mark.slow
def test_a_mesh_trains_a_modern_gpt_with_muon_like_one_device():
    """Muon needs whole matrices, of which each device stores a part."""
    on_mesh = train(SMALL_MODERN, (1, 2, 2))
    kernel = on_mesh[0].params["h_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    assert_same_training(on_mesh, train(SMALL_MODERN, (1, 1, 1)))
