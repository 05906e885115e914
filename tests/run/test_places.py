"""Runs in unusual places, and two trainings in one place."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import runs
from make_old_run import sample
from runs import saved_steps, spawn, train, wait_for_step, write_dataset, write_tokenizer

from nanogpt_jax import files
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.run import read_metrics

UNUSUAL = "a b/ü 日本 🎭"
TINY = [
    *("--config=tiny", "--n_layer=1", "--n_embd=16", "--block_size=16", "--dataset=book.txt"),
    *("--eval_interval=2", "--log_interval=1", "--mesh=data=1"),
]
SHORT = "--num_samples=1", "--max_new_tokens=5", "--temperature=0"


@pytest.fixture
def start(book, monkeypatch):
    """Run train.py in this process, in the book's folder."""
    monkeypatch.chdir(book.parent)
    return lambda *argv: train.main([*TINY, *argv])


def test_an_out_dir_that_cannot_be_is_refused_before_anything_is_written(start, capsys):
    """Even before the dataset is prepared, which can take hours."""
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    before = sorted(Path().rglob("*"))
    for out_dir in (
        *("file", "file/run", "link", "", "a/" + 256 * "x", 25 * f"{160 * 'x'}/", "run [1]"),
        os.fsdecode(b"run \xff"),
    ):
        with pytest.raises(InputError, match=r"^out_dir must (be|have) "):
            start(f"--out_dir={out_dir}")
    assert sorted(Path().rglob("*")) == before
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_in_an_unusual_place_resumes_and_is_sampled_by_the_command_it_prints(
    tmp_path, monkeypatch, capsys
):
    """In a shell too, whatever the folder's name, and through a link."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(write_dataset(Path("letters")))
    Path("elsewhere").mkdir()
    Path("-{0} %s").mkdir()
    Path("-{0} %s", "link").symlink_to("../elsewhere")
    out_dir = f"-{{0}} %s/link/{UNUSUAL} #$x^2_{{$ line\n".ljust(200, "x")
    assert runs.start(out_dir, "letters", "--max_iters=2") == 0
    capsys.readouterr()
    assert runs.start(out_dir, "letters", "--max_iters=4") == 0
    printed = capsys.readouterr().out
    assert "from step 2" in printed
    assert [row["step"] for row in read_metrics(Path(out_dir))] == [0, 1, 2, 3, 4]
    (command,) = re.findall(r"`python sample\.py(.*?)`", printed, re.DOTALL)
    assert sample.main([*shlex.split(command), *SHORT]) == 0
    assert capsys.readouterr().err == f"{out_dir}, step 4\n"


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}])
def test_names_in_any_language_work_in_every_locale_that_python_reads_as_utf_8(run, book, locale):
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | locale
    env = {
        name: value for name, value in env.items() if name not in ("XLA_FLAGS", "PYTHONIOENCODING")
    }
    home = book.parent
    (home / "日本.json").write_text(json.dumps({"config": "tiny", "n_layer": 1, "n_embd": 16}))
    book.rename(home / "本.txt")
    argv = [
        *TINY, "--max_iters=2", "--config=日本.json", "--dataset=本.txt", "--data_dir=ダ タ",
        "--compile_cache=プ ロ",
    ]  # fmt: skip
    for out_dir in (), (f"--out_dir={UNUSUAL}",):
        done = run("train.py", *argv, *out_dir, env=env, timeout=120, encoding="utf-8")
        assert (done.returncode, done.stderr) == (0, "")
        done = run("sample.py", *out_dir, *SHORT, env=env, timeout=120, encoding="utf-8")
        assert done.returncode == 0
        shown = out_dir[0].removeprefix("--out_dir=") if out_dir else "out/日本-本-"
        assert shown in done.stderr
    done = run("-m", "nanogpt_jax", "report", UNUSUAL, env=env, timeout=60, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"drawn to {UNUSUAL}/loss.png" in done.stdout


def test_a_name_that_the_locale_makes_unreadable_is_refused_with_a_remedy(run, book):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = refusal(run("train.py", *TINY, "--out_dir=ü", env=os.environ | ascii_only, timeout=60))
    assert "PYTHONUTF8=1" in line


def refusal(result) -> str:
    """The line on standard error of a process that refused, and printed nothing else."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line


