"""TensorBoard and Weights & Biases get each row of metrics.jsonl."""

import importlib.util
import json
import struct
import sys

import pytest
from runs import train

from nanogpt_jax.config import TrainConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import loggers, progress
from nanogpt_jax.run.plots import read_metrics

QUICK = ["--config=lecture-bigram", "--max_iters=20", "--eval_interval=10", "--mesh=data=1"]
NAMES = {"loss/train": "train_loss", "loss/val": "val_loss"}

# In place of wandb, whose service is not here: it notes what it gets.
FAKE_WANDB = """
import json, os, pathlib
class Error(Exception): pass
def login():
    return not os.environ.get("LOGGED_OUT")
def note(**what):
    with pathlib.Path(os.environ["LOGGED"]).open("a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**kwargs):
    if os.environ.get("REFUSE"):
        raise Error("quota exceeded")
    note(init=kwargs)
    class Run:
        def log(self, row, step):
            if os.environ.get("BREAK"):
                raise OSError("the network is gone")
            note(step=step, row=row)
        def finish(self):
            note(finished=True)
    return Run()
"""


def tensorboard_events(folder):
    """Return the events of a folder's files.

    Each record is its length, a checksum, its content and one more checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            events.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


@pytest.fixture
def start(tmp_path, book, monkeypatch):
    """Train in this process, in the folder `run`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "draw", lambda folder, title: None)
    return lambda *argv: train.main([*QUICK, f"--dataset={book}", "--out_dir=run", *argv])


@pytest.fixture
def start_with_wandb(tmp_path, monkeypatch, start):
    """Train with --wandb and the fake; return all that the fake has got so far."""
    put_fake(tmp_path, monkeypatch, "wandb", FAKE_WANDB)
    path = tmp_path / "logged.jsonl"
    monkeypatch.setenv("LOGGED", str(path))

    def run(*argv):
        assert start("--wandb", *argv) == 0
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


def put_fake(tmp_path, monkeypatch, package, code):
    """Let `import package` find this code."""
    (tmp_path / "fakes").mkdir(exist_ok=True)
    (tmp_path / "fakes" / f"{package}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.setitem(sys.modules, package, None)  # so that it is forgotten afterwards
    del sys.modules[package]


def test_tensorboard_has_every_row_of_metrics_jsonl(tmp_path, start):
    pytest.importorskip("tensorboardX")
    assert start("--tensorboard") == 0
    logged = {
        (event.step, NAMES.get(value.tag, value.tag)): value.simple_value
        for event in tensorboard_events(tmp_path / "run" / "tensorboard")
        for value in event.summary.value
    }
    expected = {
        (row["step"], name): value
        for row in read_metrics(tmp_path / "run")
        for name, value in row.items()
        if name != "step"
    }
    assert logged == pytest.approx(expected, rel=1e-6)


def test_tensorboard_hides_what_a_killed_run_had_logged_past_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX")
    config = TrainConfig(tensorboard=True)
    for begun_at, first in (None, 0), (10, 11):
        folder = tmp_path / str(first)
        (logger,) = loggers.open_loggers(config, folder, begun_at)
        logger.close()
        events = tensorboard_events(folder / "tensorboard")
        assert [event.step for event in events if event.HasField("session_log")] == [first]


def test_wandb_gets_every_row_and_a_resumed_run_continues_its_curves(tmp_path, start_with_wandb):
    for max_iters in 20, 30:
        logged = start_with_wandb("--lr_decay_iters=20", f"--max_iters={max_iters}")
    rows = [line["row"] for line in logged if "row" in line]
    assert rows == read_metrics(tmp_path / "run")
    assert all(line["step"] == line["row"]["step"] for line in logged if "row" in line)
    first, second = (line["init"] for line in logged if "init" in line)
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert (first["project"], first["name"]) == ("nanogpt_jax", "run")
    assert first["config"]["learning_rate"] == 1e-2
    assert sum("finished" in line for line in logged) == 2


def test_a_run_that_starts_over_has_new_curves_and_needs_a_login_before_the_old_one_is_deleted(
    tmp_path, start_with_wandb, monkeypatch
):
    start_with_wandb()
    rows = read_metrics(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setenv("LOGGED_OUT", "1")
        with pytest.raises(InputError, match="--wandb needs a login"):
            start_with_wandb("--overwrite")
    assert read_metrics(tmp_path / "run") == rows
    logged = start_with_wandb("--overwrite")
    first, second = (line["init"]["id"] for line in logged if "init" in line)
    assert first != second


def test_what_wandb_refuses_is_one_line(start_with_wandb, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(InputError, match=r"^--wandb: Weights & Biases refuses: quota exceeded"):
        start_with_wandb()


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, start_with_wandb, monkeypatch, capsys):
    monkeypatch.setenv("BREAK", "1")
    start_with_wandb()
    shown = capsys.readouterr().out
    assert shown.count("logger disabled after an error: the network is gone") == 1
    assert read_metrics(tmp_path / "run")[-1]["step"] == 20


def test_a_folder_with_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    """Old runs leave one called wandb where train.py is started."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match="needs the package wandb"):
        loggers.check(TrainConfig(wandb=True))


@pytest.mark.parametrize("flag", loggers.PACKAGES)
def test_a_missing_package_is_named_before_anything_is_done(flag, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = TrainConfig(**{flag: True})
    with pytest.raises(InputError, match=rf"--{flag} needs .*\[{flag}\]"):
        loggers.check(config)
    loggers.check(TrainConfig())


def test_neither_is_imported_unless_it_is_requested(tmp_path, start, monkeypatch):
    for package in loggers.PACKAGES.values():
        put_fake(tmp_path, monkeypatch, package, "raise SystemExit('imported')")
    assert start() == 0
    assert not any((tmp_path / "run" / name).exists() for name in loggers.PACKAGES)


@pytest.mark.slow
def test_the_real_wandb_logs_offline(tmp_path, start, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert start("--wandb") == 0
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"val_loss" in written.read_bytes()
