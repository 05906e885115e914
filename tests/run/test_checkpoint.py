"""Checkpoints: what is restored is what was saved, and damage is noticed."""

import gc
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanogpt_jax import sharding, steps
from nanogpt_jax.config import ModelConfig, OptimConfig
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.run import checkpoint
from nanogpt_jax.run.checkpoint import CheckpointReader
from nanogpt_jax.run.folder import saved_steps
from nanogpt_jax.run.saving import Checkpoints


@pytest.fixture(scope="module")
def abstract():
    config = ModelConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=12)
    model, tx = GPT(config), make_optimizer(OptimConfig(), 60)
    params = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    return on_one_device(jax.eval_shape(partial(steps.init_state, tx), params))


def on_one_device(abstract):
    return sharding.place(abstract, sharding.make_mesh())


@pytest.fixture(scope="module")
def state_at(abstract):
    """Make a state of a step; each step's arrays differ, and no two arrays are alike."""

    def make(step):
        rng = np.random.default_rng(step)
        filled = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), abstract
        )
        return filled._replace(step=jnp.int32(step))

    return make


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state_at):
    """A folder with two checkpoints, of which the older one is the best. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, state_at(10), state_at(20), val_losses=[1.0, 2.0])
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder for checkpoints that does not exist yet."""
    return tmp_path / "checkpoints"


@pytest.fixture
def two(saved, folder):
    """A copy of `saved`."""
    return Path(shutil.copytree(saved, folder))


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
    state = checkpoints.restore(abstract, prefer=step)
    checkpoints.close()
    return state


# Orbax leaves coroutines behind that were waiting when another one failed.
abandons_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_every_array_is_restored_bit_for_bit(folder, abstract, state_at):
    saved = state_at(7)
    save(folder, saved, val_losses=[1.5])
    restored = restore(folder, abstract, 7)
    assert_equal(restored, saved)
    assert [x.dtype for x in jax.tree.leaves(restored)] == [x.dtype for x in jax.tree.leaves(saved)]


def test_parameters_are_restored_alone(saved, abstract, state_at):
    checkpoints = CheckpointReader(saved)
    params, step = checkpoints.restore_params(abstract.params, prefer=10)
    assert step == 10
    assert_equal(params, state_at(10).params)
    checkpoints.close()


def test_the_newest_and_the_best_are_kept_and_nothing_else(folder, abstract, state_at):
    checkpoints = Checkpoints(folder)
    for step, val_loss in (10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5):
        checkpoints.save(state_at(step), val_loss)
    checkpoints.wait()
    assert (checkpoints.best_step(), saved_steps(checkpoints.folder)) == (20, [40, 20])
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"20", "40"}
    assert_equal(restore(folder, abstract, 20), state_at(20))
    assert_equal(restore(folder, abstract, 40), state_at(40))


@pytest.mark.slow
def test_fifty_saves_of_a_worsening_loss_leave_the_first_and_the_last(folder, abstract, state_at):
    """A long run that overfits: two checkpoints take the same room after any number of saves."""
    sizes = []
    for steps_of_a_start in range(10, 260, 10), range(260, 510, 10):
        save(folder, *map(state_at, steps_of_a_start), val_losses=[1 + s for s in steps_of_a_start])
        assert {path.name for path in folder.iterdir()} == {"10", str(steps_of_a_start[-1])}
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)  # a third one adds half
    assert_equal(restore(folder, abstract, 10), state_at(10))
    assert_equal(restore(folder, abstract, 500), state_at(500))


def test_a_new_process_still_knows_the_best(two, state_at):
    save(two, state_at(30), state_at(40), val_losses=[3.0, 1.5])
    checkpoints = Checkpoints(two)
    assert (checkpoints.best_step(), saved_steps(checkpoints.folder)) == (10, [40, 10])
    checkpoints.close()
    assert {path.name for path in two.iterdir()} == {"10", "40"}


def test_a_save_without_val_loss_is_newest_but_never_best(folder, state_at):
    checkpoints = Checkpoints(folder)
    checkpoints.save(state_at(5))
    assert checkpoints.best_step() is None
    checkpoints.save(state_at(10), 1.0)
    checkpoints.save(state_at(20))
    checkpoints.wait()
    assert (checkpoints.best_step(), saved_steps(checkpoints.folder)) == (10, [20, 10])
    checkpoints.save(state_at(30), 2.0)
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"10", "30"}


