"""The figures of the benchmark: the same keys wherever it runs."""

import json
import os
import subprocess
import sys

import pytest

from nanogpt_jax import data
from nanogpt_jax.bench import speed

KEYS = {
    *("config", "device", "compute", "jax", "cores", "first_step_cold_s"),
    *("first_step_warm_cache_s", "parameters", "compile_s", "step_ms"),
    *("train_tokens_per_s", "train_flops_per_s", "matmul_peak_flops_per_s"),
    *("share_of_matmul_peak", "chip", "mfu", "train_peak_memory_bytes", "train_peak_memory_of"),
    *("train_compiled_bytes", "sample_tokens_per_s_1_stream", "sample_tokens_per_s_10_streams"),
    "sample_tokens_per_s_streamed",
}


def figures_of(tmp_path, *argv):
    command = [sys.executable, "-m", "nanogpt_jax", "bench", "--config", "tiny", "--json", *argv]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.slow
def test_one_json_object_with_all_figures_and_where_the_time_goes(tmp_path):
    figures, table = figures_of(tmp_path, "--profile", "--mesh", "data=1")
    assert figures.keys() == KEYS
    assert figures["chip"] is figures["mfu"] is None
    assert 0 < figures["share_of_matmul_peak"] < 1
    assert figures["train_compiled_bytes"] > 3 * 4 * figures["parameters"]
    assert "ms a step" in table
    assert list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_memory_of_variants(tmp_path):
    figures, _ = figures_of(tmp_path, "--memory", "--vocab_size=5000", "--mesh", "data=1")
    plain, chunks = (figures[f"train_compiled_bytes_{name}"] for name in ("plain", "loss_chunks"))
    assert figures["train_compiled_bytes_as_configured"] == plain
    # 8 x 32 positions of 5000 logits in float32, and their gradient; an eighth of both remains.
    assert plain - chunks > 0.5 * 8 * 32 * 5000 * 4


def test_data_times_the_reading_of_a_corpus_from_its_shards(capsys, monkeypatch):
    monkeypatch.setattr(speed, "DATA_TOKENS", 20_000)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 2**18)
    monkeypatch.setattr("nanogpt_jax.corpora.tokens.CHECKED_BYTES", 2**18)
    pinned = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))
    speed.main(["--config=tiny", "--mesh=data=1", "--data", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert [len(cores) for cores in pinned] == [1]
    assert figures["data_shards"] == speed.DATA_FILES
    assert figures["data_bytes"] > 2**18, "or it would be stored on the device, and not read"
    for name in ("from_disk", "remembered"):
        assert figures[f"data_tokens_per_s_{name}"] > 0
    assert "step_ms" not in figures
