"""The report: what is measured, what is left out, and what it says."""

import json

import pytest

from nanogpt_jax import corpora
from nanogpt_jax.bench import measure, report
from nanogpt_jax.config import PRESETS
from nanogpt_jax.errors import InputError

STEP = {
    "device": "cpu", "compute": "float32", "jax": "0.12", "cores": 2, "mfu": None,
    "step_ms": 20.0, "train_tokens_per_s": 38_400.0, "share_of_matmul_peak": 0.5,
    "train_compiled_bytes": 2**29, "matmul_peak_flops_per_s": 2e11,
    "sample_tokens_per_s_1_stream": 9000.0, "sample_tokens_per_s_10_streams": 20_000.0,
    "sample_tokens_per_s_streamed": 4000.0,
    "first_step_cold_s": 6.0, "first_step_warm_cache_s": 3.0,
    "operations": {"dot": 0.015, "copy": 0.005}, "command": "-m nanogpt_jax bench",
}  # fmt: skip
RUN = {
    "train": [(3.0, 4.0), (4.0, 3.0)], "val": [(5.0, 2.0), (8.0, 1.89), (9.0, 1.95)],
    "first_step_s": 2.5, "whole_s": 10.0, "command": "train.py --config=small-fast",
}  # fmt: skip


def test_the_report_has_a_line_for_each_figure_with_its_command():
    found = {"small": STEP, "train small-fast": RUN, "gpt2": {"error": "left out, too long"}}
    text = "\n".join(report.lines(found, corpora.SHAKESPEARE))
    assert text.startswith("# Measured on cpu\n")
    for line in (
        "| a step of small | 20.00 ms, 38,400 tokens/s, 50.0% of the fastest matrix product; "
        "0.50 GiB | `python -m nanogpt_jax bench` |",
        "| sampling from small | 9,000 tokens/s in one stream, 20,000 in ten, 4,000 one by one |",
        "| first step of small | after 6.0 s; 3.0 s, cached |",
        "| train small-fast, on shakespeare_char | 1.898 (nanoGPT's) after 8.0 s; best validation "
        "loss 1.8900; 10 s in all, cold; first step after 2.5 s |",
        "Not measured: gpt2 (left out, too long).",
        f"{'dot':40}     15.000   75.0%",
    ):
        assert line in text
    never = {"train shakespeare": RUN}
    assert "1.4697 (nanoGPT's) never; best" in str(report.lines(never, corpora.SHAKESPEARE))


def test_another_text_than_shakespeare_has_no_target():
    text = "\n".join(report.lines({"train small-fast": RUN}, corpora.PYDOCS))
    assert "nanoGPT" not in text
    assert "best validation loss 1.8900" in text


def test_the_picture_has_the_times_that_nanogpt_takes_for_the_loss_of_the_laptops_preset():
    texts = [
        [text.get_text() for text in report.picture({f"train {name}": RUN}).axes[0].texts]
        for name in ("shakespeare-laptop", "small-fast")
    ]
    assert texts == [["nanoGPT's run,\nA100", "nanoGPT's run,\nColab T4"], []]


def test_every_preset_that_is_measured_exists_and_its_own_batch_comes_first():
    tasks = measure.tasks(measure.MeasureConfig(), "pydocs")
    assert {task.name for task in tasks if task.name.startswith("train ")} == {
        f"train {name}" for name in report.TARGETS
    }
    assert report.TARGETS.keys() <= PRESETS.keys()
    assert [task.name for task in tasks[:3]] == [*measure.BATCHES]
    assert {PRESETS[name].batch_size for name in measure.BATCHES} == {12, 64, 16}


