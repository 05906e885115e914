"""Unusual places for a run, and two trainings in one, each as the process that a user starts."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanogpt_jax.hardware import devices
from nanogpt_jax.run.plots import read_metrics

ROOT = Path(__file__).parent.parent
UNUSUAL = "a b/ü 日本 🎭"
TINY = [
    *("--config=tiny", "--n_layer=1", "--n_embd=16", "--block_size=16", "--dataset=book.txt"),
    *("--eval_interval=2", "--log_interval=1", "--mesh=data=1"),
]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, sample = load("train"), load("sample")
SHORT = "--num_samples=1", "--max_new_tokens=5", "--temperature=0"


def make_file(home):
    (home / "file").write_text("mine")
    return "file"


def make_place_below_a_file(home):
    return f"{make_file(home)}/run"


def make_link_to_nowhere(home):
    (home / "link").symlink_to("nowhere")
    return "link"


def make_link_to_itself(home):
    (home / "link").symlink_to("link")
    return "link"


REFUSED = {
    "file": (make_file, "must be a folder, but .*file is a file"),
    "below a file": (make_place_below_a_file, "must be a folder, but .*file is a file"),
    "link to nowhere": (make_link_to_nowhere, "must be a folder, but .*link is a link to nowhere"),
    "link to itself": (make_link_to_itself, "link: Too many levels of symbolic links"),
    "empty": (lambda home: "", "must be the path of a folder, got ''"),
    "long name": (lambda home: "a/" + 256 * "x", "must be a name that a file can have"),
    "long path": (lambda home: 25 * f"{160 * 'x'}/", "must be a name that a file can have"),
    "pattern": (lambda home: "run [1]", r"must have no \* \? or \[ in its whole path"),
    "no UTF-8": (lambda home: b"run \xff", "must be UTF-8, but is"),
}


def refusal(result) -> str:
    """The line on standard error of a process that refused, and wrote and printed nothing."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("place", REFUSED)
def test_an_out_dir_that_cannot_be_is_refused_in_a_line(run, book, place):
    make, told = REFUSED[place]
    out_dir = make(book.parent)
    before = sorted(book.parent.rglob("*"))
    flag = b"--out_dir=" + os.fsencode(out_dir)
    line = refusal(run("train.py", *TINY, os.fsdecode(flag), timeout=60))
    assert re.search(f"error: out_dir.*{told}", line)
    assert sorted(book.parent.rglob("*")) == before


def test_a_read_only_disk_is_refused_in_a_line(run, book, read_only):
    for place in read_only, read_only / "out" / "run":
        line = refusal(run("train.py", *TINY, f"--out_dir={place}", timeout=60))
        assert line == f"error: out_dir must be writable, but {read_only} is not"


@pytest.fixture
def start(book, monkeypatch):
    """Run train.py in this process, in the book's folder."""
    monkeypatch.chdir(book.parent)
    return lambda *argv: train.main([*TINY, *argv])


def command_shown(told: str) -> list[str]:
    """The arguments of the command that a training's end tells, as a shell would split it."""
    (command,) = re.findall(r"`python sample\.py(.*?)`", told, re.DOTALL)
    return shlex.split(command)


@pytest.mark.parametrize("out_dir", [UNUSUAL, "link/", "-{0} %s #$x^2_{$ line\n".ljust(200, "x")])
def test_a_run_in_an_unusual_place_goes_on_and_writes_as_its_end_tells(
    start, book, capsys, out_dir
):
    (book.parent / "elsewhere").mkdir()
    (book.parent / "link").symlink_to("elsewhere")
    assert start("--max_iters=2", f"--out_dir={out_dir}") == 0
    capsys.readouterr()
    assert start("--max_iters=4", "--lr_decay_iters=2", f"--out_dir={out_dir}") == 0
    told = capsys.readouterr().out
    assert "from step 2" in told
    assert [row["step"] for row in read_metrics(Path(out_dir))] == [0, 1, 2, 3, 4]
    assert sample.main([*command_shown(told), *SHORT]) == 0
    assert capsys.readouterr().err == f"{Path(out_dir)}, step 4\n"