def test_an_empty_folder_has_no_checkpoint(folder):
    checkpoints = Checkpoints(folder)
    assert (checkpoints.best_step(), saved_steps(checkpoints.folder)) == (None, [])
    checkpoints.close()


@abandons_coroutines
def test_parameters_of_another_shape_or_name_are_an_input_error(saved, abstract):
    wte = on_one_device(jax.ShapeDtypeStruct((11, 13), np.float32))
    renamed = dict(abstract.params)
    renamed["h_1"] = renamed.pop("h_0")
    for params in abstract.params | {"wte": {"embedding": wte}}, renamed:
        checkpoints = CheckpointReader(saved)
        with pytest.raises(InputError, match=re.escape(str(saved / "20"))):
            checkpoints.restore(abstract._replace(params=params))
        checkpoints.close()
    gc.collect()


def test_what_a_kill_left_behind_is_cleaned_up(two, abstract, state_at):
    leftover = two / "30.orbax-checkpoint-tmp"
    (leftover / "params").mkdir(parents=True)
    (leftover / "params" / "half").write_bytes(b"half")
    checkpoints = Checkpoints(two)
    assert saved_steps(checkpoints.folder) == [20, 10]
    assert not leftover.exists()
    checkpoints.save(state_at(30))
    checkpoints.close()
    assert_equal(restore(two, abstract, 30), state_at(30))


def test_a_relative_folder_works(folder, abstract, state_at, monkeypatch):
    monkeypatch.chdir(folder.parent)
    save(os.path.relpath(folder), state_at(7))
    assert_equal(restore(os.path.relpath(folder), abstract, 7), state_at(7))


def test_no_step_is_saved_twice_and_no_nan_as_the_best(two, state_at):
    checkpoints = Checkpoints(two)
    with pytest.raises(AssertionError, match="not newer"):
        checkpoints.save(state_at(20))
    with pytest.raises(AssertionError, match="NaN"):
        checkpoints.save(state_at(30), float("nan"))
    checkpoints.close()


def test_training_may_continue_at_once(folder, abstract, state_at):
    """The arrays are donated while they are written in the background: a copy must be written."""
    add_one = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints = Checkpoints(folder)
    state, expected = state_at(0), {}
    for step in range(1, 21):
        state = add_one(state)
        if step % 10 == 0:
            expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(state)
    for _ in range(20):
        state = add_one(state)
    checkpoints.close()
    assert_equal(restore(folder, abstract, 20), expected)


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


def test_reading_only_changes_nothing(two, abstract, state_at):
    """A training may be saving there meanwhile."""
    saving = two / "30.orbax-checkpoint-tmp"
    saving.mkdir()
    checkpoints = CheckpointReader(two)
    assert_equal(checkpoints.restore_params(abstract.params)[0], state_at(20).params)
    checkpoints.close()
    assert saving.exists()


def test_a_training_may_delete_a_checkpoint_at_any_moment_of_reading(two):
    """Another process moves one away and back, over and over; the newest stays."""
    script = "import os, sys\nwhile True:\n  os.rename(*sys.argv[1:]); os.rename(*sys.argv[:0:-1])"
    training = [sys.executable, "-c", script, two / "10", two.parent / "elsewhere"]
    with subprocess.Popen(training) as process:
        try:
            for _ in range(30):
                checkpoints = CheckpointReader(two)
                assert saved_steps(checkpoints.folder)[0] == 20
                checkpoints.close()
            assert process.poll() is None
        finally:
            process.kill()


# Damage is named, and an older checkpoint used


def cut_to(size):
    return lambda path: os.truncate(path, size(path.stat().st_size))


