"""The curves of runs, drawn alone and over each other."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from nanogpt_jax.config import TrainConfig, to_flat_dict
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import plots
from nanogpt_jax.run.plots import draw, loss_figure, read_metrics

TRAIN = [
    {"step": step, "train_loss": 3 - step / 50, "tokens_per_s": 9, "elapsed_s": step / 10}
    for step in range(0, 100, 5)
]
VAL = [
    {"step": step, "val_loss": 3 - step / 60, "tokens_per_s": 9, "elapsed_s": step / 10}
    for step in (0, 50, 100)
]


@pytest.fixture
def make_run(tmp_path):
    def make(name, rows=TRAIN + VAL, **fields):
        folder = tmp_path / name
        folder.mkdir()
        config = to_flat_dict(TrainConfig()) | fields | {"made_with": {}}
        (folder / "config.json").write_text(json.dumps(config))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(lines)
        return folder

    return make


def curves(figure) -> dict[str, np.ndarray]:
    """The points of each curve that the legend names."""
    lines = figure.axes[0].get_lines()
    named = {line.get_label(): line.get_xydata() for line in lines}
    return {name: points for name, points in named.items() if not name.startswith("_")}


def test_the_picture_is_drawn_from_whatever_there_is(make_run):
    for i, rows in enumerate([VAL, TRAIN[:1], []]):
        folder = make_run(str(i), rows)
        draw(folder, "a run")
        picture = (folder / "loss.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 8_000


def test_any_name_is_drawn_as_it_is_written_and_without_a_word(make_run):
    """About a font without its characters, or an invalid formula, matplotlib would complain."""
    rows = [row | {"x": row["step"]} for row in TRAIN + VAL]
    folder = make_run("a")
    draw(folder, "日本 $x^2_{$ a $ \udcff a\nb")
    assert (folder / "loss.png").stat().st_size > 8_000
    figure = loss_figure(dict.fromkeys(("日本", "$x^2_{$", "a $", "�", "a\nb"), rows))
    plots.save_figure(figure, folder / "several.png")


def test_one_run_shows_both_curves_and_its_best():
    rows = [row | {"x": row["step"]} for row in TRAIN + VAL]
    figure = loss_figure({"a run": rows})
    shown = curves(figure)
    np.testing.assert_allclose(shown["validation"], [(r["step"], r["val_loss"]) for r in VAL])
    assert len(shown["train (running mean)"]) == len(TRAIN)
    assert figure.axes[0].texts[0].get_text() == "best 1.3333\nat step 100"


def test_the_running_mean_is_that_of_the_rows_around():
    losses = np.random.default_rng(0).normal(3, 1, 300)
    smooth = plots.running_mean(losses)
    assert smooth[0] == losses[0]
    assert smooth[1] == pytest.approx(losses[:3].mean())
    assert smooth[150] == pytest.approx(losses[140:161].mean())
    assert smooth[-1] == pytest.approx(losses[-1])


def test_the_picture_of_a_million_steps_is_drawn_in_seconds_and_without_a_word(make_run):
    """It is redrawn while the run waits; matplotlib's search for a free corner took long."""
    rng = np.random.default_rng(0)
    rows = [
        {"step": 20 * i, "train_loss": loss, "tokens_per_s": 9, "elapsed_s": i}
        for i, loss in enumerate(rng.normal(3, 1, 50_000))
    ]
    folder = make_run("a", [row | {"val_loss": 3} for row in rows[::200]] + rows)
    begun_s = time.perf_counter()
    draw(folder, "a run")
    assert time.perf_counter() - begun_s < 10


@pytest.mark.parametrize(
    ("x", "last"), [("step", 100), ("tokens", 100 * 3 * 5 * 1024), ("time", 10.0)]
)
def test_several_runs_are_drawn_over_each_other(make_run, x, last):
    fields = {"batch_size": 3, "gradient_accumulation_steps": 5, "block_size": 1024}
    worse = [row | {"val_loss": row["val_loss"] + 1} if "val_loss" in row else row for row in VAL]
    folders = [make_run("a", **fields), make_run("b", TRAIN + worse, **fields)]
    shown = curves(loss_figure({f.name: plots.read_run(f, x) for f in folders}, x))
    assert shown.keys() == {"a: best 1.3333", "b: best 2.3333"}
    assert shown["a: best 1.3333"][-1, 0] == last
    np.testing.assert_allclose(shown["b: best 2.3333"][:, 1] - shown["a: best 1.3333"][:, 1], 1)


