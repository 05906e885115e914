"""Whole runs: stopped, killed and resumed ones end with the numbers of one straight through."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from runs import (
    N_STEPS,
    assert_same_run,
    command,
    content,
    copied,
    evaluated_steps,
    finish,
    numbers,
    saved_steps,
    signal_after_step,
    spawn,
    start,
    state_of,
    train,
    wait_for_step,
    write_dataset,
    write_tokenizer,
)

from nanogpt_jax import bench, corpora, data, errors
from nanogpt_jax.config import MODERN, parse_train_config, to_flat_dict
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.hardware import chips, devices, find_chip, memory
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run import progress, read_metrics
from nanogpt_jax.run.progress import Diverged, Progress
from nanogpt_jax.run.saving import Checkpoints

FILES = "config.json", "metrics.jsonl", "loss.png", "samples.txt", "tokenizer.json", "checkpoints"
BEGUN = 16  # the steps of the run that tests resume


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder of `.bin` files as they come from elsewhere, with their tokenizer."""
    folder = write_dataset(tmp_path_factory.mktemp("data") / "letters")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory, dataset):
    """The folder of a run that nothing interrupted. Not to be changed.

    Beside it are what it printed, and every state that it saved, copied at that moment.
    """
    folder, printed, saved = tmp_path_factory.mktemp("straight") / "run", io.StringIO(), {}
    save = Checkpoints.save

    def spy(self, state, val_loss=None):
        saved[int(state.step)] = jax.tree.map(lambda x: np.array(x, copy=True), state)
        save(self, state, val_loss)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(Checkpoints, "save", spy)
        assert start(folder, dataset, f"--max_iters={N_STEPS}") == 0
    return folder, printed.getvalue(), saved


@pytest.fixture(scope="module")
def begun(tmp_path_factory, dataset):
    """The folder of the same run after its first steps. Not to be changed."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert start(folder, dataset, f"--max_iters={BEGUN}") == 0
    return folder


@pytest.fixture(autouse=True)
def no_pictures(straight, monkeypatch):
    """Draw no picture after the first run's, which takes as long as the training."""
    monkeypatch.setattr(progress, "draw", lambda folder, title: None)


def test_a_run_makes_exactly_max_iters_updates_and_learns(straight):
    folder, _, _ = straight
    state = state_of(folder)
    assert state.step == N_STEPS
    counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0}
    assert counts == {N_STEPS}
    rows = numbers(folder)
    assert [row["step"] for row in rows] == [*range(N_STEPS + 1)]
    assert evaluated_steps(folder) == [0, 8, 16, 24, 32, 40]
    assert rows[0]["val_loss"] == pytest.approx(np.log(9), abs=0.1)
    assert rows[-1]["val_loss"] < 1.75
    assert len({row["lr"] for row in rows}) > 35  # warm-up and decay
    files = {path.name for path in folder.iterdir()}
    assert files == {*FILES}


def test_the_newest_and_the_best_checkpoint_are_kept(straight):
    folder, _, saved = straight
    losses = {row["step"]: row["val_loss"] for row in numbers(folder)[1:] if "val_loss" in row}
    assert saved.keys() == losses.keys()
    assert saved_steps(folder) == sorted({N_STEPS, min(losses, key=losses.get)})


def test_a_checkpoint_has_the_state_of_its_step(dataset, tmp_path, monkeypatch):
    """Training continues, in the same memory, while a checkpoint is written in the background."""
    saved, save = {}, Checkpoints.save

    def spy(self, state, val_loss=None):
        saved[int(state.step)] = jax.tree.map(lambda x: np.array(x, copy=True), state)
        save(self, state, 10 - val_loss)  # the first is the best, and so is kept

    monkeypatch.setattr(Checkpoints, "save", spy)
    start(tmp_path, dataset, "--max_iters=6", "--eval_interval=2")
    assert saved_steps(tmp_path) == [2, 6]
    for step in 2, 6:
        jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path, step), saved[step])


def test_the_seed_decides_what_is_trained_and_overwrite_starts_over(straight, dataset, tmp_path):
    folder, _, _ = straight
    start(tmp_path, dataset, "--max_iters=10", "--seed=1")
    pairs = zip(numbers(tmp_path), numbers(folder), strict=False)
    assert all(a["step"] == 0 or a["train_loss"] != b["train_loss"] for a, b in pairs)
    start(tmp_path, dataset, "--max_iters=8", "--overwrite")
    assert numbers(tmp_path) == numbers(folder)[:9]
    assert saved_steps(tmp_path) == [8]


