"""What a run leaves in metrics.jsonl, and that it draws its picture."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from nanogpt_jax.config import ComputeConfig
from nanogpt_jax.hardware import train_flops_per_token
from nanogpt_jax.run import progress as rooms
from nanogpt_jax.run.plots import read_metrics
from nanogpt_jax.run.progress import MAX_SKIPPED, Diverged, Progress
from nanogpt_jax.steps import Metrics

LOSSES = (3.0 + np.random.default_rng(0).normal(size=100)).astype(np.float32)


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(tiny_config, max_iters=20, eval_interval=10, log_interval=4)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Draw no picture, unless a test is about it."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(rooms, "draw", lambda folder, title: None)


def metrics_of(step, losses=LOSSES, skipped=0):
    """Return what an update reports: a loss of its own, and a learning rate to know it by."""
    loss = losses[step - 1]
    return Metrics(loss, loss, np.int32(skipped), np.float32(step / 100))


def train(progress, begin, end, losses=LOSSES):
    """Report steps as train.py does: every 10th step is evaluated, unless it was before."""
    for step in range(begin, end + 1):
        if step % 10 == 0 and (step == 0 or step != begin):
            progress.flush(is_evaluated=True)
            progress.evaluated(step, 5 - step / 100)
        if step < end:
            progress.log(step + 1, metrics_of(step + 1, losses))
    progress.flush()


def run(folder, config, begin=None, end=20, **kwargs):
    progress = Progress(folder, config, begin)
    try:
        train(progress, begin or 0, end, **kwargs)
    finally:
        progress.close()
    return progress


def numbers(folder):
    """Return the rows without those columns that depend on the clock."""
    return [
        {name: x for name, x in row.items() if name not in ("tokens_per_s", "elapsed_s")}
        for row in read_metrics(folder)
    ]


def test_rows_are_at_log_points_and_evaluations(tmp_path, config):
    run(tmp_path, config)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 4, 8, 10, 12, 16, 20]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 10, 20]
    assert [row["step"] for row in rows if "train_loss" not in row] == [0]
    assert all({"lr", "tokens_per_s", "elapsed_s"} <= row.keys() for row in rows)
    elapsed_s = [row["elapsed_s"] for row in rows]
    assert elapsed_s == sorted(elapsed_s)
    assert rows[1]["tokens_per_s"] > 0


def test_an_update_is_reported_when_the_next_one_was_dispatched(tmp_path, config):
    """So that the device computes while the host reports."""
    progress = Progress(tmp_path, config, None)
    for step in range(1, 6):
        progress.log(step, metrics_of(step))
        assert [row["step"] for row in read_metrics(tmp_path)] == [4] * (step == 5)
    progress.flush()
    progress.close()
    assert progress.train_loss == float(LOSSES[4])


def test_a_log_interval_past_the_end_leaves_the_evaluations(tmp_path, config):
    run(tmp_path, dataclasses.replace(config, log_interval=1000))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 10, 20]


def test_losses_come_back_exactly(tmp_path, config):
    run(tmp_path, config)
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    for step in 4, 8, 10, 12, 16, 20:
        assert np.float32(rows[step]["train_loss"]) == LOSSES[step - 1]
    assert rows[10]["val_loss"] == 4.9


def test_the_learning_rate_is_that_of_the_update_before(tmp_path, config):
    progress = Progress(tmp_path, config, None, learning_rate=0.5)
    train(progress, 0, 20)
    progress.close()
    rows = read_metrics(tmp_path)
    assert rows[0]["lr"] == 0.5  # of the first update
    assert [row["lr"] for row in rows[1:]] == [np.float32(r["step"] / 100) for r in rows[1:]]


def test_a_resumed_run_has_the_rows_of_one_straight_through(tmp_path, config):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    run(straight, config)
    run(stopped, config, end=18)
    run(stopped, config, begin=10)  # the checkpoint is of step 10: 12 and 16 are repeated
    assert numbers(stopped) == numbers(straight)


def test_an_evaluation_that_a_signal_stopped_is_logged_when_it_is_repeated(tmp_path, config):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    run(straight, config)
    progress = Progress(stopped, config, None)
    train(progress, 0, 9)
    progress.log(10, metrics_of(10))
    progress.flush(is_evaluated=True)
    progress.evaluated(10, None)
    progress.close()
    assert "val_loss" not in read_metrics(stopped)[-1]
    progress = Progress(stopped, config, 10, learning_rate=0.5, evaluates_first=True)
    progress.evaluated(10, 4.9)
    train(progress, 10, 20)
    progress.close()
    assert numbers(stopped) == numbers(straight)


def test_a_run_that_begins_again_from_nothing_logs_step_0_once(tmp_path, config):
    """Killed before its first checkpoint."""
    run(tmp_path, config, end=6)
    run(tmp_path, config)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 4, 8, 10, 12, 16, 20]


def test_resuming_drops_a_last_line_cut_off_by_a_kill(tmp_path, config):
    run(tmp_path, config, end=10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "train_l')
    run(tmp_path, config, begin=10)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 4, 8, 10, 12, 16, 20]


def test_resuming_remembers_the_best_and_the_time(tmp_path, config):
    rows = [
        {"step": 0, "val_loss": 4.0, "lr": 0.1, "tokens_per_s": 0, "elapsed_s": 1.0},
        {"step": 10, "val_loss": 2.0, "lr": 0.1, "tokens_per_s": 9, "elapsed_s": 100.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    progress = run(tmp_path, config, begin=10)
    assert progress.best == (2.0, 10)
    assert 100 < progress.elapsed_s() < 200


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_is_named_with_its_step(tmp_path, config, bad):
    losses = np.where(np.arange(100) == 6, bad, LOSSES)
    with pytest.raises(Diverged, match=f"at step 7: loss {bad} and .*, learning rate 0.07"):
        run(tmp_path, config, losses=losses)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 4]


def test_a_gradient_that_is_not_finite_ends_the_run_before_its_parameters_are_saved(
    tmp_path, config
):
    progress = Progress(tmp_path, config, None)
    progress.log(1, metrics_of(1)._replace(grad_norm=np.float32(np.inf)))
    with pytest.raises(Diverged, match=r"at step 1: .* gradient norm inf"):
        progress.flush()
    progress.close()


def test_a_validation_loss_that_is_not_finite_ends_the_run(tmp_path, config):
    progress = Progress(tmp_path, config, None)
    with pytest.raises(Diverged, match="at step 10: validation loss nan"):
        progress.evaluated(10, float("nan"))
    progress.close()
    assert read_metrics(tmp_path) == []


def test_updates_skipped_in_float16_are_counted_and_too_many_in_a_row_end_the_run(
    tmp_path, config, capsys
):
    config = dataclasses.replace(config, compute=ComputeConfig(dtype="float16"), log_interval=1)
    overflowed = metrics_of(1, np.full(99, np.inf, np.float32))
    progress = Progress(tmp_path, config, None, skipped=2, counts_skips=True)
    progress.log(1, overflowed._replace(skipped=np.int32(3)))
    progress.log(2, metrics_of(2, skipped=3))
    progress.flush(is_evaluated=True)
    progress.evaluated(2, 4.0)
    rows = read_metrics(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [3, 3]
    assert ["train_loss" in row for row in rows] == [False, True]
    assert "skipped updates: 3" in capsys.readouterr().out
    for i in range(1, MAX_SKIPPED + 2):
        progress.log(2 + i, overflowed._replace(skipped=np.int32(3 + i)))
    with pytest.raises(Diverged, match=f"float16 overflowed in {MAX_SKIPPED} updates"):
        progress.flush()
    progress.close()


def test_mfu_is_shown_if_the_chips_peak_is_known(tmp_path, config):
    """The share of the peak that the products of a step's tokens take."""
    progress = Progress(tmp_path, config, None, peak_flops=1e12)
    train(progress, 0, 10)
    progress.close()
    first, *_, last = read_metrics(tmp_path)
    assert "mfu" not in first  # nothing was computed yet
    token_flops = train_flops_per_token(config.model)
    assert progress.mfu() == pytest.approx(progress.tokens_per_s * token_flops / 1e12)
    assert last["mfu"] == pytest.approx(progress.mfu(), rel=0.005)


