"""The lecture's models trained for a few steps, and in full (slow) against its losses."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import train

from nanogpt_jax.config import LECTURE
from nanogpt_jax.errors import InputError
from nanogpt_jax.lecture import climb
from nanogpt_jax.run import read_metrics

# How far a model's loss may be from the lecture's.
WITHIN = 0.03
# Runs the climb, and keeps the losses in place of pictures.
KEEP = """
import json, sys
from nanogpt_jax.lecture import climb
def keep(climbed, folder):
    losses = {f"lecture-{model.name}": model.val_losses for model in climbed}
    with open("kept.json", "w") as file:
        json.dump(losses, file)
climb.show = keep
climb.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def compiled_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def two_models(monkeypatch):
    monkeypatch.setattr(climb, "LECTURE", LECTURE[:2])


def train_models(tmp_path, book):
    climb.main(
        ["--dataset", str(book), "--data_dir", str(tmp_path / "data"),
         "--out_dir", str(tmp_path / "out"), "--most_iters", "4"]
    )  # fmt: skip


@pytest.mark.slow
def test_the_climb_prints_losses_and_texts_draws_curves_and_learns_what_train_py_learns(
    tmp_path, book, capsys, two_models, monkeypatch
):
    """The same weights, batches and updates, whichever command a learner runs."""
    shown = []
    show = climb.show
    monkeypatch.setattr(climb, "show", lambda *args: (shown.append(args), show(*args)))
    train_models(tmp_path, book)
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\w+) +([\d,]+ +[\d.]+ +[\d.]+ +[-\d.]+) +\d+ s$", printed, re.M))
    assert rows.keys() == {"bigram", "head"}
    n_params, train_loss, val_loss, published = rows["bigram"].split()
    assert (n_params, published) == (str(18 * 18), "-")  # the lecture had another text
    assert 1 < float(train_loss) < float(val_loss) + 0.5 < 5
    texts = dict(re.findall(r"^(bigram|head) +(\D.*)$", printed, re.M))
    assert texts.keys() == rows.keys()
    assert all(len(text) > 60 for text in texts.values())
    assert (tmp_path / "out" / "ladder.png").stat().st_size > 20_000

    assert train.main([
        "--config=lecture-head", "--max_iters=4", "--eval_interval=1", "--mesh=data=1",
        f"--dataset={book}", f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}",
    ]) == 0  # fmt: skip
    rows = [row for row in read_metrics(tmp_path / "run") if "val_loss" in row]
    ((_, head), _), *_ = shown
    assert [*head.val_losses] == [row["step"] for row in rows]
    losses = [row["val_loss"] for row in rows]
    np.testing.assert_allclose([*head.val_losses.values()], losses, atol=1e-5)


def test_wrong_input_is_answered_in_one_line(tmp_path, book):
    with pytest.raises(InputError, match="most_iters must be at least 1"):
        climb.main(["--most_iters=0"])
    for below in book, book / "deep":
        with pytest.raises(InputError, match="out_dir must be a folder"):
            climb.main(["--out_dir", str(below)])


def climbed(**changes) -> climb.Climbed:
    """A model as if it were trained."""
    losses = {0: 4.0, 5000: 3.0}
    return climb.Climbed("head", 4225, losses, 4.0, {}, "text", 1.0)._replace(**changes)


def test_an_interrupted_climb_shows_the_models_trained_so_far(
    tmp_path, book, capsys, two_models, monkeypatch
):
    done = []

    def interrupt_the_second(config, corpus, advance):
        if done:
            raise KeyboardInterrupt
        done.append(config.config)
        return climbed()

    monkeypatch.setattr(climb, "climb", interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_models(tmp_path, book)
    assert done == ["lecture-bigram"]
    assert "The curves are in" in capsys.readouterr().out
    assert (tmp_path / "out" / "ladder.png").exists()


def test_the_lectures_losses_are_next_to_those_after_as_many_steps():
    model = climbed(published=climb.PUBLISHED["lecture-head"])
    assert climb.table_row(model).split()[4] == "2.41"
    assert climb.table_row(model._replace(val_losses={100: 3.0})).split()[4] == "-"


@pytest.mark.slow
def test_every_model_reaches_the_lectures_loss(run, tmp_path):
    text = Path(os.environ.get("NANOGPT_JAX_SHAKESPEARE", ""))
    if not text.is_file():
        pytest.skip("NANOGPT_JAX_SHAKESPEARE names no file of tiny Shakespeare")
    # In a process of its own, which has no flags against optimizing.
    (tmp_path / "kept.py").write_text(KEEP, encoding="utf-8")
    result = run(tmp_path / "kept.py", "--dataset", text, "--data_dir", tmp_path, timeout=1800)
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    found = {name: {int(step): loss for step, loss in of.items()} for name, of in kept.items()}
    last = {name: list(losses.values())[-1] for name, losses in found.items()}
    published = {name: of for name, of in climb.PUBLISHED.items() if name != "lecture-scaled"}
    assert found.keys() == published.keys() | {"lecture-deep"}
    far = {name for name, of in published.items() if abs(last[name] - [*of.values()][-1]) > WITHIN}
    assert far == set()
    for step in 500, 2000:
        assert abs(found["lecture-colab"][step] - published["lecture-colab"][step]) < 0.04
    assert last["lecture-deep"] > last["lecture-feedforward"] > last["lecture-residual"]