def test_a_run_resumed_after_fewer_steps_equals_one_straight_through(
    straight, begun, dataset, tmp_path, capsys
):
    folder = copied(begun, tmp_path / "run")
    start(folder, dataset, f"--max_iters={N_STEPS}")
    assert f"resuming {folder} from step {BEGUN}" in capsys.readouterr().out
    assert_same_run(folder, straight[0])


@pytest.mark.slow
def test_a_modern_run_with_muon_resumes_as_one_straight_through(dataset, tmp_path):
    newer = [f"--{name}={value}" for name, value in MODERN.items()]
    newer += [
        "--dropout=0",
        "--optimizer=muon",
        "--schedule=wsd",
        "--warmup_iters=5",
        "--lr_decay_iters=20",
    ]
    start(tmp_path / "straight", dataset, "--max_iters=24", *newer)
    for n in 8, 24:
        start(tmp_path / "resumed", dataset, f"--max_iters={n}", *newer)
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    rows = numbers(tmp_path / "straight")
    assert rows[0]["val_loss"] == pytest.approx(np.log(9), abs=1e-5)  # its head is zero
    assert rows[-1]["val_loss"] < 1.75


@pytest.mark.slow
def test_float16_resumes_bit_for_bit_with_its_loss_scale(dataset, tmp_path):
    start(tmp_path / "straight", dataset, "--max_iters=24", "--dtype=float16")
    for n in 8, 24:
        start(tmp_path / "resumed", dataset, f"--max_iters={n}", "--dtype=float16")
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    state = state_of(tmp_path / "straight")
    assert read_metrics(tmp_path / "straight")[-1]["skipped_updates"] == state.skipped
    updates = {int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0}
    assert updates == {24 - int(state.skipped)}


@pytest.mark.parametrize("setting", errors.UNSUPPORTED)
@pytest.mark.slow
def test_a_debugging_setting_that_cannot_be_obeyed_is_named_in_a_line(
    dataset, tmp_path, setting, monkeypatch
):
    monkeypatch.setenv(*setting.split("="))
    code, _, err = finish(*command(tmp_path / "run", dataset, "--max_iters=2"), cwd=tmp_path)
    line = f"error: {setting} does not work with this command: unset it; JAX_DEBUG_NANS=1 works\n"
    assert (code, err) == (1, line)


