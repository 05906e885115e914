"""What a run computes: totals against sums by hand, and the line that train.py prints."""

import dataclasses
import math

import numpy as np
import pytest

from nanogpt_jax import data
from nanogpt_jax.config import PRESETS, with_vocab_size
from nanogpt_jax.hardware import amount, duration, find_chip, run_flops, run_line, updates_within
from nanogpt_jax.hardware.flops import forward_flops_per_token


@pytest.mark.parametrize(
    ("max_iters", "eval_interval", "n_evaluations"), [(10, 5, 3), (11, 5, 4), (3, 5, 2)]
)
def test_a_run_is_counted_batch_by_batch(tiny_config, max_iters, eval_interval, n_evaluations):
    config = dataclasses.replace(tiny_config, max_iters=max_iters, eval_interval=eval_interval)
    n_val, block_size = 1000, config.model.block_size
    offsets_NB, _ = data.eval_offsets(np.zeros(n_val, np.uint16), block_size, config.batch_size)
    train, evaluate = run_flops(config, n_val)
    forward = forward_flops_per_token(config.model) * block_size
    assert train == 3 * forward * config.batch_size * max_iters
    assert evaluate == n_evaluations * offsets_NB.size * forward


def test_evaluations_of_some_batches_cost_as_many(tiny_config):
    config = dataclasses.replace(tiny_config, max_iters=1, eval_iters=3)
    per_batch = forward_flops_per_token(config.model) * 8 * config.model.block_size
    assert run_flops(config, 10**9)[1] == 2 * 3 * per_batch


def test_what_only_evaluates_is_priced_for_one_evaluation_and_no_training(tiny_config):
    config = dataclasses.replace(with_vocab_size(tiny_config), eval_only=True, eval_iters=3)
    one = 3 * config.batch_size * config.model.block_size * forward_flops_per_token(config.model)
    assert run_flops(config, 10**6) == (0, one)


def test_the_line_before_a_run_has_its_shortest_time_on_all_devices(tiny_config):
    flops = sum(run_flops(tiny_config, 1000))
    line = run_line(tiny_config, 1000, find_chip("H200"), 4)
    assert f"{amount(flops)} FLOPs" in line
    assert f"{duration(flops / 4 / 989.4e12)} at the 16-bit peak of 4 x H200" in line


@pytest.mark.parametrize(("start_step", "n_evaluations"), [(0, 3), (1, 2), (5, 1), (6, 1), (10, 0)])
def test_a_resumed_run_computes_the_rest(tiny_config, start_step, n_evaluations):
    """The evaluation at the step that it resumes from is done already."""
    config = dataclasses.replace(tiny_config, max_iters=10, eval_interval=5, eval_iters=1)
    per_batch = forward_flops_per_token(config.model) * config.batch_size * config.model.block_size
    expected = 3 * per_batch * (10 - start_step), n_evaluations * per_batch
    assert run_flops(config, 10**6, start_step) == expected
    line = run_line(config, 10**6, None, 1, start_step)
    assert line.startswith("the rest of the run" if start_step else "the run")


def test_a_model_without_matrix_products_has_no_flops_to_count():
    config = with_vocab_size(PRESETS["lecture-bigram"])
    assert "no FLOPs" in run_line(config, 1000, find_chip("H200"), 1)


def test_an_unknown_chip_gets_no_time(tiny_config):
    line = run_line(tiny_config, 1000, None, 1)
    assert "MFU is not shown" in line
    assert "peak of" not in line


def test_a_run_that_mostly_evaluates_is_warned(tiny_config):
    """For example on a laptop, with the validation split of a large corpus."""
    assert "--eval_iters 20" in run_line(tiny_config, 10**7, None, 1)
    assert "--eval_iters" not in run_line(tiny_config, 1000, None, 1)
    limited = dataclasses.replace(tiny_config, eval_iters=10**6)
    assert "--eval_iters" not in run_line(limited, 10**7, None, 1)


def test_a_time_has_a_readable_unit():
    seconds = [0, 1.26, 119, 150, 7200, 86400, 9e6]
    texts = ["0 s", "1.3 s", "120 s", "2.5 min", "2 h", "24 h", "100 days"]
    assert [*map(duration, seconds)] == texts


def test_an_amount_has_significant_digits_only():
    figures = [0.0264, 5.43, 98.6, 1094.0, 2.5243e20]
    assert [*map(amount, figures)] == ["0.026", "5.4", "99", "1,100", "2.52e20"]
    assert amount(1e6) == "1.00e6"
    assert math.isclose(float(amount(123456789.0)), 1.23e8)


def test_the_updates_that_fit_into_a_time_leave_room_for_their_evaluations():
    """With 9 evaluations, 18 % of the FLOPs of `small` are theirs; with 2, they outweigh a few."""
    config, n_val = with_vocab_size(PRESETS["small"]), 111_540

    def takes_s(n, step_s=0.02):
        train, evaluate = run_flops(dataclasses.replace(config, max_iters=n), n_val)
        return step_s * n * (1 + evaluate / train)

    for seconds in (3.0, 5.0, 20.0, 70.0, 4000.0):
        n = updates_within(config, n_val, seconds, 0.02)
        assert n % 10 == 0  # updates of a call
        assert takes_s(n) <= seconds < takes_s(n + 11)
    assert updates_within(config, n_val, 1e12, 1e-9) <= 2**30  # the most that can be counted
    for seconds in (-1.0, 1.0):
        assert updates_within(config, n_val, seconds, 0.02) == 0
    few = dataclasses.replace(config, eval_iters=1)
    assert updates_within(few, n_val, 1.0, 0.1) == 9
    large = with_vocab_size(PRESETS["shakespeare"])
    assert updates_within(large, n_val, 1000.0, 10.0) % 10 > 0  # a call makes one
    bigram = with_vocab_size(PRESETS["lecture-bigram"])
    assert updates_within(bigram, n_val, 10.0, 0.01) == 1000
