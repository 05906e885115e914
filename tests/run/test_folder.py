"""The folder of a run: where it is, whether it can be used, resumed and overwritten."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanogpt_jax.config import (
    OptimConfig,
    TrainConfig,
    check_value,
    field_types,
    parse_train_config,
    to_flat_dict,
)
from nanogpt_jax.corpora import Corpus
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import folder as run_folder

FINGERPRINT = "0123456789abcdef"
MADE_WITH = {"jax": "0.0", "dataset_fingerprint": FINGERPRINT}


@pytest.fixture
def begun(tmp_path, tiny_config) -> Path:
    """The folder of a run of tiny_config."""
    folder = tmp_path / "out" / "tiny"
    run_folder.begin(folder, tiny_config, MADE_WITH)
    (folder / "checkpoints" / "30" / "params").mkdir(parents=True)
    return folder


def test_a_run_without_a_checkpoint_may_start_with_other_fields(begun, tiny_config):
    """It ran out of memory, say, and the user makes the batch smaller, as the message advises."""
    (begun / "checkpoints" / "30").rename(begun / "checkpoints" / "30.orbax-checkpoint-tmp")
    smaller = replace(tiny_config, batch_size=1)
    assert not run_folder.can_resume(begun, smaller, FINGERPRINT)


def test_a_second_process_may_not_train_in_the_same_folder(tmp_path):
    second = run_folder.locked(tmp_path)
    refused = pytest.raises(InputError, match="is being trained by another process")
    with run_folder.locked(tmp_path), refused, second:
        pass
    with run_folder.locked(tmp_path):
        pass


HOLDS = """
import pathlib, sys, time
from nanogpt_jax.run import folder as run_folder
with run_folder.locked(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_process_that_was_killed_holds_its_folder_no_longer(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "mine\n"
        refused = pytest.raises(InputError, match="is being trained by another process")
        with refused, run_folder.locked(tmp_path / "run"):
            pass
        holder.kill()
    with run_folder.locked(tmp_path / "run"):
        pass


def test_a_folder_in_which_a_start_was_killed_is_as_good_as_empty(tmp_path, tiny_config):
    """A file may have been written, but not renamed yet."""
    (tmp_path / "config.json.123.partial").write_text('{"n_la')
    assert not run_folder.can_resume(tmp_path, tiny_config, FINGERPRINT)
    run_folder.begin(tmp_path, tiny_config, MADE_WITH)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def files_of_someone_else(folder: Path, config_json: str | None = None) -> Path:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    if config_json is not None:
        (folder / "config.json").write_text(config_json)
    return folder


# Contents of a config.json that another program wrote; the first is a Hugging Face model's.
FOREIGN = ['{"model_type": "gpt2", "n_layer": 12, "n_head": 12}', "[]", "3", "{", "", "{}"]


# Where a run is


def test_a_run_is_in_out_dir_or_under_the_names_of_its_config_and_dataset():
    for config, dataset, folder in [
        (TrainConfig(config="small"), "shakespeare_char", "out/small"),
        (TrainConfig(config="small"), "book-1234", "out/small-book-1234"),
        (TrainConfig(config="gpt2"), "openwebtext", "out/gpt2"),
        (TrainConfig(config="some/where/mine.json"), "shakespeare_char", "out/mine"),
        (TrainConfig(config="out/small/config.json"), "book-1234", "out/small"),
        (TrainConfig(config="small", out_dir="runs/a"), "book-1234", "runs/a"),
    ]:
        corpus = Corpus(dataset, {}, 65, None, FINGERPRINT)
        assert run_folder.choose(config, corpus) == Path(folder)


# Whether it can be written


def test_a_folder_that_exists_or_can_be_created_is_usable_and_is_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in tmp_path, tmp_path / "a" / "b" / "c", Path("out/small"):
        run_folder.check_usable(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_named(tmp_path, monkeypatch):
    """os.access is replaced because root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=f"out_dir must be writable, but {tmp_path} is not"):
        run_folder.check_usable(tmp_path / "a" / "b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write there")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="out_dir must be writable"):
        run_folder.check_usable(tmp_path / "a")
    tmp_path.chmod(0o700)


def test_a_path_that_no_folder_can_have_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for path, reason in [
        ("file", f"out_dir must be a folder, but {tmp_path}/file is a file"),
        ("file/a/b", f"out_dir must be a folder, but {tmp_path}/file is a file"),
        ("link", f"{tmp_path}/link is a broken link"),
        ("link/run", f"{tmp_path}/link is a broken link"),
        (256 * "x", "File name too long"),
        (128 * "ü", "File name too long"),
        ("/".join(25 * [160 * "x"]), "File name too long"),
        ("a\0b", "embedded null"),
    ]:
        with pytest.raises(InputError, match=reason) as error:
            run_folder.check_usable(tmp_path / path)
        assert str(error.value).startswith("out_dir must be ")
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_that_orbax_reads_as_a_pattern_is_refused(tmp_path, monkeypatch):
    """Wherever the pattern is in it: Orbax would save, and could not restore what it saved."""
    for name in "run [1]", "run*", "what?":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(InputError, match=r"without \* \? and \[, but is .*/out/a"):
            run_folder.check_usable(Path("out/a"))


def test_a_folder_that_cannot_be_created_after_all_is_refused():
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc")
    refused = pytest.raises(
        InputError, match=r"out_dir: /proc/run cannot be created \(No such file"
    )
    with refused, run_folder.locked(Path("/proc/run")):
        pass


# Whether there is room


def test_there_must_be_room_for_three_checkpoints_counting_those_that_exist(tmp_path, monkeypatch):
    """The newest, the best, and the one being written."""
    free = {"bytes": 299}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free["bytes"]))
    new, begun = tmp_path / "a" / "new", tmp_path / "begun"
    (begun / "checkpoints" / "10").mkdir(parents=True)
    (begun / "checkpoints" / "10" / "params").write_bytes(bytes(100))
    run_folder.check_room(begun, 100)
    with pytest.raises(InputError, match=r"room for three checkpoints of 0\.0 MiB .* --out_dir"):
        run_folder.check_room(new, 100)
    free["bytes"] = 199
    with pytest.raises(InputError, match="room for three checkpoints"):
        run_folder.check_room(begun, 100)
    free["bytes"] = 300
    run_folder.check_room(new, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))
    run_folder.check_room(new, 100)  # the system does not know


# Whether a run can resume in it


def test_a_new_or_empty_folder_holds_no_run(tmp_path, tiny_config):
    assert not run_folder.can_resume(tmp_path / "none", tiny_config, FINGERPRINT)
    assert not run_folder.can_resume(tmp_path, tiny_config, FINGERPRINT)


def test_the_same_configuration_resumes(begun, tiny_config):
    assert run_folder.can_resume(begun, tiny_config, FINGERPRINT)


def test_fields_that_do_not_affect_the_updates_may_change(begun, tiny_config):
    changed = replace(
        tiny_config, config="other", out_dir="b", dataset="c", data_dir="d", max_iters=999,
        eval_interval=7, eval_first=False, log_interval=3, eval_only=True, overwrite=True,
    )  # fmt: skip
    assert run_folder.can_resume(begun, changed, FINGERPRINT)


OTHERS = (77, 0.25, True, False, "gelu_tanh", "bigram", "gpt2", "rotary", "rmsnorm", "muon", "wsd")


def is_another(name: str, value, other) -> bool:
    """Whether a field could have that other value."""
    try:
        check_value(name, field_types(TrainConfig)[name], other)
    except InputError:
        return False
    return other != value


def test_every_field_that_affects_the_updates_is_named_if_it_differs(begun, tiny_config):
    for name, value in to_flat_dict(tiny_config).items():
        if name in run_folder.FREE_FIELDS or name == "minutes":  # which may be left out
            continue
        path = begun / "config.json"
        original = path.read_text(encoding="utf-8")
        another = next(other for other in OTHERS if is_another(name, value, other))
        path.write_text(json.dumps(json.loads(original) | {name: another}))
        with pytest.raises(InputError) as error:
            run_folder.can_resume(begun, tiny_config, FINGERPRINT)
        assert f"a run that differs: {name} {another!r} -> {value!r}. " in str(error.value)
        path.write_text(original)


def test_all_differing_fields_are_named_with_both_values(begun, tiny_config):
    wider = replace(tiny_config, batch_size=3, model=replace(tiny_config.model, n_embd=16))
    with pytest.raises(InputError) as error:
        run_folder.can_resume(begun, wider, FINGERPRINT)
    message = str(error.value)
    assert "batch_size 8 -> 3; n_embd 12 -> 16" in message
    assert all(word in message for word in (str(begun), "--out_dir", "--overwrite"))
    assert "\n" not in message


def test_another_text_is_named(begun, tiny_config):
    """The same path may hold another text than when the run began."""
    with pytest.raises(InputError, match="differs: the dataset's tokens, another text or"):
        run_folder.can_resume(begun, tiny_config, "fedcba9876543210")


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path, tiny_config):
    for i, config_json in enumerate([None, *FOREIGN]):
        folder = files_of_someone_else(tmp_path / str(i), config_json)
        with pytest.raises(InputError, match=r"config\.json"):
            run_folder.can_resume(folder, tiny_config, FINGERPRINT)
        assert (folder / "thesis.tex").read_text() == "years of work"


# config.json


def test_beginning_writes_the_whole_request_and_what_it_was_made_with(begun, tiny_config):
    loaded = json.loads((begun / "config.json").read_text(encoding="utf-8"))
    made_with = loaded.pop("made_with")
    assert loaded == to_flat_dict(tiny_config)
    assert made_with == MADE_WITH
    assert sorted(path.name for path in begun.iterdir()) == ["checkpoints", "config.json"]


def test_resuming_updates_the_config(begun, tiny_config):
    run_folder.begin(begun, replace(tiny_config, max_iters=99), MADE_WITH | {"jax": "0.1"})
    loaded = json.loads((begun / "config.json").read_text(encoding="utf-8"))
    assert (loaded["max_iters"], loaded["made_with"]["jax"]) == (99, "0.1")
    assert run_folder.can_resume(begun, tiny_config, FINGERPRINT)


def test_a_run_with_a_field_that_was_taken_out_resumes_if_the_field_did_nothing(begun, tiny_config):
    path = begun / "config.json"
    loaded = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(loaded | {"ngram_rows": 0}))
    assert run_folder.can_resume(begun, tiny_config, FINGERPRINT)
    assert parse_train_config(["--config", str(path)]).model == tiny_config.model
    path.write_text(json.dumps(loaded | {"ngram_rows": 64}))
    with pytest.raises(InputError, match="another program or version made it, with ngram_rows"):
        run_folder.can_resume(begun, tiny_config, FINGERPRINT)


def test_awkward_numbers_survive_the_file(begun, tiny_config):
    optim = OptimConfig(learning_rate=0.1 + 0.2, min_lr=1e-300, beta2=1 - 2**-50)
    config = replace(tiny_config, optim=optim)
    run_folder.begin(begun, config, MADE_WITH)
    assert run_folder.can_resume(begun, config, FINGERPRINT)


def test_the_models_shape_is_read_from_a_run(begun, tiny_config):
    assert run_folder.read_model_config(begun) == tiny_config.model


def test_a_folder_without_a_run_has_no_model(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(
            InputError, match=f"{folder} is not a run: there is no {folder}/config.json"
        ):
            run_folder.read_model_config(folder)


def test_a_path_that_no_folder_can_have_has_no_model(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        run_folder.read_model_config(tmp_path / (256 * "x"))


def test_a_config_json_of_something_else_has_no_model(tmp_path):
    for i, config_json in enumerate([*FOREIGN, '{"n_layer": "four"}']):
        folder = files_of_someone_else(tmp_path / str(i), config_json)
        with pytest.raises(InputError, match="must be a run's configuration"):
            run_folder.read_model_config(folder)


# --overwrite


def test_overwriting_deletes_a_run(begun):
    (begun / "checkpoints" / "60" / "params").mkdir(parents=True)
    run_folder.delete(begun)
    assert begun.exists()
    assert not any(begun.iterdir())


def test_overwriting_leaves_other_files_in_the_folder(begun):
    (begun / "notes.txt").write_text("worked well")
    run_folder.delete(begun)
    assert [path.name for path in begun.iterdir()] == ["notes.txt"]


def test_overwriting_through_a_link_deletes_the_run_it_leads_to(begun, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(begun)
    run_folder.delete(link)
    assert link.is_symlink()
    assert not any(begun.iterdir())


def test_overwriting_nothing_is_fine(tmp_path):
    run_folder.delete(tmp_path / "none")
    run_folder.delete(tmp_path)
    assert tmp_path.exists()


def test_overwriting_never_deletes_what_is_not_a_run(tmp_path):
    """Many a tool keeps its own config.json; a folder with one need not be ours."""
    for i, config_json in enumerate([None, *FOREIGN]):
        folder = files_of_someone_else(tmp_path / str(i), config_json)
        with pytest.raises(InputError, match=f"{folder}"):
            run_folder.delete(folder)
        assert (folder / "thesis.tex").read_text() == "years of work"


# The newest run


def make_run(name: str, mtime_s: int, checkpoint: str = "60") -> Path:
    checkpoints = Path("out", name, "checkpoints")
    (checkpoints / checkpoint / "params").mkdir(parents=True)
    os.utime(checkpoints, (mtime_s, mtime_s))
    return checkpoints.parent


def test_the_newest_run_has_the_newest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("b", 1000)
    newest = make_run("a", 3000)
    make_run("c", 2000)
    assert run_folder.newest() == newest


def test_a_run_without_a_checkpoint_is_not_the_newest(tmp_path, monkeypatch):
    """Just begun, or killed while it saved for the first time."""
    monkeypatch.chdir(tmp_path)
    done = make_run("done", 1000)
    (tmp_path / "out" / "begun" / "checkpoints").mkdir(parents=True)
    make_run("killed", 2000, checkpoint="60.orbax-checkpoint-tmp")
    assert run_folder.newest() == done


def test_the_command_that_trains_is_named_if_there_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for created in "", "out", "out/begun/checkpoints":
        Path(created).mkdir(parents=True, exist_ok=True)
        with pytest.raises(InputError, match=r"there is no run under out/ yet.*python train\.py"):
            run_folder.newest()