@pytest.mark.slow
def test_it_trains_while_jax_looks_for_nan(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DEBUG_NANS", "1")
    code, _, err = finish(*command(tmp_path / "run", dataset, "--max_iters=2"), cwd=tmp_path)
    assert code == 0, err


def test_signals_save_and_the_same_command_resumes(straight, dataset, tmp_path, capsys):
    """After the first call, just before an evaluation, and between two."""
    for step, number in (4, signal.SIGINT), (16, signal.SIGTERM), (20, signal.SIGINT):
        with signal_after_step(step, number):
            assert start(tmp_path, dataset, f"--max_iters={N_STEPS}") == 128 + number
        assert f"stopped at step {step} and saved: the same command" in capsys.readouterr().out
        assert saved_steps(tmp_path)[-1] == step
    assert start(tmp_path, dataset, f"--max_iters={N_STEPS}") == 0
    assert "from step 20" in capsys.readouterr().out
    assert_same_run(tmp_path, straight[0])


def test_a_signal_stops_an_evaluation_which_is_repeated_after_resuming(
    straight, dataset, tmp_path, monkeypatch
):
    """That of a large corpus takes minutes; but the last one, the run's result, is not stopped."""
    folder, length, shares = tmp_path / "run", f"--max_iters={N_STEPS}", []
    evaluating = Progress.evaluating
    for at_step in 0, 16, N_STEPS:
        with monkeypatch.context() as patch:

            def spy(self, share, at_step=at_step):
                evaluating(self, share)
                if len(numbers(folder)) == at_step and share:
                    shares.append(share)
                    signal.raise_signal(signal.SIGTERM)

            patch.setattr(Progress, "evaluating", spy)
            code = start(folder, dataset, length)
        assert code == (0 if at_step == N_STEPS else 128 + signal.SIGTERM)
        assert saved_steps(folder)[-1] == at_step
        if at_step < N_STEPS:
            assert evaluated_steps(folder) == [*range(0, at_step, 8)]
    assert len(shares) >= 3
    assert all(0 < share < 1 for share in shares)
    assert_same_run(folder, straight[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_stopped_or_killed_process_resumes_where_it_was(dataset, tmp_path, number, exit_code):
    folder, straight = tmp_path / "stopped", tmp_path / "straight"
    with spawn(*command(folder, dataset, "--max_iters=1000000"), cwd=tmp_path) as process:
        wait_for_step(process, folder, 100)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert "Traceback" not in stderr
    latest = saved_steps(folder)[-1]
    if number != signal.SIGKILL:
        assert f"stopped at step {latest} and saved" in stdout
    end = f"--max_iters={(latest // 8 + 2) * 8}"
    start(folder, dataset, end)
    start(straight, dataset, end)
    assert_same_run(folder, straight)


def test_a_complete_run_says_so_and_changes_nothing(straight, dataset, capsys):
    folder, _, _ = straight
    before = content(folder)
    assert start(folder, dataset, f"--max_iters={N_STEPS}") == 0
    assert f"is complete: {N_STEPS} steps are done" in capsys.readouterr().out
    assert content(folder) == before


def test_a_run_that_differs_or_is_impossible_is_refused_and_left_alone(straight, dataset, tmp_path):
    """With --overwrite too: nothing is deleted until the new run is known to be possible."""
    folder, _, _ = straight
    before, length = content(folder), f"--max_iters={N_STEPS}"
    with pytest.raises(InputError, match=r"n_embd 16 -> 32; dropout 0.1 -> 0.2.*--overwrite"):
        start(folder, dataset, length, "--n_embd=32", "--dropout=0.2")
    other = write_dataset(tmp_path / "other", n_train=3001)
    with pytest.raises(InputError, match="another text"):
        start(folder, other, length, "--vocab_size=9")
    for flag in "--mesh=data=8", "--attention=splash":
        with pytest.raises(InputError, match="needs"):
            start(folder, dataset, length, "--overwrite", flag)
    assert content(folder) == before


def test_a_run_that_is_impossible_leaves_no_folder(dataset, tmp_path):
    with pytest.raises(InputError, match="batch_size must be a multiple of data x fsdp = 3"):
        start(tmp_path / "run", dataset, "--mesh=data=1,fsdp=3")
    with pytest.raises(InputError, match="attention cudnn needs a GPU, but this is a cpu"):
        start(tmp_path / "run", dataset, "--attention=cudnn")
    with pytest.raises(InputError, match="eval_only needs a run with a checkpoint"):
        start(tmp_path / "run", dataset, "--eval_only")
    short = write_dataset(tmp_path / "short", n_val=16)
    with pytest.raises(InputError, match=r"at least block_size \+ 1 = 17 tokens"):
        start(tmp_path / "run", short)
    assert not (tmp_path / "run").exists()


def test_the_process_exits_with_2_if_the_run_differs(straight, dataset, tmp_path):
    argv = command(straight[0], dataset, f"--max_iters={N_STEPS}", "--n_head=4")
    code, stdout, stderr = finish(*argv, cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert "n_head 2 -> 4" in stderr
    assert len(stderr.splitlines()) == 1


def test_overwrite_deletes_no_folder_that_is_not_a_run(dataset, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="must be empty or hold a run"):
        start(tmp_path, dataset, "--max_iters=2", "--overwrite")
    assert (tmp_path / "thesis.txt").exists()


def test_overwrite_empties_checkpoints_that_are_on_another_disk(begun, dataset, tmp_path, capsys):
    folder = copied(begun, tmp_path / "run")
    (folder / "checkpoints").rename(tmp_path / "disk")
    (folder / "checkpoints").symlink_to(tmp_path / "disk")
    assert start(folder, dataset, "--max_iters=2", "--learning_rate=0.01", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert f"emptying {tmp_path / 'disk'}, to which" in printed
    assert "resuming" not in printed
    assert (folder / "checkpoints").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["2"]


def test_what_overwrite_cannot_delete_is_an_error(begun, dataset, tmp_path, monkeypatch):
    folder = copied(begun, tmp_path / "run")

    def fail(path, *args, **kwargs):
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr("shutil.rmtree", fail)
    with pytest.raises(InputError, match=r"--overwrite must delete .*checkpoints cannot be del"):
        start(folder, dataset, "--max_iters=2", "--overwrite")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
def test_it_trains_with_its_output_closed(dataset, tmp_path):
    argv = [sys.executable, ROOT / "train.py", *command(tmp_path / "run", dataset, "--max_iters=2")]
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *map(str, argv)]
    assert subprocess.run(closed, cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "run" / "loss.png").exists()


def test_damaged_metrics_are_named_before_anything_is_written(begun, dataset, tmp_path):
    folder = copied(begun, tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 4,', '"step": "4",'))
    before = content(folder)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 5: must be like"):
        start(folder, dataset, f"--max_iters={N_STEPS}")
    assert content(folder) == before


def test_eval_only_prints_the_last_logged_loss_and_changes_nothing(
    straight, dataset, tmp_path, capsys
):
    folder, _, _ = straight
    before = content(folder)
    assert start(folder, dataset, f"--max_iters={N_STEPS}", "--eval_only") == 0
    val_loss = numbers(folder)[-1]["val_loss"]
    printed = capsys.readouterr().out
    assert f"step {N_STEPS}: val loss {val_loss:.4f} (" in printed
    assert re.search("^jax .* on cpu: float32", printed, re.MULTILINE)
    assert content(folder) == before
    unsaved = copied(folder, tmp_path / "unsaved")
    (unsaved / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"checkpoint, but {unsaved} has none"):
        start(unsaved, dataset, f"--max_iters={N_STEPS}", "--eval_only")


def test_other_intervals_leave_the_updates_alone_and_the_last_step_is_evaluated(
    straight, begun, dataset, tmp_path
):
    folder = copied(begun, tmp_path / "run")
    start(folder, dataset, f"--max_iters={N_STEPS}", "--eval_interval=7", "--log_interval=3")
    rows = {row["step"]: row for row in numbers(folder)}
    assert evaluated_steps(folder) == [0, 8, 16, 21, 28, 35, 40]
    assert [*rows] == [*range(17), 18, 21, 24, 27, 28, 30, 33, 35, 36, 39, 40]
    expected = numbers(straight[0])
    assert rows[40] == expected[40]
    assert rows[30] == expected[30]
    jax.tree.map(np.testing.assert_array_equal, state_of(folder), state_of(straight[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "dtype", "shown", "tolerance"),
    [
        ("data=2,fsdp=2", "float32", "4 x cpu (data 2, fsdp 2): float32", 1e-5),
        ("data=1", "float16", "cpu: float16 (as requested)", 0.02),
        ("fsdp=4", "float16", "4 x cpu (fsdp 4): float16", 0.02),
        ("tensor=2", "float32", "4 x cpu (data 2, tensor 2)", 1e-5),
    ],
)
def test_a_run_resumes_on_any_mesh_and_in_any_dtype(
    straight, begun, dataset, tmp_path, capsys, mesh, dtype, shown, tolerance
):
    folder = copied(begun, tmp_path / "run")
    start(folder, dataset, "--max_iters=24", f"--mesh={mesh}", f"--dtype={dtype}")
    rows, expected = numbers(folder), numbers(straight[0])
    for step in range(BEGUN, 25):
        loss = expected[step]["train_loss"]
        assert rows[step]["train_loss"] == pytest.approx(loss, abs=tolerance)
    assert rows[24]["val_loss"] == pytest.approx(expected[24]["val_loss"], abs=tolerance)
    assert shown in capsys.readouterr().out


def test_a_step_that_does_not_fit_is_refused_before_it_is_made(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 100_000)
    with pytest.raises(RunError, match=r"a step needs .* of 0 MiB on each device: try a sm"):
        start(tmp_path, dataset, "--max_iters=40")
    assert not saved_steps(tmp_path)
    assert not numbers(tmp_path)


def test_a_corpus_read_from_its_file_trains_the_same(
    straight, begun, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    folder = copied(begun, tmp_path / "run")
    start(folder, dataset, f"--max_iters={N_STEPS}")
    assert_same_run(folder, straight[0])


def test_a_diverging_run_stops_and_keeps_what_was_before(dataset, tmp_path):
    """The parameters grow ninefold a step: finite for some evaluations, then not."""
    wild = "--learning_rate=10 --weight_decay=1 --decay_lr=False --grad_clip=0 --dropout=0"
    wild = *wild.split(), "--eval_interval=2", "--max_iters=200"
    with pytest.raises(Diverged, match=r"at step \d+: .*, learning rate 10\. .* lower --l"):
        start(tmp_path, dataset, *wild)
    last = numbers(tmp_path)[-1]
    assert saved_steps(tmp_path)[-1] <= last["step"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state_of(tmp_path).params))


@pytest.mark.slow
def test_the_smallest_dataset_trains_without_its_tokenizer_and_resumes_with_it(tmp_path, capsys):
    """One window and one target a position; the tokenizer makes the vocabulary's padding known."""
    bins, folder = write_dataset(tmp_path / "bins", n_train=17, n_val=17), tmp_path / "run"
    argv = "--vocab_size=16", "--batch_size=1", "--eval_interval=2", "--dropout=0"
    assert start(folder, bins, *argv, "--max_iters=2") == 0
    assert f"--out_dir {folder}` writes more" in capsys.readouterr().out.splitlines()[-1]
    assert not (folder / "tokenizer.json").exists()
    assert start(folder, bins, *argv, "--max_iters=2", "--eval_only") == 0
    assert "16 tokens" in capsys.readouterr().out.splitlines()[-1]
    write_tokenizer(bins)
    assert start(folder, bins, *argv, "--max_iters=4") == 0
    assert f"resuming {folder} from step 2" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["known_tokens"]) == (16, 9)
    assert (folder / "tokenizer.json").exists()


@pytest.mark.slow
def test_minutes_become_a_number_of_updates_which_a_resumed_run_keeps(
    dataset, tmp_path, monkeypatch, capsys
):
    """In ten minutes, 52 updates of 10 s fit, with evaluations; then the run is like any other."""
    stopped, straight, n = tmp_path / "stopped", tmp_path / "straight", 52
    minutes = "--minutes=10", "--lr_decay_iters=None"
    monkeypatch.setattr(bench, "time_step", lambda config, machine, tokens: (2.0, 10.0))
    with signal_after_step(20, signal.SIGINT):
        assert start(stopped, dataset, *minutes) == 128 + signal.SIGINT
    assert f"{n} updates of 10,000.0 ms fit, with" in capsys.readouterr().out
    config = json.loads((stopped / "config.json").read_text())
    assert (config["max_iters"], config["lr_decay_iters"], config["minutes"]) == (n, n, 10)
    monkeypatch.setattr(bench, "time_step", None)  # it is not measured again
    with pytest.raises(InputError, match=r"lr_decay_iters.*or add --minutes 10, with which"):
        start(stopped, dataset, "--max_iters=60")
    assert start(stopped, dataset, *minutes) == 0
    assert start(straight, dataset, f"--max_iters={n}", "--lr_decay_iters=None") == 0
    assert_same_run(stopped, straight)
    again = parse_train_config(["--config", str(stopped / "config.json")])
    assert (again.max_iters, again.minutes) == (n, 0)  # elsewhere, the same length
    with pytest.raises(InputError, match=r"minutes 10\.0 -> 20\.0"):
        start(stopped, dataset, "--minutes=20")
    capsys.readouterr()
    assert start(stopped, dataset, *minutes) == 0
    more = f"--minutes 0 --max_iters {2 * n} --lr_decay_iters {n}"
    assert f"{more} continues" in capsys.readouterr().out
    assert start(stopped, dataset, *minutes, *more.split()) == 0
    assert read_metrics(stopped)[-1]["step"] == 2 * n


def test_too_few_minutes_are_refused_before_anything_is_written(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "time_step", lambda *_: (60.0, 1.0))
    with pytest.raises(InputError, match="minutes must leave time for an update of 1 s"):
        start(tmp_path / "run", dataset, "--minutes=1")
    assert not (tmp_path / "run" / "config.json").exists()


def sampled_steps(folder):
    lines = (folder / "samples.txt").read_text().splitlines()
    return [int(re.match(r"step +(\d+): \S", line)[1]) for line in lines]


def test_each_evaluation_shows_what_the_model_writes(straight, begun, dataset, tmp_path):
    """The same after a kill between a checkpoint and its sample, or past the checkpoint."""
    folder, printed, _ = straight
    text = (folder / "samples.txt").read_text()
    assert set(text.splitlines()) <= set(printed.splitlines())
    steps = [row["step"] for row in read_metrics(folder) if "val_loss" in row and row["step"]]
    assert sampled_steps(folder) == steps
    assert len({line.partition(": ")[2] for line in text.splitlines()}) > 1
    end = printed[printed.index("like this:") + len("like this:\n") :]
    last = text.splitlines()[-1].partition(": ")[2]
    assert " / ".join(filter(None, end.splitlines())).startswith(last)
    for name, more in ("early", []), ("late", ["step     28: pass\xe9\n"]):
        path = copied(begun, tmp_path / name) / "samples.txt"
        kept = path.read_text().splitlines(True)
        path.write_text("".join([*kept, *more] if more else kept[:-1]), "latin-1")
        assert start(path.parent, dataset, f"--max_iters={N_STEPS}") == 0
        assert path.read_text() == text


def test_a_sample_that_fails_is_a_warning_and_none_may_be_wanted(
    dataset, tmp_path, monkeypatch, capsys
):
    assert start(tmp_path / "none", dataset, "--max_iters=8", "--sample_chars=0") == 0
    assert not (tmp_path / "none" / "samples.txt").exists()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Progress, "sampled", fail)
    monkeypatch.setattr(train.nanogpt_jax, "generate", fail)  # the last sample's, too
    assert start(tmp_path / "run", dataset, "--max_iters=16") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: a sample is missing: ") == 1
    assert "No space left" in printed


def test_scripts_can_read_the_result_of_a_run(straight):
    folder, printed, _ = straight
    found = dict(re.findall(r"^(\w+): (\S+)$", printed, re.MULTILINE))
    rows = read_metrics(folder)
    best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
    assert found["val_loss"] == f"{best['val_loss']:.4f}"
    assert found["bits_per_byte"] == f"{best['val_bits_per_byte']:.3f}"
    assert (found["best_step"], found["steps"]) == (f"{best['step']}", f"{N_STEPS}")
    config = json.loads((folder / "config.json").read_text())
    sizes = ("gradient_accumulation_steps", "batch_size", "block_size")
    assert int(found["tokens"]) == N_STEPS * math.prod(config[name] for name in sizes)
    assert float(found["seconds"]) == pytest.approx(rows[-1]["elapsed_s"], abs=5)
    rate = float(found["tokens"]) / float(found["seconds"])
    assert float(found["tokens_per_s"]) == pytest.approx(rate, rel=0.1)
    assert f"{int(found['parameters']):,} parameters" in printed
    assert found["folder"] == str(folder)


def test_the_run_ends_with_a_sample(straight):
    _, printed, _ = straight
    text = printed[printed.index("like this:") + len("like this:\n") :]
    assert len(text.removesuffix("\n")) == train.SAMPLE_TOKENS
    assert set(text) <= set("\nabcdefgh")


def test_the_config_of_a_run_repeats_it(straight):
    """`--config` takes the config.json that a run leaves."""
    folder, _, _ = straight
    config = json.loads((folder / "config.json").read_text())
    requested = parse_train_config(["--config", str(folder / "config.json")])
    flat = to_flat_dict(requested)
    same = config.keys() - {"made_with", "config", "out_dir"}
    assert {name: flat[name] for name in same} == {name: config[name] for name in same}
    corpus = corpora.Corpus("letters", {}, 9, None, "")
    assert run_folder.choose(requested, corpus) == folder


def test_a_known_chip_shows_its_cost_before_the_run_and_its_mfu(
    straight, dataset, tmp_path, capsys, monkeypatch
):
    """A chip that is not in the table says so in place of a wrong number."""
    folder, printed, _ = straight
    assert "FLOPs" in printed
    assert "MFU is not shown" in printed
    assert not any("mfu" in row for row in read_metrics(folder))
    h200 = find_chip("H200")
    monkeypatch.setattr(chips, "find_chip", lambda kind: h200)
    start(tmp_path, dataset, "--max_iters=4", "--eval_first=False")
    assert "at the 16-bit peak of 1 x H200" in capsys.readouterr().out
    rows = read_metrics(tmp_path)
    assert 0 < rows[-1]["mfu"] < 0.01
    assert evaluated_steps(tmp_path) == [4]


def test_an_unused_chip_is_named_and_the_compile_cache_set_before_training(
    begun, dataset, monkeypatch, capsys
):
    heard = []
    monkeypatch.setattr(
        devices, "warn_of_unused_chip", lambda: heard.append(capsys.readouterr().out)
    )
    monkeypatch.setattr(devices, "use_compile_cache", lambda *requested: heard.append(requested))
    for more in [], ["--eval_only"]:
        start(begun, dataset, f"--max_iters={BEGUN}", "--compile_cache=some/where", *more)
        assert heard == [("some/where", 1), ""]
        heard.clear()
        capsys.readouterr()