def test_what_fails_stops_nothing_and_is_tried_again(tmp_path, monkeypatch, capsys, book):
    """What takes too long is left out; what was measured is not measured again."""
    monkeypatch.chdir(tmp_path)
    done, quick = [], {"small", "train small-fast"}

    def pretend(task, folder, timeout_s):
        done.append(task.name)
        if task.name == "train small-fast" and done.count(task.name) == 1:
            return {"error": "failed: it broke"}
        return dict(STEP if task.name == "small" else RUN)

    tasks = measure.tasks
    monkeypatch.setattr(measure, "measure", pretend)
    monkeypatch.setattr(measure, "tasks", lambda *args: [
        task._replace(flops=1 if task.name in quick else 1e20) for task in tasks(*args)
    ])  # fmt: skip
    monkeypatch.setattr(corpora, "resolve", lambda *args: book)
    for _ in range(2):
        assert measure.main(["--out_dir=report"]) == 0
    printed = capsys.readouterr().out
    assert done == ["small", "train small-fast", "train small-fast"]
    assert "gpt2: left out, it would take" in printed
    assert "failed: it broke" in printed
    assert "small: measured before" in printed
    found = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert found["small"]["step_ms"] == 20.0
    assert "whole_s" in found["train small-fast"]
    assert (tmp_path / "report" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "# Measured on cpu" in (tmp_path / "report" / "report.md").read_text()


def test_a_command_that_fails_says_why(tmp_path):
    def figures(name, *argv, timeout_s=100):
        return measure.measure(measure.Task(name, [*argv], 1), tmp_path, timeout_s)

    assert figures("x", "-c", "raise SystemExit('no GPU')") == {"error": "failed: no GPU"}
    killed = "import os; os.kill(os.getpid(), 9)"
    assert figures("x", "-c", killed) == {"error": "failed: killed by signal 9"}
    assert figures("x", "-c", "print('no JSON')")["error"].startswith("failed: Expecting value")
    slow = "import time; time.sleep(60)"
    assert figures("x", "-c", slow, timeout_s=0.1) == {"error": "failed: it took too long"}
    answer = figures("train x", "train.py", "--config=x")["error"]
    assert answer.startswith("failed: train.py failed: there is no preset 'x'")


def test_the_reason_is_the_error_and_not_what_jax_says_after_it():
    stderr = "Traceback\njax.errors.JaxRuntimeError: INTERNAL: no\n----\nFor simplicity, JAX has\n"
    assert measure.reason(stderr, 1) == "jax.errors.JaxRuntimeError: INTERNAL: no"


def test_figures_of_another_machine_or_version_are_measured_again(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert measure.read_rows(path) == {}
    path.write_text(json.dumps({"machine": measure.machine(), "rows": {"small": STEP}}))
    assert measure.read_rows(path) == {"small": STEP}
    path.write_text(json.dumps({"machine": {"jax": "0.1"}, "rows": {"small": STEP}}))
    assert measure.read_rows(path) == {}
    assert "measuring again" in capsys.readouterr().out
    for damaged in "", "[]", '{"rows": {}}':
        path.write_text(damaged)
        with pytest.raises(InputError, match="delete it to measure again"):
            measure.read_rows(path)


@pytest.mark.slow
def test_a_step_and_a_training_are_really_measured(tmp_path, monkeypatch, book):
    monkeypatch.setattr(report, "TARGETS", {"tiny": 2.0})
    monkeypatch.setattr(measure, "BATCHES", {"tiny": (8,)})
    monkeypatch.setattr(corpora, "resolve", lambda *args: book)
    monkeypatch.chdir(tmp_path)
    tasks = measure.tasks
    with_book = [f"--dataset={book}", "--mesh=data=1"]
    monkeypatch.setattr(measure, "tasks", lambda *args: [
        task._replace(argv=task.argv + (with_book if "train" in task.name else with_book[1:]))
        for task in tasks(*args)
    ])  # fmt: skip
    assert measure.main([]) == 0
    found = json.loads((tmp_path / "out" / "measured" / "report.json").read_text())["rows"]
    assert found["tiny"]["step_ms"] > 0
    assert found["train tiny"]["val"][-1][1] < found["train tiny"]["val"][0][1]
    assert 0 < found["train tiny"]["first_step_s"] < found["train tiny"]["whole_s"]
