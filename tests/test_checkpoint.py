"""Checkpoints: what is restored is what was saved, and damage is told."""

import contextlib
import gc
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanogpt_jax import sharding, steps
from nanogpt_jax.checkpoint import Checkpoints
from nanogpt_jax.errors import InputError
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer


@pytest.fixture
def abstract(tiny_config):
    init = partial(steps.init_state, GPT(tiny_config.model), make_optimizer(tiny_config.optim, 60))
    return sharding.on_one_device(jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture
def state_at(abstract):
    """Make a state of a step; each step's arrays differ, and no two arrays are alike."""

    def make(step):
        rng = np.random.default_rng(step)
        filled = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), abstract
        )
        return filled._replace(step=jnp.int32(step))

    return make


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def assert_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def save(folder, *states, val_losses=None):
    checkpoints = Checkpoints(folder)
    for state, val_loss in zip(states, val_losses or len(states) * [None], strict=True):
        checkpoints.save(state, val_loss)
    checkpoints.close()


def restore(folder, abstract, step):
    checkpoints = Checkpoints(folder)
    state = checkpoints.restore(abstract, step)
    checkpoints.close()
    return state


# Orbax leaves coroutines behind that were waiting when another one failed.
abandons_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def refused(path):
    """Expect an InputError that names the path."""
    with pytest.raises(InputError, match=re.escape(str(path))):
        yield
    gc.collect()


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_restores_every_array_bit_for_bit(folder, abstract, state_at):
    saved = state_at(7)
    save(folder, saved, val_losses=[1.5])
    restored = restore(folder, abstract, 7)
    assert_equal(restored, saved)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(saved)]


def test_restores_parameters_alone(folder, abstract, state_at):
    save(folder, state_at(7))
    checkpoints = Checkpoints(folder)
    assert_equal(checkpoints.restore_params(abstract.params, 7), state_at(7).params)
    checkpoints.close()


def test_keeps_the_newest_and_the_best_and_nothing_else(folder, abstract, state_at):
    checkpoints = Checkpoints(folder)
    for step, val_loss in (10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5):
        checkpoints.save(state_at(step), val_loss)
    checkpoints.wait()
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (20, 40)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"20", "40"}
    assert_equal(restore(folder, abstract, 20), state_at(20))
    assert_equal(restore(folder, abstract, 40), state_at(40))


@pytest.mark.parametrize("checkpoint", ["best", "latest"])
@abandons_coroutines
def test_a_checkpoint_that_a_training_replaces_while_it_is_read_is_read_in_its_place(
    folder, abstract, state_at, checkpoint
):
    save(folder, state_at(10), val_losses=[2.0])
    reader = Checkpoints(folder, read_only=True)
    save(folder, state_at(20), val_losses=[1.0])
    params, step = reader.read_params(abstract.params, checkpoint)
    reader.close()
    gc.collect()
    assert step == 20
    assert_equal(params, state_at(20).params)


@abandons_coroutines
def test_a_checkpoint_that_is_damaged_and_not_replaced_is_refused(folder, abstract, state_at):
    save(folder, state_at(10), val_losses=[2.0])
    for path in (folder / "10" / "params").rglob("d/*"):
        path.write_bytes(b"")
    reader = Checkpoints(folder, read_only=True)
    with refused(folder / "10"):
        reader.read_params(abstract.params, "best")
    reader.close()


@pytest.mark.slow
def test_fifty_saves_of_a_worsening_loss_leave_the_first_and_the_last(folder, abstract, state_at):
    """A long run that overfits: two checkpoints take the same room after any number of saves."""
    sizes = []
    for steps_of_a_start in range(10, 260, 10), range(260, 510, 10):
        save(folder, *map(state_at, steps_of_a_start), val_losses=[1 + s for s in steps_of_a_start])
        assert {path.name for path in folder.iterdir()} == {"10", str(steps_of_a_start[-1])}
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert_equal(restore(folder, abstract, 10), state_at(10))
    assert_equal(restore(folder, abstract, 500), state_at(500))


def test_a_new_process_still_knows_the_best(folder, state_at):
    save(folder, state_at(10), state_at(20), val_losses=[1.0, 2.0])
    save(folder, state_at(30), state_at(40), val_losses=[3.0, 1.5])
    checkpoints = Checkpoints(folder)
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (10, 40)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"10", "40"}