# Two at once


@pytest.fixture
def trainer(book):
    """The process of a training without end in out/run, which has a checkpoint."""
    argv = [*TINY, "--max_iters=1000000", "--eval_interval=20", "--out_dir=out/run"]
    with spawn(*argv, cwd=book.parent) as process:
        process.argv, process.folder = argv, book.parent / "out" / "run"
        try:
            wait_for_steps(process, 60)  # so the first of 20 is complete
            yield process
        finally:
            process.kill()


def wait_for_steps(process, n_steps):
    """Wait until a training has made so many more steps."""
    rows = read_metrics(process.folder)
    wait_for_step(process, process.folder, n_steps + (rows[-1]["step"] if rows else 0))


@pytest.mark.slow
def test_a_second_training_of_a_folder_is_refused_and_the_first_continues(run, trainer):
    for more in (), ("--overwrite",):
        line = refusal(run("train.py", *trainer.argv, *more, timeout=60))
        assert line.startswith("error: out/run is being trained by another process: wait for it")
        wait_for_steps(trainer, 40)
    steps = [row["step"] for row in read_metrics(trainer.folder)]
    assert steps == list(range(len(steps)))  # nothing was deleted, and nothing written twice
    trainer.send_signal(signal.SIGTERM)
    _, err = trainer.communicate(timeout=60)
    assert trainer.returncode == 128 + signal.SIGTERM
    assert err.startswith("\nSIGTERM: saving, then stopping; ")
    assert not list(trainer.folder.glob(".*"))  # nor is its lock


@pytest.mark.slow
def test_a_run_is_sampled_evaluated_and_drawn_while_it_is_trained(run, trainer):
    done = run("sample.py", *SHORT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("out/run, step ")
    done = run("-m", "nanogpt_jax", "report", "out/run", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out/run  best val loss ")
    done = run("train.py", *trainer.argv, "--eval_only", timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^out/run, step \d+: val loss ", done.stdout, re.MULTILINE)
    wait_for_steps(trainer, 40)


@pytest.mark.slow
def test_a_training_that_was_killed_leaves_its_folder_free(run, trainer):
    trainer.kill()
    trainer.communicate(timeout=60)
    stopped_at = saved_steps(trainer.folder)[-1]
    more = f"--max_iters={stopped_at + 5}", "--lr_decay_iters=1000000"
    done = run("train.py", *trainer.argv, *more, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"resuming out/run from step {stopped_at}" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_moved_while_it_trains_says_so(tmp_path, monkeypatch):
    """Otherwise its next checkpoint would begin a folder without a config.json, which is no run."""
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("letters"))
    log = train.Run.log

    def move(self, step, metrics):
        log(self, step, metrics)
        if Path("run").exists():
            Path("run").rename("moved")

    monkeypatch.setattr(train.Run, "log", move)
    with pytest.raises(RunError, match=r"run must stay where it is .* its config\.json is gone: m"):
        runs.start("run", "letters", "--max_iters=16")
    monkeypatch.setattr(train.Run, "log", log)
    assert runs.start("moved", "letters", "--max_iters=16") == 0


@pytest.mark.slow
def test_evaluating_writes_nothing_and_needs_no_writable_folder(start, monkeypatch):
    assert start("--out_dir=run", "--max_iters=2") == 0

    def refuse(folder):
        raise InputError("out_dir must be writable")

    monkeypatch.setattr(files, "check_writable", refuse)
    assert start("--out_dir=run", "--max_iters=2", "--eval_only") == 0


@pytest.mark.slow
def test_a_text_whose_name_no_out_dir_may_have(start):
    Path("book.txt").rename("a [1]*.txt")
    assert start("--dataset=a [1]*.txt", "--max_iters=2") == 0
    (run,) = Path("out").iterdir()
    assert run.name.startswith("tiny-a _1]_-")
