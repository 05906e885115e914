"""The ladder, climbed on a few steps here, and in whole (slow) beside the lecture's losses."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest

from nanogpt_jax import corpora
from nanogpt_jax.config import LECTURE, PRESETS
from nanogpt_jax.errors import InputError
from nanogpt_jax.lecture import climb as lecture
from nanogpt_jax.run.plots import read_metrics

# Where a rung's loss may lie: as far from the lecture's as this.
WITHIN = 0.03


@pytest.fixture
def two_rungs(monkeypatch):
    monkeypatch.setattr(lecture, "LECTURE", LECTURE[:2])


def climb(tmp_path, book, capsys, *argv):
    lecture.main(
        ["--dataset", str(book), "--data_dir", str(tmp_path / "data"),
         "--out_dir", str(tmp_path / "out"), "--most_iters", "120", *argv]
    )  # fmt: skip
    return capsys.readouterr().out


def test_a_table_a_line_of_text_for_each_and_a_picture(tmp_path, book, capsys, two_rungs):
    told = climb(tmp_path, book, capsys)
    rows = dict(re.findall(r"^(\w+) +([\d,]+ +[\d.]+ +[\d.]+ +[-\d.]+) +\d+ s$", told, re.M))
    assert rows.keys() == {"bigram", "head"}
    n_params, train, val, published = rows["bigram"].split()
    assert (n_params, published) == (str(18 * 18), "-")  # the lecture had another text
    assert 1 < float(train) < float(val) + 0.5 < 4
    texts = dict(re.findall(r"^(bigram|head) +(\D.*)$", told, re.M))
    assert texts.keys() == rows.keys()
    assert all(len(text) > 60 for text in texts.values())
    assert (tmp_path / "out" / "ladder.png").stat().st_size > 20_000


def test_a_rung_learns_just_what_train_py_learns(tmp_path, book, capsys, run):
    """The same weights, batches and steps: a learner may take either."""
    folder = corpora.prepare(str(book), tmp_path / "data", 9)
    corpus = corpora.open_corpus(folder, 9)
    config = lecture.shortened(PRESETS["lecture-head"](), lecture.LectureConfig(most_iters=120))
    rung = lecture.climb(config, corpus, lambda n_steps: None)
    result = run(
        "train.py", "--config=lecture-head", "--max_iters=120", "--eval_interval=12",
        f"--dataset={book}",
        f"--out_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = [row["val_loss"] for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    np.testing.assert_allclose(rung.val_losses, losses, atol=1e-5)


def test_wrong_input_is_answered_in_one_line(tmp_path, book):
    with pytest.raises(InputError, match="most_iters must be at least 1"):
        lecture.main(["--most_iters=0"])
    for below in book, book / "deep":
        with pytest.raises(InputError, match="out_dir must be a folder"):
            lecture.main(["--out_dir", str(below)])


def test_interrupted_it_shows_what_was_climbed(tmp_path, book, capsys, two_rungs, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    rung = PRESETS["lecture-bigram"]()
    monkeypatch.setattr(lecture, "LECTURE", (lambda: rung, lambda: rung))
    real, calls = lecture.climb, []
    monkeypatch.setattr(
        lecture, "climb", lambda *args: interrupt() if calls else calls.append(1) or real(*args)
    )
    with pytest.raises(KeyboardInterrupt):
        climb(tmp_path, book, capsys)
    assert "The curves are drawn" in capsys.readouterr().out
    assert (tmp_path / "out" / "ladder.png").exists()


def test_the_lectures_losses_stand_beside_those_of_its_own_text_only():
    rung = lecture.Climbed(PRESETS["lecture-head"](), [0], [4.0], 4.0, {}, "", 1.0)
    on_shakespeare = rung._replace(published=lecture.PUBLISHED["lecture-head"])
    vocab = dataclasses.replace(rung.config.model, vocab_size=65)
    config = dataclasses.replace(rung.config, model=vocab)
    assert lecture.table_row(on_shakespeare._replace(config=config)).split()[4] == "2.41"
    short = dataclasses.replace(config, max_iters=100)
    assert lecture.table_row(on_shakespeare._replace(config=short)).split()[4] == "-"


@pytest.mark.slow
def test_the_whole_ladder_lands_where_the_lectures_did(tmp_path, monkeypatch):
    text = Path(os.environ.get("NANOGPT_JAX_SHAKESPEARE", ""))
    if not text.is_file():
        pytest.skip("NANOGPT_JAX_SHAKESPEARE names no file of tiny Shakespeare")
    found = {}

    def keep(climbed, folder):
        for rung in climbed:
            losses = dict(zip(rung.steps, rung.val_losses, strict=True))
            found[rung.config.config] = losses
            assert rung.published == lecture.PUBLISHED.get(rung.config.config, {})

    monkeypatch.setattr(lecture, "show", keep)
    lecture.main(["--dataset", str(text), "--data_dir", str(tmp_path)])
    last = {name: list(losses.values())[-1] for name, losses in found.items()}
    published = {name: of for name, of in lecture.PUBLISHED.items() if name != "lecture-scaled"}
    assert found.keys() == published.keys() | {"lecture-deep"}
    far = {name for name, of in published.items() if abs(last[name] - [*of.values()][-1]) > WITHIN}
    assert far == set()
    for step in 500, 2000:
        assert abs(found["lecture-colab"][step] - published["lecture-colab"][step]) < 0.04
    assert last["lecture-deep"] > last["lecture-feedforward"] > last["lecture-residual"]
