"""A run of an earlier version loads, samples, reports and resumes: see make_old_run.py."""

import json
import shutil
from pathlib import Path

import make_old_run as old
import numpy as np
import pytest

from nanogpt_jax.run import plots, read_metrics

EXPECTED = json.loads((old.FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the run, beside its text, in the folder where its relative names find it."""
    shutil.copytree(old.FOLDER, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return Path("run")


@pytest.mark.parametrize("checkpoint", ["best", "latest"])
def test_an_old_run_has_the_logits_that_it_had(run, checkpoint):
    logits, expected = old.logits_of(run, checkpoint), EXPECTED["logits"][checkpoint]
    largest = np.abs(expected).max()  # which float32 rounds by 1e-6
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * largest)


def test_an_old_run_writes_the_text_that_it_wrote(run, capsys):
    assert old.printed_by(old.sample.main, old.SAMPLE) == EXPECTED["sample"]
    assert capsys.readouterr().err == "run, step 120\n"


def test_an_old_run_is_reported_as_it_was(run):
    assert old.printed_by(plots.main, ["run"]).splitlines()[0] == EXPECTED["report"]


def test_an_old_run_resumes_as_it_did(run):
    printed = old.printed_by(old.train.main, [*old.TRAIN, *old.RESUME])
    assert f"resuming run from step {old.N_STEPS}" in printed
    rows = [row for row in read_metrics(run) if row["step"] > old.N_STEPS]
    losses = [row["train_loss"] for row in rows]
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=0, atol=1e-5)
    assert "(best 0.7398 at step 120)" in printed