def flip(path):
    """Flip eight bits all over a file; now and then one alone hits what Orbax never reads."""
    content = bytearray(path.read_bytes())
    for index in range(len(content) // 16, len(content), -(-len(content) // 8)):
        content[index] ^= 0x10
    path.write_bytes(content)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "missing": os.unlink,
    "empty": cut_to(lambda size: 0),
    "cut in half": cut_to(lambda size: size // 2),
    "bits flipped": flip,
    "a folder": replace_by_folder,
}


def damaged_each_way(folder, copy, step, every):
    """Yield copies of a folder, in each of which one file of a step is damaged in one way."""
    paths = sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())
    ways = list(itertools.product(paths, DAMAGES))
    for path, name in ways[::every]:
        if path.stat().st_size:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(folder, copy)
            DAMAGES[name](copy / path.relative_to(folder))
            yield path.relative_to(folder), name


@abandons_coroutines
@pytest.mark.parametrize("every", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_any_damage_to_any_file_gives_what_was_saved_or_the_checkpoint_before(
    saved, tmp_path, abstract, state_at, every, capsys
):
    """Some of Orbax's files are not needed to read an array, so their damage is none."""
    fallen_back = []
    for path, name in damaged_each_way(saved, tmp_path / "copy", 20, every):
        checkpoints = Checkpoints(tmp_path / "copy")
        state = checkpoints.restore(abstract)
        fallen_back.append(int(state.step) == 10)
        assert_equal(state, state_at(int(state.step)))
        told = capsys.readouterr().err
        assert len(told.splitlines()) == 2 * fallen_back[-1], (path, name, told)
        if fallen_back[-1]:
            assert "using step 10 instead" in told
            assert saved_steps(checkpoints.folder) == [10]
            checkpoints.save(state_at(20), 2.0)
            checkpoints.wait()
        assert saved_steps(checkpoints.folder) == [20, 10]
        checkpoints.close()
        gc.collect()
    assert 0 < sum(fallen_back) < len(fallen_back)


@abandons_coroutines
def test_the_damaged_array_is_named(saved, tmp_path, abstract):
    for item, name in itertools.product(("params", "training"), DAMAGES):
        folder = tmp_path / item / name
        shutil.copytree(saved / "20", folder / "20")
        DAMAGES[name](largest_file(folder / "20" / item))
        checkpoints = Checkpoints(folder)
        with pytest.raises(InputError, match=r"(attn|mlp|wte|wpe|ln_\w)\.\w+") as error:
            checkpoints.restore(abstract)
        checkpoints.close()
        assert str(folder / "20") in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    gc.collect()


@abandons_coroutines
def test_a_damaged_checkpoint_is_set_aside_and_its_step_saved_again(
    two, abstract, state_at, capsys
):
    flip(largest_file(two / "20" / "params"))
    checkpoints = Checkpoints(two)
    assert_equal(checkpoints.restore(abstract), state_at(10))
    assert f"renamed to {two / '20.damaged'}" in capsys.readouterr().err
    assert checkpoints.best_step() == 10
    checkpoints.save(state_at(20), 0.5)  # so the other one is neither newest nor best
    checkpoints.close()
    assert {path.name for path in two.iterdir()} == {"20", "20.damaged"}
    assert_equal(restore(two, abstract, 20), state_at(20))


@abandons_coroutines
def test_reading_only_uses_the_older_one_too_and_leaves_the_damaged_one_alone(
    two, abstract, state_at
):
    flip(largest_file(two / "20" / "params"))
    checkpoints = CheckpointReader(two)
    params, step = checkpoints.restore_params(abstract.params)
    checkpoints.close()
    assert step == 10
    assert_equal(params, state_at(10).params)
    assert {path.name for path in two.iterdir()} == {"10", "20"}


@abandons_coroutines
def test_if_all_are_damaged_each_is_named_in_one_line(two, abstract):
    for step in "10", "20":
        flip(largest_file(two / step / "params"))
    with pytest.raises(InputError, match=r"checkpoints/20: .*; .*checkpoints/10: .*--overwrite"):
        restore(two, abstract, 20)
    assert {path.name for path in two.iterdir()} == {"10", "20"}


FORGED = [{}, {"val_loss": "low"}, {"checksums": None}, {"step": "10"}]


def test_the_best_is_not_deleted_if_its_metadata_is_damaged_or_forged(
    saved, tmp_path, abstract, state_at, capsys
):
    """It is not the best any more, nor the newest; its arrays may be intact."""
    for i, forged in enumerate([None, {"step": 10}, *FORGED]):
        folder = Path(shutil.copytree(saved, tmp_path / str(i) / "checkpoints"))
        path = folder / "10" / "facts" / "metadata"
        metadata = json.loads(path.read_text())
        del metadata["crc32"]
        if forged is None:
            path.write_text(path.read_text().replace("1.0", "0.4"))
        else:
            metadata = metadata | forged if forged else forged
            path.write_text(json.dumps(metadata | {"crc32": checkpoint.metadata_crc32(metadata)}))
        is_damage = forged != {"step": 10}
        checkpoints = Checkpoints(folder)
        assert checkpoints.best_step() == (20 if is_damage else 10)
        assert_equal(checkpoints.restore(abstract), state_at(20))
        if i < 2:  # once each way
            checkpoints.save(state_at(30), 3.0)
        checkpoints.close()
        newer = {"20", "30"} if i < 2 else {"20"}
        kept = {"10.damaged", *newer} if is_damage else {"10", "30"}
        assert {path.name for path in folder.iterdir()} == kept
        shown = capsys.readouterr().err
        assert ("10: it is damaged: its metadata is not what was saved" in shown) == is_damage


def test_what_cannot_be_read_right_now_is_not_taken_for_damaged(two, abstract, monkeypatch):
    checkpoints = Checkpoints(two)
    for reason in "PERMISSION_DENIED: Error opening", "[Errno 5] Input/output error", "UNAVAILABLE":

        def fail(*args, reason=reason, **kwargs):
            raise ValueError(reason)

        monkeypatch.setattr(checkpoints._reader, "restore", fail)
        with pytest.raises(RunError, match=r"checkpoints/20 cannot be read right now .*try again"):
            checkpoints.restore(abstract)
    checkpoints.close()
    assert {path.name for path in two.iterdir()} == {"10", "20"}


def test_a_checkpoint_under_another_step_is_noticed(two, abstract, state_at):
    (two / "20").rename(two / "30")
    assert_equal(restore(two, abstract, None), state_at(10))


def test_what_is_not_a_checkpoint_is_ignored(two, abstract, state_at):
    """Files, empty folders and other names; a run continues past the number of an empty folder."""
    for name in "50", "0", "007", "٣", "x":
        (two / name).mkdir()
    (two / "60").write_text("a file")
    (two / "007" / "x").mkdir()
    checkpoints = Checkpoints(two)
    assert_equal(checkpoints.restore(abstract), state_at(20))
    checkpoints.save(state_at(30))
    checkpoints.close()
    assert_equal(restore(two, abstract, None), state_at(30))


def test_a_step_that_a_training_deletes_meanwhile_is_not_damaged(
    two, abstract, state_at, monkeypatch, capsys
):
    """The page and sample.py read while a training saves the next one and deletes this."""
    checkpoints = CheckpointReader(two)
    read = CheckpointReader._read

    def spy(self, step, **items):
        if step == 20 and (two / "20").exists():
            (two / "20").rename(two.parent / "elsewhere")
            save(two, state_at(40))
        return read(self, step, **items)

    monkeypatch.setattr(CheckpointReader, "_read", spy)
    assert_equal(checkpoints.restore(abstract), state_at(40))
    assert capsys.readouterr().err == ""
    checkpoints.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are POSIX's")
def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(folder, abstract, state_at):
    """A limit on the size of files is as good as a full disk, to a write."""
    import resource

    wide = abstract._replace(params=abstract.params | {"wide": jnp.zeros((256, 1024))})
    state = state_at(20)._replace(params=jax.tree.map(jnp.ones_like, wide.params))
    save(folder, state_at(10), val_losses=[1.0])
    checkpoints = Checkpoints(folder)
    noise = np.random.default_rng(0).normal(size=(256, 1024)).astype("f")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(state._replace(params=state.params | {"wide": noise}), 2.0)
        with pytest.raises(RunError, match=r"could not be saved in .*checkpoints \(.*too large"):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in folder.iterdir()] == ["10"]
    assert_equal(restore(folder, abstract, 10), state_at(10))
