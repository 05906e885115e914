"""The lecture's models trained for a few steps, and in full (slow) against its losses."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest

from nanogpt_jax import corpora
from nanogpt_jax.config import LECTURE, PRESETS, with_vocab_size
from nanogpt_jax.errors import InputError
from nanogpt_jax.lecture import climb
from nanogpt_jax.run import read_metrics

# How far a model's loss may be from the lecture's.
WITHIN = 0.03


@pytest.fixture
def two_models(monkeypatch):
    monkeypatch.setattr(climb, "LECTURE", LECTURE[:2])


def train_models(tmp_path, book, capsys, *argv):
    climb.main(
        ["--dataset", str(book), "--data_dir", str(tmp_path / "data"),
         "--out_dir", str(tmp_path / "out"), "--most_iters", "120", *argv]
    )  # fmt: skip
    return capsys.readouterr().out


def test_a_table_a_line_of_text_for_each_and_a_picture(tmp_path, book, capsys, two_models):
    printed = train_models(tmp_path, book, capsys)
    rows = dict(re.findall(r"^(\w+) +([\d,]+ +[\d.]+ +[\d.]+ +[-\d.]+) +\d+ s$", printed, re.M))
    assert rows.keys() == {"bigram", "head"}
    n_params, train, val, published = rows["bigram"].split()
    assert (n_params, published) == (str(18 * 18), "-")  # the lecture had another text
    assert 1 < float(train) < float(val) + 0.5 < 4
    texts = dict(re.findall(r"^(bigram|head) +(\D.*)$", printed, re.M))
    assert texts.keys() == rows.keys()
    assert all(len(text) > 60 for text in texts.values())
    assert (tmp_path / "out" / "ladder.png").stat().st_size > 20_000


def test_a_model_learns_just_what_train_py_learns(tmp_path, book, capsys, run):
    """The same weights, batches and updates, whichever command a learner runs."""
    folder = corpora.prepare(str(book), tmp_path / "data", 9)
    corpus = corpora.open_corpus(folder, 9)
    config = climb.shortened(PRESETS["lecture-head"], climb.LectureConfig(most_iters=120))
    model = climb.climb(config, corpus, lambda n_steps: None)
    result = run(
        "train.py", "--config=lecture-head", "--max_iters=120", "--eval_interval=12",
        f"--dataset={book}",
        f"--data_dir={tmp_path / 'data'}",
        f"--out_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = [row["val_loss"] for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    np.testing.assert_allclose(model.val_losses, losses, atol=1e-5)


def test_wrong_input_is_answered_in_one_line(tmp_path, book):
    with pytest.raises(InputError, match="most_iters must be at least 1"):
        climb.main(["--most_iters=0"])
    for below in book, book / "deep":
        with pytest.raises(InputError, match="out_dir must be a folder"):
            climb.main(["--out_dir", str(below)])


def climbed(preset="lecture-head", **changes) -> climb.Climbed:
    """A model as if it were trained."""
    config = with_vocab_size(PRESETS[preset])
    return climb.Climbed(config, [0, 5], [4.0, 3.0], 4.0, {}, "text", 1.0)._replace(**changes)


def test_an_interrupted_climb_shows_the_models_trained_so_far(
    tmp_path, book, capsys, two_models, monkeypatch
):
    done = []

    def interrupt_the_second(config, corpus, advance):
        if done:
            raise KeyboardInterrupt
        done.append(config.config)
        return climbed(config.config)

    monkeypatch.setattr(climb, "climb", interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_models(tmp_path, book, capsys)
    assert done == ["lecture-bigram"]
    assert "The curves are in" in capsys.readouterr().out
    assert (tmp_path / "out" / "ladder.png").exists()


def test_the_lectures_losses_are_next_to_those_after_as_many_steps():
    model = climbed(published=climb.PUBLISHED["lecture-head"])
    assert climb.table_row(model).split()[4] == "2.41"
    short = dataclasses.replace(model.config, max_iters=100)
    assert climb.table_row(model._replace(config=short)).split()[4] == "-"


@pytest.mark.slow
def test_every_model_reaches_the_lectures_loss(tmp_path, monkeypatch):
    text = Path(os.environ.get("NANOGPT_JAX_SHAKESPEARE", ""))
    if not text.is_file():
        pytest.skip("NANOGPT_JAX_SHAKESPEARE names no file of tiny Shakespeare")
    found = {}

    def keep(climbed, folder):
        for model in climbed:
            losses = dict(zip(model.steps, model.val_losses, strict=True))
            found[model.config.config] = losses
            assert model.published == climb.PUBLISHED.get(model.config.config, {})

    monkeypatch.setattr(climb, "show", keep)
    climb.main(["--dataset", str(text), "--data_dir", str(tmp_path)])
    last = {name: list(losses.values())[-1] for name, losses in found.items()}
    published = {name: of for name, of in climb.PUBLISHED.items() if name != "lecture-scaled"}
    assert found.keys() == published.keys() | {"lecture-deep"}
    far = {name for name, of in published.items() if abs(last[name] - [*of.values()][-1]) > WITHIN}
    assert far == set()
    for step in 500, 2000:
        assert abs(found["lecture-colab"][step] - published["lecture-colab"][step]) < 0.04
    assert last["lecture-deep"] > last["lecture-feedforward"] > last["lecture-residual"]
