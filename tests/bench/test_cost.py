"""What a run costs: totals against sums by hand, and what is printed."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from nanogpt_jax import corpora, data
from nanogpt_jax.bench import cost as accounting
from nanogpt_jax.bench import published as references
from nanogpt_jax.config import PRESETS, with_vocab_size
from nanogpt_jax.hardware import chips
from nanogpt_jax.hardware.flops import forward_flops_per_token, train_flops_per_token


def page(*argv, code=0, **kwargs):
    """Return what the command prints."""
    command = [sys.executable, "-m", "nanogpt_jax", "cost", *argv]
    result = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def line(text, beginning):
    return next(row for row in text.splitlines() if row.startswith(beginning))


@pytest.mark.parametrize(
    ("max_iters", "eval_interval", "n_evaluations"), [(10, 5, 3), (11, 5, 4), (3, 5, 2)]
)
def test_a_run_is_counted_batch_by_batch(tiny_config, max_iters, eval_interval, n_evaluations):
    config = dataclasses.replace(tiny_config, max_iters=max_iters, eval_interval=eval_interval)
    n_val, block_size = 1000, config.model.block_size
    offsets_NB, _ = data.eval_batches(np.zeros(n_val, np.uint16), block_size, config.batch_size)
    flops = accounting.run_flops(config, n_val)
    forward = forward_flops_per_token(config.model) * block_size
    assert flops.train == 3 * forward * config.batch_size * max_iters
    assert flops.evaluate == n_evaluations * offsets_NB.size * forward
    assert flops.total == flops.train + flops.evaluate


def test_evaluations_of_some_batches_cost_as_many(tiny_config):
    config = dataclasses.replace(tiny_config, max_iters=1, eval_iters=3)
    of_batch = forward_flops_per_token(config.model) * 8 * config.model.block_size
    assert accounting.run_flops(config, 10**9).evaluate == 2 * 3 * of_batch


def test_the_line_before_a_run_says_how_long_at_the_peak_of_all_devices(tiny_config):
    flops = accounting.run_flops(tiny_config, 1000).total
    told = accounting.run_line(tiny_config, 1000, chips.named("H200"), 4)
    assert f"{accounting.amount(flops)} FLOPs" in told
    assert f"{accounting.duration(flops / 4 / 989.4e12)} at the 16-bit peak of 4 x H200" in told


@pytest.mark.parametrize(("done", "n_evaluations"), [(0, 3), (1, 2), (5, 1), (6, 1), (10, 0)])
def test_a_run_that_goes_on_computes_what_is_left(tiny_config, done, n_evaluations):
    """The evaluation at the step from which it goes on was made before."""
    config = dataclasses.replace(tiny_config, max_iters=10, eval_interval=5, eval_iters=1)
    of_batch = forward_flops_per_token(config.model) * config.batch_size * config.model.block_size
    flops = accounting.run_flops(config, 10**6, done)
    assert flops.train == 3 * of_batch * (10 - done)
    assert flops.evaluate == n_evaluations * of_batch
    assert ("left of the run" in accounting.run_line(config, 10**6, None, 1, done)) == (done > 0)


def test_a_model_that_multiplies_nothing_says_so():
    config = with_vocab_size(PRESETS["lecture-bigram"]())
    assert "no FLOPs" in accounting.run_line(config, 1000, chips.named("H200"), 1)
    assert "no FLOPs" in page("--config=lecture-bigram")


def test_a_run_in_float32_is_marked_since_its_peaks_are_lower():
    for argv in ("--config=lecture-scaled",), ("--config=shakespeare", "--dtype=float32"):
        assert "multiplies in float32" in page(*argv)
    assert "multiplies in float32" not in page("--config=shakespeare")


def test_a_chip_that_is_not_in_the_table_gets_no_time(tiny_config):
    told = accounting.run_line(tiny_config, 1000, None, 1)
    assert "MFU is not shown" in told
    assert "peak of" not in told


def test_the_table_of_chips_is_arithmetic():
    """Hours from FLOPs and peak, kilowatt hours and dollars from hours."""
    rows = page("--config", "gpt2", "--mfu", "0.5")
    config = with_vocab_size(PRESETS["gpt2"]())
    total = accounting.run_flops(config, 2**62).total
    h100 = chips.named("H100")
    hours = total / (0.5 * h100.flops) / 3600
    name, peak, days, unit, kwh, dollars = line(rows, "H100").split()
    assert (name, peak, unit) == ("H100", "989.4", "days")
    assert float(days) == pytest.approx(hours / 24, rel=0.06)
    assert float(kwh) == pytest.approx(hours * 0.7, rel=0.06)
    assert float(dollars) == pytest.approx(hours * h100.dollars_per_hour, rel=0.06)
    assert line(rows, "TPU v5e").split()[-2] == "-"  # its power is not published


def test_what_does_not_fit_is_said():
    rows = page("--config=gpt2-xl")
    assert "does not fit" in line(rows, "T4")
    assert "does not fit" not in line(rows, "H200")


def test_evaluation_stands_apart_and_reads_the_split_of_the_dataset(tmp_path, book):
    def told(*argv):
        return line(page("--config=small", *argv, cwd=tmp_path), "its evaluations")

    assert "tiny Shakespeare's 111,540" in told()
    assert "as book.txt is not prepared here" in told("--dataset=book.txt")
    corpora.prepare(str(book), tmp_path / "data")
    assert "600 tokens" in told("--dataset=book.txt")
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "val.bin").write_bytes(bytes(2 * 4321))
    assert "4,321 tokens" in told("--dataset=bins")


def test_six_n_stands_beside_the_count():
    told = line(page("--config=shakespeare"), "a token of training")
    n = 10_646_784
    counted = train_flops_per_token(with_vocab_size(PRESETS["shakespeare"]()).model)
    assert f"{counted:,} FLOPs" in told
    assert f"6 N = {6 * n:,}" in told
    assert f"{6 * n / counted - 1:+.1%}" in told


def test_every_preset_has_its_page():
    for name, preset in PRESETS.items():
        config = accounting.CostConfig(**vars(with_vocab_size(preset())))
        told = str(accounting.cost_lines(config))
        assert all(chip in told for chip in accounting.TABLE) or name == "lecture-bigram"


@pytest.mark.parametrize("mfu", ["0", "1.5", "nan", "-1"])
def test_an_mfu_that_cannot_be_is_refused(mfu):
    assert page(f"--mfu={mfu}", code=2).startswith("error: mfu must be ")


def test_references_are_computed_from_their_configurations():
    rows = page("--reference")
    published, rule, counted, ratio = line(rows, "GPT-3 175B").split()[5:9]
    assert (published, ratio) == ("3.14e23", "1.03")
    assert float(rule) == pytest.approx(6 * 175e9 * 300e9, rel=0.01)
    assert float(counted) == pytest.approx(3.23e23, rel=0.005)  # attention's products on top
    for name, flops in ("GPT-1", 8.6e19), ("GPT-2 1.5B", 1.5e21), ("GPT-4", 2.1e25):
        assert float(line(rows, name).split(")")[1].split()[2]) == pytest.approx(flops, rel=0.05)
    assert line(rows, "a day of an RTX 3070 Ti").split()[9] == "1.88e18"
    assert line(rows, "GPT-1").split()[3] == "~1e11"  # OpenAI: 100 epochs of about 1e9 words
    gpt3 = next(run for run in references.RUNS if run.name.startswith("GPT-3 175B"))
    assert accounting.n_params_as_told(gpt3.model) == pytest.approx(174.6e9, rel=0.001)


def test_the_lectures_quarter_of_an_hour_is_put_into_proportion():
    told = " ".join(accounting.lecture_lines())
    config = with_vocab_size(PRESETS["lecture-scaled"]())
    train = 5000 * 64 * 256 * train_flops_per_token(config.model)
    evaluate = 11 * 400 * 64 * 256 * forward_flops_per_token(config.model)
    assert f"{accounting.amount(train)} to train and {accounting.amount(evaluate)}" in told
    assert f"{(train + evaluate) / (900 * 156e12):.1%} of that" in told
    assert "1.40e17" in told
    assert "0.50 US$" in told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (1.26, "1.3 s"), (119, "120 s"), (150, "2.5 min"), (7200, "2 h"),
     (86400, "24 h"), (9e6, "100 days")],
)  # fmt: skip
def test_a_time_has_the_unit_that_suits_it(seconds, told):
    assert accounting.duration(seconds) == told


def test_an_amount_has_the_digits_that_mean_something():
    figures = [0.0264, 5.43, 98.6, 1094.0, 2.5243e20]
    assert [*map(accounting.amount, figures)] == ["0.026", "5.4", "99", "1,100", "2.52e20"]
    assert accounting.amount(1e6) == "1.00e6"
    assert math.isclose(float(accounting.amount(123456789.0)), 1.23e8)


def test_a_run_that_mostly_evaluates_is_told_how_not_to(tiny_config):
    """As one begins on a laptop that has the validation split of a large corpus."""
    assert "--eval_iters 20" in accounting.run_line(tiny_config, 10**7, None, 1)
    assert "--eval_iters" not in accounting.run_line(tiny_config, 1000, None, 1)
    limited = dataclasses.replace(tiny_config, eval_iters=10**6)
    assert "--eval_iters" not in accounting.run_line(limited, 10**7, None, 1)
