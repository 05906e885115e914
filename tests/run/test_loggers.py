"""What TensorBoard and Weights & Biases are told: each row of metrics.jsonl."""

import importlib.util
import json
import struct
import sys

import pytest

from nanogpt_jax.config import TrainConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import loggers
from nanogpt_jax.run.plots import read_metrics

QUICK = ("--config=lecture-bigram", "--max_iters=20", "--eval_interval=10")
NAMES = {"loss/train": "train_loss", "loss/val": "val_loss"}

# In place of wandb, whose service is not here: it notes what it is told.
FAKE_WANDB = """
import json, os, pathlib
class Error(Exception): pass
def login():
    return not os.environ.get("LOGGED_OUT")
def init(**told):
    if os.environ.get("REFUSE"):
        raise Error("quota exceeded")
    lines = pathlib.Path(os.environ["TOLD"]).open("a")
    lines.write(json.dumps({"init": told}) + "\\n")
    class Run:
        def log(self, row, step):
            if os.environ.get("BREAK"):
                raise OSError("the network is gone")
            lines.write(json.dumps({"step": step, "row": row}) + "\\n")
        def finish(self): lines.write(json.dumps({"finished": True}) + "\\n"); lines.close()
    return Run()
"""


def tensorboard_events(folder):
    """Return the events of a folder's files; each record has its length, a checksum, itself, one
    more checksum."""
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
def wandb_run(tmp_path, monkeypatch, run):
    """train.py with --wandb and the fake."""
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.jsonl"))

    def start(*argv):
        result = run("train.py", *QUICK, "--wandb", *argv)
        path = tmp_path / "told.jsonl"
        told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return result, told

    return start


def test_tensorboard_has_every_row_of_metrics_jsonl(tmp_path, book, run):
    pytest.importorskip("tensorboardX")
    result = run("train.py", *QUICK, "--tensorboard", f"--dataset={book}", "--out_dir=run")
    assert result.returncode == 0, result.stderr
    told = {
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
    assert told == pytest.approx(expected, rel=1e-6)


def test_tensorboard_hides_what_a_killed_run_had_logged_past_its_checkpoint(tmp_path):
    pytest.importorskip("tensorboardX")
    config = TrainConfig(tensorboard=True)
    for begun_at, first in (None, 0), (10, 11):
        folder = tmp_path / str(first)
        (logger,) = loggers.open_loggers(config, folder, begun_at)
        logger.close()
        events = tensorboard_events(folder / "tensorboard")
        assert [event.step for event in events if event.HasField("session_log")] == [first]


def test_wandb_is_told_every_row_and_goes_on_with_the_same_curves(tmp_path, book, wandb_run):
    argv = f"--dataset={book}", "--out_dir=run", "--lr_decay_iters=20"
    for max_iters in 20, 30:
        result, told = wandb_run(*argv, f"--max_iters={max_iters}")
        assert result.returncode == 0, result.stderr
    rows = [line["row"] for line in told if "row" in line]
    assert rows == read_metrics(tmp_path / "run")
    assert all(line["step"] == line["row"]["step"] for line in told if "row" in line)
    first, second = (line["init"] for line in told if "init" in line)
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert (first["project"], first["name"]) == ("nanogpt_jax", "run")
    assert first["config"]["learning_rate"] == 1e-2
    assert sum("finished" in line for line in told) == 2


def test_a_run_that_starts_anew_has_new_curves(tmp_path, book, wandb_run):
    for more in (), ("--overwrite",):
        _, told = wandb_run(f"--dataset={book}", "--out_dir=run", *more)
    first, second = (line["init"]["id"] for line in told if "init" in line)
    assert first != second


def test_what_wandb_refuses_is_said_in_one_line(book, wandb_run, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    result, _ = wandb_run(f"--dataset={book}", "--out_dir=run")
    assert result.returncode == 2
    assert "error: --wandb: Weights & Biases refuses: quota exceeded" in result.stderr
    assert "Traceback" not in result.stderr


def test_whoever_is_not_logged_in_hears_it_before_a_run_is_deleted(
    tmp_path, book, wandb_run, monkeypatch
):
    wandb_run(f"--dataset={book}", "--out_dir=run")
    rows = read_metrics(tmp_path / "run")
    monkeypatch.setenv("LOGGED_OUT", "1")
    result, _ = wandb_run(f"--dataset={book}", "--out_dir=run", "--overwrite")
    assert result.returncode == 2
    assert "error: --wandb needs a login" in result.stderr
    assert read_metrics(tmp_path / "run") == rows


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, book, wandb_run, monkeypatch):
    monkeypatch.setenv("BREAK", "1")
    result, _ = wandb_run(f"--dataset={book}", "--out_dir=run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("a logger failed, and is told no more: the network is gone") == 1
    assert read_metrics(tmp_path / "run")[-1]["step"] == 20
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_folder_that_has_the_packages_name_is_not_it(tmp_path, monkeypatch):
    """Old runs leave one called wandb where train.py is started."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match="needs the package wandb"):
        loggers.check(TrainConfig(wandb=True))


@pytest.mark.parametrize("flag", loggers.PACKAGES)
def test_a_package_that_is_missing_is_said_before_anything_is_done(flag, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = TrainConfig(**{flag: True})
    with pytest.raises(InputError, match=rf"--{flag} needs .*\[{flag}\]"):
        loggers.check(config)
    loggers.check(TrainConfig())


def test_neither_is_imported_unless_it_is_asked_for(tmp_path, book, run, monkeypatch):
    (tmp_path / "fakes").mkdir()
    for package in loggers.PACKAGES.values():
        (tmp_path / "fakes" / f"{package}.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    result = run("train.py", *QUICK, f"--dataset={book}", "--out_dir=run")
    assert result.returncode == 0, result.stderr
    assert not any((tmp_path / "run" / name).exists() for name in loggers.PACKAGES)


@pytest.mark.slow
def test_the_real_wandb_takes_it_offline(tmp_path, book, run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run("train.py", *QUICK, "--wandb", f"--dataset={book}", "--out_dir=run")
    assert result.returncode == 0, result.stderr
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"val_loss" in written.read_bytes()
