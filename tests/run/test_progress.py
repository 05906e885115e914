"""What a run leaves in metrics.jsonl, and that it draws its picture."""

import dataclasses
import json
import time
import tracemalloc

import jax
import numpy as np
import pytest

from nanogpt_jax.hardware.flops import train_flops_per_token
from nanogpt_jax.optim import learning_rate_schedule
from nanogpt_jax.run.plots import read_metrics
from nanogpt_jax.run.progress import Diverged, Progress
from nanogpt_jax.steps import Metrics

LOSSES = (3.0 + np.random.default_rng(0).normal(size=100)).astype(np.float32)

MOST_STEPS = 2**30


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(tiny_config, max_iters=20, eval_interval=10, log_interval=4)


def train(progress, begin, end, at_once=3, losses=LOSSES):
    """Report steps as train.py does: some steps a dispatch, evaluations where they are due."""
    step = begin
    while True:
        if progress.evaluation_due(step) and (step == 0 or step != begin):
            progress.catch_up()
            progress.evaluated(step, 5 - step / 100)
        if step == end:
            break
        n_steps = min(at_once, end - step, progress.config.eval_interval - step % 10)
        filled = np.zeros(7, np.float32)
        filled[:n_steps] = losses[step : step + n_steps]
        progress.dispatched(
            step, n_steps, time.perf_counter(), Metrics(filled, filled, np.zeros(7, int))
        )
        step += n_steps
    progress.catch_up()


def run(folder, config, begin=None, end=20, **kwargs):
    progress = Progress(folder, config, begin)
    try:
        train(progress, begin or 0, end, **kwargs)
    finally:
        progress.close()
    return progress


def numbers(folder):
    """The rows without what the clock makes of them."""
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


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_rows_do_not_depend_on_the_rhythm_of_dispatches(tmp_path, config, at_once):
    for name, n in ("ones", 1), ("more", at_once):
        (tmp_path / name).mkdir()
        run(tmp_path / name, config, at_once=n)
    assert numbers(tmp_path / "more") == numbers(tmp_path / "ones")


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
    run(tmp_path, config)
    schedule = learning_rate_schedule(config.optim, config.max_iters)
    for row in read_metrics(tmp_path)[1:]:
        assert row["lr"] == pytest.approx(float(schedule(row["step"] - 1)), rel=1e-6)


def test_the_learning_rate_is_exactly_what_all_of_them_computed_at_once_are(tmp_path, config):
    optim = dataclasses.replace(config.optim, warmup_iters=50, lr_decay_iters=150_000)
    config = dataclasses.replace(config, optim=optim, max_iters=200_000)
    schedule = learning_rate_schedule(config.optim, config.max_iters)
    rates = np.asarray(jax.jit(schedule)(np.arange(config.max_iters)))
    progress = Progress(tmp_path, config, None)
    logged = [1, 49, 50, 51, 65_535, 65_536, 65_537, 131_072, 131_073, 149_999, 150_001, 200_000]
    for step in logged:
        progress.evaluated(step, 2.0)
    progress.close()
    assert [row["lr"] for row in read_metrics(tmp_path)] == [float(rates[s - 1]) for s in logged]


def test_a_run_of_a_billion_steps_begins_as_quickly_as_a_short_one(tmp_path, config):
    """The learning rates of all its steps would take 24 GB."""
    config = dataclasses.replace(config, max_iters=MOST_STEPS)
    tracemalloc.start()
    progress = Progress(tmp_path, config, None)
    progress.evaluated(MOST_STEPS, 2.0)
    most_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    progress.close()
    assert most_bytes < 50e6
    assert read_metrics(tmp_path)[0]["lr"] == np.float32(config.optim.min_lr)


def test_a_resumed_run_has_the_rows_of_one_straight_through(tmp_path, config):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    run(straight, config)
    run(stopped, config, end=18)
    run(stopped, config, begin=10)  # the checkpoint lay at 10: 12 and 16 are made again
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
def test_a_loss_that_is_no_number_is_told_with_its_step(tmp_path, config, bad):
    losses = np.where(np.arange(100) == 6, bad, LOSSES)
    with pytest.raises(Diverged, match=f"at step 7: loss {bad} and"):
        run(tmp_path, config, losses=losses)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 4]


def test_a_gradient_that_is_no_number_ends_the_run_before_its_parameters_are_saved(
    tmp_path, config
):
    progress = Progress(tmp_path, config, None)
    progress.dispatched(0, 1, 0.0, Metrics(np.float32([2.0]), np.float32([np.inf]), [0]))
    with pytest.raises(Diverged, match=r"at step 1: .* gradient norm inf"):
        progress.catch_up()
    progress.close()


def test_a_validation_loss_that_is_no_number_is_told_with_its_step(tmp_path, config):
    progress = Progress(tmp_path, config, None)
    with pytest.raises(Diverged, match="at step 10: validation loss nan"):
        progress.evaluated(10, float("nan"))
    progress.close()
    assert read_metrics(tmp_path) == []


def test_mfu_is_told_where_the_chips_peak_is_known(tmp_path, config):
    """The share of the peak that the products of a step's tokens take."""
    progress = Progress(tmp_path, config, None, peak_flops=1e12)
    train(progress, 0, 10)
    progress.close()
    first, *_, told = read_metrics(tmp_path)
    assert "mfu" not in first  # nothing was computed yet
    step_flops = train_flops_per_token(config.model) * config.tokens_per_iter
    assert progress.mfu() == pytest.approx(progress.steps_per_s * step_flops / 1e12)
    assert told["mfu"] == pytest.approx(progress.mfu(), rel=0.005)


def test_no_mfu_is_told_of_a_chip_that_is_not_known(tmp_path, config):
    progress = run(tmp_path, config)
    assert progress.mfu() is None
    assert not any("mfu" in row for row in read_metrics(tmp_path))


def test_a_log_that_is_damaged_meanwhile_costs_the_picture_and_not_the_run(
    tmp_path, config, capsys
):
    progress = Progress(tmp_path, config, None)
    train(progress, 0, 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    progress.close()
    assert "loss.png could not be drawn" in capsys.readouterr().out


def test_a_run_draws_its_picture(tmp_path, config):
    run(tmp_path, config)
    assert (tmp_path / "loss.png").stat().st_size > 8_000
