"""The race: times from the command on, medians that no miss can better, real runs of train.py."""

import math
from pathlib import Path

import pytest

from nanogpt_jax.bench import race
from nanogpt_jax.bench.race import Lap
from nanogpt_jax.config import PRESETS
from nanogpt_jax.errors import InputError


def lap(*val):
    return Lap([(0.5, 4.0), (1.0, 3.0)], list(val))


def test_a_target_is_reached_when_the_validation_loss_is_first_printed_at_or_below_it():
    run = lap((2.0, 2.5), (4.0, 1.89), (6.0, 1.95))
    assert run.reached_s(1.9) == 4.0
    assert run.reached_s(1.0) == math.inf


def test_the_twins_time_to_the_target_is_compared_with_the_presets_whole_time():
    laps = [lap((50.0, 2.0), (t, 1.9)) for t in (90.0, 100.0, 140.0)]
    fast_laps = [lap((t, 1.87)) for t in (9.0, 10.0, 12.0)]
    runs = {"small": laps, "small-fast, cold": fast_laps}
    whole, fast = race.summary(runs, 1.898).splitlines()
    assert "100.0 s (90.0 to 140.0) for all its steps" in whole
    assert "3 of 3 never" in whole
    assert "10.0 s (9.0 to 12.0) to 1.898, 1/10.0" in fast
    assert "never" not in fast


def test_a_run_that_never_reaches_the_target_does_not_better_the_median():
    runs = {"small": [lap((100.0, 1.9))], "small-fast": [lap((9.0, 1.95))]}
    fast = race.summary(runs, 1.898).splitlines()[1]
    assert "9.0 s" not in fast
    assert "never to 1.898; ends at 1.9500" in fast


@pytest.mark.parametrize("name", ["tiny", "smal", "small-fast"])
def test_a_preset_without_a_twin_cannot_race(name):
    with pytest.raises(InputError, match=r"race must be one of small, .*got"):
        race.main([name])
    with pytest.raises(InputError, match=r"race must be one of small, .*got"):
        race.main([f"--race={name}"])


def test_every_fast_preset_has_a_twin_and_a_target():
    fast = [name for name in PRESETS if name.endswith(race.TWIN)]
    assert {name.removesuffix(race.TWIN) for name in fast} == race.TARGETS.keys()


@pytest.mark.slow
def test_both_train_and_are_drawn(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}. " for i in range(2000)))
    monkeypatch.chdir(tmp_path)
    race.main([
        "small", "--seeds=1", "--target=3.5", f"--dataset={text}", "--max_iters=30",
        "--mesh=data=1",
    ])  # fmt: skip
    _, *runs, _, whole, cold, warm, drawn = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0].strip() for row in runs] == [
        "small", "small-fast, cold", "small-fast, warm"
    ]  # fmt: skip
    assert "for all its steps" in whole
    assert "to 3.5, 1/" in cold
    assert "to 3.5, 1/" in warm
    assert Path(drawn.removeprefix("drawn to ")).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag", ["--config=tiny", "--out_dir=x", "--compile_cache=x"])
def test_flags_that_the_race_sets_itself_are_refused(flag):
    with pytest.raises(InputError, match="must be left out: the race sets it itself"):
        race.main(["small", flag])


def test_the_picture_has_every_run():
    runs = {"small": [lap((2.0, 2.5), (4.0, 1.89))], "fast": [lap((1.0, 1.9))]}
    (axes,) = race.picture(runs, 1.898).axes
    assert {line.get_label() for line in axes.lines} >= {"small", "fast", "target 1.898"}
