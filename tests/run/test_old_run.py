"""What an earlier version left is read, written from and gone on with: see make_old_run.py."""

import json
import shutil
from pathlib import Path

import make_old_run as old
import numpy as np
import pytest

from nanogpt_jax.run import plots as report

EXPECTED = json.loads((old.FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the run, beside its text, in the folder where its relative names lead to it."""
    shutil.copytree(old.FOLDER, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return Path("run")


@pytest.mark.parametrize("checkpoint", ["best", "latest"])
def test_an_old_run_has_the_logits_that_it_had(run, checkpoint):
    logits, expected = old.logits_of(run, checkpoint), EXPECTED["logits"][checkpoint]
    largest = np.abs(expected).max()  # which float32 rounds by 1e-6
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * largest)


def test_an_old_run_writes_the_text_that_it_wrote(run, capsys):
    assert old.told_by(old.sample.main, old.SAMPLE) == EXPECTED["sample"]
    assert capsys.readouterr().err == "run, step 120\n"


def test_an_old_run_is_reported_as_it_was(run):
    assert old.told_by(report.main, ["run"]).splitlines()[0] == EXPECTED["report"]


def test_an_old_run_goes_on_as_it_did(run):
    told = old.told_by(old.train.main, [*old.TRAIN, *old.GO_ON])
    assert f"going on with run from step {old.N_STEPS}" in told
    rows = [row for row in report.read_metrics(run) if row["step"] > old.N_STEPS]
    losses = [row["train_loss"] for row in rows]
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=0, atol=1e-5)
    assert "(best 0.7398 at step 120)" in told