def test_a_save_without_val_loss_is_newest_but_never_best(folder, state_at):
    save(folder, state_at(10), state_at(20), val_losses=[1.0, None])
    checkpoints = Checkpoints(folder)
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (10, 20)
    checkpoints.save(state_at(30), 2.0)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"10", "30"}


def test_without_any_val_loss_there_is_no_best(folder, state_at):
    save(folder, state_at(10))
    checkpoints = Checkpoints(folder)
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (None, 10)
    checkpoints.close()


def test_an_empty_folder_has_no_checkpoint(folder):
    checkpoints = Checkpoints(folder)
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (None, None)
    checkpoints.close()


@abandons_coroutines
@pytest.mark.parametrize("item", ["params", "training"])
def test_a_flipped_byte_is_an_input_error(folder, abstract, state_at, item):
    save(folder, state_at(7))
    damaged = largest_file(folder / "7" / item)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x40
    damaged.write_bytes(content)
    with refused(folder / "7"):
        restore(folder, abstract, 7)


@abandons_coroutines
def test_a_missing_data_file_is_an_input_error(folder, abstract, state_at):
    save(folder, state_at(7))
    largest_file(folder / "7" / "params").unlink()
    with refused(folder / "7"):
        restore(folder, abstract, 7)


@abandons_coroutines
def test_parameters_of_another_shape_are_an_input_error(folder, abstract, state_at):
    save(folder, state_at(7))
    wte = sharding.on_one_device(jax.ShapeDtypeStruct((11, 13), np.float32))
    other = abstract._replace(params=abstract.params | {"wte": {"embedding": wte}})
    with refused(folder / "7"):
        restore(folder, other, 7)


@abandons_coroutines
def test_parameters_of_another_name_are_an_input_error(folder, abstract, state_at):
    save(folder, state_at(7))
    params = dict(abstract.params)
    params["h_2"] = params.pop("h_1")
    with refused(folder / "7"):
        restore(folder, abstract._replace(params=params), 7)


def test_what_a_kill_left_behind_is_cleaned_up(folder, abstract, state_at):
    save(folder, state_at(7))
    leftover = folder / "9.orbax-checkpoint-tmp"
    (leftover / "params").mkdir(parents=True)
    (leftover / "params" / "half").write_bytes(b"half")
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest_step() == 7
    assert not leftover.exists()
    checkpoints.save(state_at(9))
    checkpoints.close()
    assert_equal(restore(folder, abstract, 9), state_at(9))


def test_a_relative_folder_works(folder, abstract, state_at, monkeypatch):
    monkeypatch.chdir(folder.parent)
    save(os.path.relpath(folder), state_at(7))
    assert_equal(restore(os.path.relpath(folder), abstract, 7), state_at(7))


def test_a_step_is_not_saved_twice(folder, state_at):
    checkpoints = Checkpoints(folder)
    checkpoints.save(state_at(7))
    with pytest.raises(AssertionError, match="not newer"):
        checkpoints.save(state_at(7))
    checkpoints.close()


def test_a_nan_is_not_taken_for_the_best(folder, state_at):
    checkpoints = Checkpoints(folder)
    with pytest.raises(AssertionError, match="NaN"):
        checkpoints.save(state_at(7), float("nan"))
    checkpoints.close()


def test_training_may_go_on_at_once(folder, abstract, state_at):
    """The arrays are donated while they are written in the background: a copy must be written."""
    add_one = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(folder)
    state, expected = state_at(0), {}
    for step in range(1, 31):
        state = add_one(state)
        if step % 10 == 0:
            expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(state)
    for _ in range(20):
        state = add_one(state)
    checkpoints.close()
    assert_equal(restore(folder, abstract, 30), expected)


def test_what_four_devices_saved_one_device_restores(folder, abstract, state_at):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    width_apart = NamedSharding(mesh, PartitionSpec(None, "data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = jax.tree.map(
        lambda x: jax.device_put(x, width_apart if x.ndim == 2 else everywhere), state_at(7)
    )
    save(folder, spread)
    restored = restore(folder, abstract, 7)
    assert_equal(restored, state_at(7))
    assert {len(x.devices()) for x in jax.tree.leaves(restored)} == {1}


def test_reading_only_changes_nothing(folder, abstract, state_at):
    """A training may be saving there meanwhile."""
    save(folder, state_at(7))
    saving = folder / "9.orbax-checkpoint-tmp"
    saving.mkdir()
    checkpoints = Checkpoints(folder, read_only=True)
    assert_equal(checkpoints.restore_params(abstract.params, 7), state_at(7).params)
    checkpoints.close()
    assert saving.exists()