def test_the_command_prints_a_line_for_each_run_and_where_the_picture_is(
    make_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    make_run("a"), make_run("b")
    plots.main(["a", "b", "--x", "time"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("a  best val loss 1.3333 at step 100; 100 steps in 10 s")
    assert printed[2] == "drawn to out/report.png"
    assert (tmp_path / "out" / "report.png").stat().st_size > 8_000
    plots.main(["a"])
    assert (tmp_path / "a" / "loss.png").exists()
    plots.main(["a", "--picture", "new folder/it.svg"])
    assert (tmp_path / "new folder" / "it.svg").exists()


WRONG = [
    ([], "name the folder of at least one run"),
    (["nowhere"], "nowhere is not a run: there is no nowhere/config.json"),
    (["empty"], "empty has logged nothing yet"),
    (["a", "--x", "loss"], "loss"),
    (["a", "--y", "loss"], "there is no flag --y"),
    (["a", "--picture", "it.doc"], "it.doc cannot be written"),
    (["a", "--picture", "a/config.json/it.png"], "cannot be written"),
]


def test_wrong_input_is_refused(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("a"), make_run("empty", [])
    for argv, message in WRONG:
        with pytest.raises(InputError, match=message):
            plots.main(argv)


def test_the_command_does_without_jax(make_run):
    folder = make_run("a")
    script = (
        "import sys; from nanogpt_jax.run import plots; plots.main(sys.argv[1:]); "
        "assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_last_line_that_was_cut_off_is_left_out(make_run):
    """By a kill anywhere in it, or by a power failure, which can leave zeros."""
    path = make_run("a") / "metrics.jsonl"
    whole = path.read_bytes()
    rows = read_metrics(path.parent)
    begin = whole[:-1].rindex(b"\n") + 1
    for cut in (whole[:begin], whole[: begin + 9], whole[:-3], whole[:begin] + bytes(512)):
        path.write_bytes(cut)
        assert read_metrics(path.parent) == rows[:-1]
    path.write_bytes(whole[:-1])
    assert read_metrics(path.parent) == rows


def test_another_line_that_is_no_row_is_named(make_run):
    path = make_run("a") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    bad = ["3", "[]", "{}", "null", "", "{", '{"step": 7}', "\x00"]
    for change in {"step": "7"}, {"step": 7.5}, {"step": True}, {"step": None}:
        bad.append(json.dumps(TRAIN[0] | change))
    for loss in None, "2.5", float("nan"), float("inf"), [2.5], 10**400:
        bad.append(json.dumps(VAL[0] | {"val_loss": loss}))
    message = r"metrics\.jsonl, line 5: must be like .* delete that line"
    for line in bad:
        path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
        for read in (read_metrics, lambda folder: plots.read_run(folder, "time")):
            with pytest.raises(InputError, match=message):
                read(path.parent)


def test_metrics_of_a_folder_without_any_are_none(tmp_path):
    assert read_metrics(tmp_path) == []


def test_among_several_folders_what_is_not_a_run_is_left_out(
    make_run, tmp_path, monkeypatch, capsys
):
    """As in out/*, where the last picture lies, and models that were exported."""
    monkeypatch.chdir(tmp_path)
    make_run("a"), make_run("b")
    (tmp_path / "report.png").write_bytes(b"")
    (tmp_path / "exported").mkdir()
    plots.main(["a", "report.png", "b", "exported"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "not a run, skipped: report.png, exported"
    assert [line[:2] for line in printed[1:3]] == ["a ", "b "]
    with pytest.raises(InputError, match="exported is not a run"):
        plots.main(["exported", "report.png"])


def test_bits_per_byte_are_shown_for_runs_that_know_them(make_run):
    rows = [row | {"val_bits_per_byte": row["val_loss"] / 2} for row in VAL]
    assert "best val loss 1.3333 (0.667 bits per byte)" in plots.describe(rows)
    assert "bits per byte" not in plots.describe(VAL)