def test_no_mfu_is_shown_for_an_unknown_chip(tmp_path, config):
    progress = run(tmp_path, config)
    assert progress.mfu() is None
    assert not any("mfu" in row for row in read_metrics(tmp_path))


def test_a_log_that_is_damaged_meanwhile_costs_the_picture_but_not_the_run(
    tmp_path, config, capsys
):
    progress = Progress(tmp_path, config, None)
    train(progress, 0, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    progress.close()
    assert "loss.png could not be drawn" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["garbage", "module://matplotlib_inline.backend_inline"])
def test_a_backend_of_somebody_elses_does_not_matter_for_the_picture(tmp_path, backend):
    """A notebook's cell hands MPLBACKEND down to the commands that it starts."""
    script = (
        "from nanogpt_jax.run.plots import new_figure, save_figure\n"
        "import pathlib\n"
        f"save_figure(new_figure(2, 2)[0], pathlib.Path({str(tmp_path / 'loss.png')!r}))\n"
    )
    environment = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_error_of_a_picture_ends_a_run(tmp_path, config, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("'garbage' is not a valid value for backend\nand more")

    monkeypatch.setattr(rooms, "draw", fail)
    monkeypatch.setattr(rooms, "REDRAW_S", -1)
    progress = Progress(tmp_path, config, None)
    train(progress, 0, 10)
    progress.redraw()
    progress.close()
    printed = capsys.readouterr().out
    assert "warning: loss.png could not be drawn: 'garbage' is not a valid value" in printed
    assert "and more" not in printed


def test_a_run_draws_its_picture(tmp_path, config):
    run(tmp_path, config)
    assert (tmp_path / "loss.png").stat().st_size > 8_000
