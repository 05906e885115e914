"""The figures of the benchmark: the same keys wherever it runs."""

import json
import subprocess
import sys

import pytest

from nanogpt_jax.bench import speed, step
from nanogpt_jax.errors import InputError

KEYS = {
    *("config", "device", "compute", "jax", "cores", "first_step_cold_s"),
    *("first_step_warm_cache_s", "parameters", "compile_s", "step_ms"),
    *("train_tokens_per_s", "train_flops_per_s", "matmul_peak_flops_per_s"),
    *("share_of_matmul_peak", "chip", "mfu", "train_peak_memory_bytes", "train_peak_memory_of"),
    *("train_compiled_bytes", "sample_tokens_per_s_1_stream", "sample_tokens_per_s_10_streams"),
    *("sample_tokens_per_s_streamed", "operations"),
}


@pytest.mark.slow
def test_one_json_object_with_all_figures_and_where_the_time_goes(tmp_path):
    """It is alone on standard output, so that a program can read it."""
    command = [sys.executable, "-m", "nanogpt_jax", "bench", "--config", "tiny", "--json"]
    command += ["--profile", "--mesh", "data=1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures.keys() == KEYS
    assert figures["chip"] is figures["mfu"] is None
    assert 0 < figures["share_of_matmul_peak"] < 1
    assert figures["train_compiled_bytes"] > 3 * 4 * figures["parameters"]
    assert 0 < sum(figures["operations"].values())
    assert list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_figures_that_are_not_wanted_are_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step, "REPEATS", 1)
    monkeypatch.setattr(speed, "matmul_peak_flops", lambda dtype: 1e15)
    speed.main(["--config=tiny", "--mesh=data=1", "--start=False", "--sampling=False"])
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    left_out = {key for key in KEYS if key.startswith(("first_step", "sample"))}
    assert shown == KEYS - left_out - {"operations"}


def test_a_misspelt_switch_gets_a_hint():
    with pytest.raises(InputError, match=r"there is no flag --jsn. Did you mean json"):
        speed.main(["--config=tiny", "--jsn"])