def test_training_and_sampling_tell_of_a_chip_that_is_not_used_before_they_begin(
    start, capsys, monkeypatch
):
    told_until_then = []
    monkeypatch.setattr(
        devices, "warn_of_unused_chip", lambda: told_until_then.append(capsys.readouterr().out)
    )
    assert start("--max_iters=2", "--out_dir=run") == 0
    assert sample.main(["--out_dir=run", *SHORT]) == 0
    in_training, in_sampling = told_until_then
    assert "step" not in in_training
    assert "val loss" in in_sampling  # the end of the training
    assert "-----" not in in_sampling


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}])
def test_names_in_any_language_serve_in_every_locale_that_python_reads_as_utf_8(run, book, locale):
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
        told = out_dir or "out/日本-本-"
        assert told[0].removeprefix("--out_dir=") in done.stderr
    done = run("-m", "nanogpt_jax.run.plots", UNUSUAL, env=env, timeout=60, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"drawn to {UNUSUAL}/loss.png" in done.stdout


def test_names_that_the_locale_makes_unreadable_are_refused_with_what_helps(run, book):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = refusal(run("train.py", *TINY, "--out_dir=ü", env=os.environ | ascii_only, timeout=60))
    assert "PYTHONUTF8=1 in front" in line


# Two at once


@pytest.fixture
def trainer(book):
    """The process of a training without end in out/run, which has a checkpoint."""
    argv = [*TINY, "--max_iters=1000000", "--eval_interval=20", "--out_dir=out/run"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        cwd=book.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        process.argv, process.folder = argv, book.parent / "out" / "run"
        try:
            wait_for_steps(process, 60)  # so the first of 20 is whole
            yield process
        finally:
            process.kill()


def wait_for_steps(process, n_steps):
    """Wait until a training has made as many steps more."""
    rows = read_metrics(process.folder)
    until_step = n_steps + (rows[-1]["step"] if rows else 0)
    deadline_s = time.monotonic() + 120
    while not any(row["step"] >= until_step for row in read_metrics(process.folder)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.slow
def test_a_second_training_of_a_folder_is_refused_and_the_first_goes_on(run, trainer):
    for more in (), ("--overwrite",):
        line = refusal(run("train.py", *trainer.argv, *more, timeout=60))
        assert line == "error: out/run is being trained by another process: wait for it"
        wait_for_steps(trainer, 40)
    steps = [row["step"] for row in read_metrics(trainer.folder)]
    assert steps == list(range(len(steps)))  # nothing was deleted, and nothing written twice
    trainer.send_signal(signal.SIGTERM)
    told, complaints = trainer.communicate(timeout=60)
    assert trainer.returncode == 128 + signal.SIGTERM
    assert "and saved: the same command goes on" in told
    assert complaints.startswith("\nSIGTERM: saving, then stopping; ")


@pytest.mark.slow
def test_a_run_is_sampled_evaluated_and_drawn_while_it_is_trained(run, trainer):
    done = run("sample.py", *SHORT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("out/run, step ")
    done = run("-m", "nanogpt_jax.run.plots", "out/run", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out/run  best val loss ")
    done = run("train.py", *trainer.argv, "--eval_only", timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step \d+: val loss ", done.stdout, re.MULTILINE)
    wait_for_steps(trainer, 40)


@pytest.mark.slow
def test_a_training_that_was_killed_leaves_its_folder_free(run, trainer):
    trainer.kill()
    trainer.communicate(timeout=60)
    stopped_at = max(
        int(path.name) for path in trainer.folder.glob("checkpoints/*") if path.name.isdecimal()
    )
    more = f"--max_iters={stopped_at + 5}", "--lr_decay_iters=1000000"
    done = run("train.py", *trainer.argv, *more, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"going on with out/run from step {stopped_at}" in done.stdout
