"""Whole runs: stopped, killed and resumed ones end with the numbers of one straight through."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import layers_of

from nanogpt_jax import data, loader, sharding, steps
from nanogpt_jax.config import MODERN, ModelConfig, parse_train_config
from nanogpt_jax.corpora import Corpus
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.hardware import devices
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run.checkpoint import Checkpoints
from nanogpt_jax.run.plots import read_metrics
from nanogpt_jax.run.progress import Diverged, Progress

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)

SHAPE = [
    "--config=tiny",
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--dropout=0.1"),
    *("--batch_size=4", "--gradient_accumulation_steps=2", "--lr_decay_iters=200"),
    *("--eval_interval=40", "--log_interval=10", "--mesh=data=1"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder of `.bin` files as they come from elsewhere, with the tokenizer beside them."""
    folder = tmp_path_factory.mktemp("data") / "letters"
    write_dataset(folder, n_train=3000, n_val=200)
    (folder / "tokenizer.json").write_text('{"type": "char", "chars": "\\nabcdefgh"}')
    return folder


def write_dataset(folder, n_train, n_val):
    """Text that can be learnt: the same phrase with some letters changed."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in ("train", n_train), ("val", n_val):
        ids = np.tile([1, 2, 3, 4, 5, 4, 3, 6, 7, 8, 0], n // 11 + 1)[:n]
        noisy = np.where(rng.random(n) < 0.2, rng.integers(0, 9, n), ids)
        noisy.astype("<u2").tofile(folder / f"{split}.bin")


def command(folder, dataset, *more):
    return [*SHAPE, f"--dataset={dataset}", f"--out_dir={folder}", *map(str, more)]


@pytest.fixture(scope="module")
def start(dataset):
    """Run the command in this process."""

    def run(folder, *more, dataset=dataset):
        return train.main(command(folder, dataset, *more))

    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory, start):
    """The folder of a run of 200 steps that nothing interrupted. Not to be changed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert start(folder, "--max_iters=200") == 0
    return folder


def state_of(folder, step=None):
    config = parse_train_config(["--config", str(folder / "config.json")])
    init = partial(steps.init_state, GPT(config.model), make_optimizer(config.optim, 1))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    abstract = jax.eval_shape(init, jax.random.key(0))
    state = checkpoints.restore(sharding.on_one_device(abstract), prefer=step)
    checkpoints.close()
    return state


def numbers(folder):
    """The rows of metrics.jsonl without what the clock makes of them."""
    return [
        {name: x for name, x in row.items() if name not in ("tokens_per_s", "elapsed_s")}
        for row in read_metrics(folder)
    ]


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(folder, other):
    """Parameters, optimizer state and every logged loss are equal bit for bit."""
    assert numbers(folder) == numbers(other)
    jax.tree.map(np.testing.assert_array_equal, state_of(folder), state_of(other))


def raise_at(monkeypatch, step, number):
    """Send this process a signal while a step is under way."""
    dispatched = Progress.dispatched

    def spy(self, first, n_steps, *rest):
        dispatched(self, first, n_steps, *rest)
        if first <= step < first + n_steps:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "dispatched", spy)


def test_makes_exactly_max_iters_updates_and_learns(straight):
    state = state_of(straight)
    assert state.step == 200
    counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0}
    assert counts == {200}
    rows = numbers(straight)
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 40, 80, 120, 160, 200]
    assert [row["step"] for row in rows] == list(range(0, 201, 10))
    assert rows[0]["val_loss"] == pytest.approx(np.log(9), abs=0.1)
    assert rows[-1]["val_loss"] < 1.5
    files = {path.name for path in straight.iterdir()}
    assert files == {"config.json", "metrics.jsonl", "loss.png", "tokenizer.json", "checkpoints"}


def test_keeps_the_newest_and_the_best(straight):
    losses = {row["step"]: row["val_loss"] for row in numbers(straight)[1:] if "val_loss" in row}
    assert saved_steps(straight) == sorted({200, min(losses, key=losses.get)})


def test_two_runs_of_a_command_are_the_same_and_another_seed_is_not(straight, start, tmp_path):
    start(tmp_path / "same", "--max_iters=40")
    assert numbers(tmp_path / "same") == numbers(straight)[:5]
    start(tmp_path / "other", "--max_iters=40", "--seed=1")
    pairs = zip(numbers(tmp_path / "other"), numbers(straight), strict=False)
    assert all(a["step"] == 0 or a["train_loss"] != b["train_loss"] for a, b in pairs)


def test_going_on_after_fewer_steps_equals_straight_through(straight, start, tmp_path):
    start(tmp_path, "--max_iters=80")
    start(tmp_path, "--max_iters=200")
    assert_same_run(tmp_path, straight)


def test_a_modern_run_with_muon_goes_on_as_one_straight_through(start, tmp_path):
    newer = [f"--{name}={value}" for name, value in MODERN.items()]
    newer += [
        "--eval_interval=20",
        "--optimizer=muon",
        "--schedule=wsd",
        "--warmup_iters=5",
        "--lr_decay_iters=50",
    ]
    start(tmp_path / "straight", "--max_iters=60", *newer)
    for n in 40, 60:
        start(tmp_path / "resumed", f"--max_iters={n}", *newer)
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    rows = numbers(tmp_path / "straight")
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 20, 40, 60]
    assert rows[0]["val_loss"] == pytest.approx(np.log(9), abs=1e-5)  # its head is zero
    assert rows[-1]["val_loss"] < 1.5


def test_each_step_after_resuming_has_the_rate_and_the_batch_of_one_straight_through(
    start, tmp_path, monkeypatch
):
    seen = {}
    places = loader.TrainFeed.places

    def spy(self, n_steps):
        first, placed_NAB = self._step, places(self, n_steps)
        for step in range(first, first + n_steps):
            seen.setdefault(step, []).append(np.asarray(placed_NAB)[step - first])
        return placed_NAB

    monkeypatch.setattr(loader.TrainFeed, "places", spy)
    warms_up = "--warmup_iters=20", "--lr_decay_iters=30", "--log_interval=1"
    start(tmp_path / "straight", "--max_iters=40", *warms_up)
    for n in 13, 27, 40:
        start(tmp_path / "resumed", f"--max_iters={n}", *warms_up)
    for batches in seen.values():
        assert len(batches) >= 2
        assert all(np.array_equal(batches[0], other) for other in batches[1:])
    assert seen.keys() == set(range(40))
    rates = [
        {row["step"]: row["lr"] for row in read_metrics(tmp_path / name)}
        for name in ("straight", "resumed")
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0].values())) > 25


@pytest.mark.parametrize("step", [0, 79, 93])
def test_a_signal_saves_and_the_same_command_goes_on(
    straight, start, tmp_path, step, monkeypatch, capsys
):
    """At the first step, just before an evaluation, and between two."""
    with monkeypatch.context() as patch:
        raise_at(patch, step, signal.SIGINT)
        assert start(tmp_path, "--max_iters=200") == 130
    assert "the same command goes on" in capsys.readouterr().out
    stopped_at = saved_steps(tmp_path)[-1]
    assert step < stopped_at <= 120
    assert start(tmp_path, "--max_iters=200") == 0
    assert f"from step {stopped_at}" in capsys.readouterr().out
    assert_same_run(tmp_path, straight)


def begin(folder, dataset, *more):
    """Start a run in a process of its own, without end, and wait until it has made 100 steps."""
    argv = [sys.executable, str(ROOT / "train.py"), *command(folder, dataset, *more)]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    process = subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline_s = time.monotonic() + 120
    while not any(row["step"] >= 100 for row in read_metrics(folder)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_stopped_or_killed_process_goes_on_where_it_was(
    start, dataset, tmp_path, number, exit_code
):
    folder = tmp_path / "stopped"
    with begin(folder, dataset, "--max_iters=1000000") as process:
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert "Traceback" not in stderr
    latest = run_folder.saved_steps(folder / "checkpoints")[0]
    if number != signal.SIGKILL:
        assert f"stopped at step {latest}, and saved" in stdout
    end = (latest // 40 + 2) * 40
    start(folder, f"--max_iters={end}")
    start(tmp_path / "straight", f"--max_iters={end}")
    assert_same_run(folder, tmp_path / "straight")


@pytest.mark.parametrize("at_step", [0, 80])
def test_a_signal_stops_an_evaluation_which_is_made_when_the_run_goes_on(
    straight, start, tmp_path, monkeypatch, at_step
):
    """Of a large corpus an evaluation takes minutes."""
    folder, shares = tmp_path / "run", []
    evaluating = Progress.evaluating

    def spy(self, share):
        evaluating(self, share)
        if len(numbers(folder)) == at_step / 10 and not shares:
            shares.append(share)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "SECONDS_PER_DISPATCH", 0)  # a batch at a time
        patch.setattr(Progress, "evaluating", spy)
        assert start(folder, "--max_iters=200") == 128 + signal.SIGTERM
    assert 0 < shares[0] < 1
    assert saved_steps(folder)[-1] == at_step
    assert [row["step"] for row in numbers(folder) if "val_loss" in row] == list(
        range(0, at_step, 40)
    )
    assert start(folder, "--max_iters=200") == 0
    assert_same_run(folder, straight)


def test_a_complete_run_says_so_and_changes_nothing(start, tmp_path, capsys):
    start(tmp_path, "--max_iters=2")
    before = content(tmp_path)
    capsys.readouterr()
    assert start(tmp_path, "--max_iters=2") == 0
    assert "is complete: 2 steps are done" in capsys.readouterr().out
    assert content(tmp_path) == before


def test_a_run_of_another_shape_is_refused_and_left_alone(straight, start):
    before = content(straight)
    with pytest.raises(InputError, match=r"n_embd 16 -> 32; dropout 0.1 -> 0.2") as error:
        start(straight, "--max_iters=200", "--n_embd=32", "--dropout=0.2")
    assert "--overwrite" in str(error.value)
    assert content(straight) == before


def test_the_process_exits_with_2_where_the_run_differs(straight, dataset, run):
    done = run("train.py", *command(straight, dataset, "--max_iters=200", "--n_head=4"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "n_head 2 -> 4" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_text_is_refused(straight, start, tmp_path):
    write_dataset(tmp_path / "other", n_train=3001, n_val=200)
    with pytest.raises(InputError, match="another text"):
        start(straight, "--max_iters=200", "--vocab_size=9", dataset=tmp_path / "other")


def test_overwrite_starts_anew(start, tmp_path):
    start(tmp_path, "--max_iters=40")
    start(tmp_path, "--max_iters=20", "--seed=1", "--overwrite")
    assert [row["step"] for row in numbers(tmp_path)] == [0, 10, 20]
    assert saved_steps(tmp_path) == [20]


def test_overwrite_deletes_no_folder_that_is_not_a_run(start, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="must be empty or hold a run"):
        start(tmp_path, "--max_iters=2", "--overwrite")
    assert (tmp_path / "thesis.txt").exists()


def test_damaged_metrics_are_named_before_anything_is_written(straight, start, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 40', '"step": "40"'))
    before = content(folder)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 5: must be like"):
        start(folder, "--max_iters=240")
    assert content(folder) == before


def test_eval_only_says_the_last_logged_loss_and_changes_nothing(straight, start, capsys):
    before = content(straight)
    assert start(straight, "--max_iters=200", "--eval_only") == 0
    val_loss = numbers(straight)[-1]["val_loss"]
    assert f"step 200: val loss {val_loss:.4f} (" in capsys.readouterr().out
    assert content(straight) == before


def test_eval_only_without_a_run_is_an_input_error(start, tmp_path):
    with pytest.raises(InputError, match="holds none"):
        start(tmp_path / "none", "--eval_only")
    assert not (tmp_path / "none").exists()


def test_eval_only_before_the_first_checkpoint_is_an_input_error(start, tmp_path):
    start(tmp_path, "--max_iters=2")
    for path in (tmp_path / "checkpoints").glob("*"):
        path.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="checkpoint"):
        start(tmp_path, "--max_iters=2", "--eval_only")


def test_the_last_step_is_evaluated_and_saved_even_off_the_interval(start, tmp_path):
    start(tmp_path, "--max_iters=25", "--eval_interval=10", "--log_interval=1000")
    assert [row["step"] for row in numbers(tmp_path)] == [0, 10, 20, 25]
    assert saved_steps(tmp_path)[-1] == 25


def test_another_rhythm_of_evaluations_leaves_the_updates_alone(straight, start, tmp_path):
    start(tmp_path, "--max_iters=40")
    start(tmp_path, "--max_iters=200", "--eval_interval=35", "--log_interval=20")
    rows = {row["step"]: row for row in numbers(tmp_path)}
    evaluated = [step for step, row in rows.items() if "val_loss" in row]
    assert evaluated == [0, 40, 70, 105, 140, 175, 200]
    assert rows[200] == numbers(straight)[-1]
    assert rows[160]["train_loss"] == numbers(straight)[16]["train_loss"]
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path), state_of(straight))


def test_a_run_may_go_on_on_any_mesh_and_in_any_type(straight, start, tmp_path, capsys):
    start(tmp_path, "--max_iters=40")
    start(tmp_path, "--max_iters=80", "--mesh=data=2,fsdp=2")
    rows, expected = ({r["step"]: r for r in read_metrics(f)} for f in (tmp_path, straight))
    for step in range(50, 90, 10):
        assert rows[step]["train_loss"] == pytest.approx(expected[step]["train_loss"], abs=1e-5)
    assert rows[80]["val_loss"] == pytest.approx(expected[80]["val_loss"], abs=1e-5)
    start(tmp_path, "--max_iters=120", "--mesh=fsdp=4", "--dtype=float16")
    last = read_metrics(tmp_path)[-1]
    assert last["val_loss"] == pytest.approx(expected[120]["val_loss"], abs=0.02)
    told = capsys.readouterr().out
    assert "4 x cpu (data 2, fsdp 2): float32" in told
    assert "4 x cpu (fsdp 4): float16 (as asked)" in told


def test_a_mesh_that_cannot_be_is_refused_and_nothing_written(start, tmp_path):
    with pytest.raises(InputError, match="batch_size must be a multiple of data x fsdp = 3"):
        start(tmp_path / "run", "--mesh=data=1,fsdp=3")
    with pytest.raises(InputError, match="attention cudnn needs a GPU, but this is a cpu"):
        start(tmp_path / "run", "--attention=cudnn")
    assert not (tmp_path / "run").exists()


def test_overwrite_keeps_the_old_run_where_the_new_one_cannot_be(start, tmp_path):
    start(tmp_path, "--max_iters=2")
    before = content(tmp_path)
    for flag in ("--mesh=data=8", "--attention=splash"):
        with pytest.raises(InputError, match="needs"):
            start(tmp_path, "--max_iters=2", "--overwrite", flag)
    assert content(tmp_path) == before


def test_float16_goes_on_bit_for_bit_with_its_loss_scale(start, tmp_path):
    float16 = "--dtype=float16", "--learning_rate=0.01", "--log_interval=1"
    start(tmp_path / "straight", "--max_iters=60", *float16)
    start(tmp_path / "resumed", "--max_iters=40", *float16)
    start(tmp_path / "resumed", "--max_iters=60", *float16)
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")
    state = state_of(tmp_path / "straight")
    rows = read_metrics(tmp_path / "straight")
    assert rows[-1]["skipped_updates"] == state.skipped
    updates = {int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0}
    assert updates == {60 - int(state.skipped)}


def test_a_step_that_does_not_fit_is_refused_before_it_is_made(start, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "memory_bytes", lambda device: 100_000)
    with pytest.raises(RunError, match=r"a step needs .* of 0 MiB on each device: take a sm"):
        start(tmp_path, "--max_iters=40")
    assert not saved_steps(tmp_path)


def test_what_lies_on_the_disk_is_the_state_of_its_step(start, tmp_path):
    """Training goes on, in the same memory, while a checkpoint is written in the background."""
    start(tmp_path / "whole", "--max_iters=6", "--eval_interval=1")
    whole = saved_steps(tmp_path / "whole")
    for step in whole:
        start(tmp_path / str(step), f"--max_iters={step}", "--eval_interval=1")
        states = state_of(tmp_path / "whole", step), state_of(tmp_path / str(step), step)
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_corpus_read_from_its_file_trains_the_same(straight, start, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    start(tmp_path, "--max_iters=40")
    assert numbers(tmp_path) == numbers(straight)[:5]
    jax.tree.map(np.testing.assert_array_equal, state_of(tmp_path).step, np.int32(40))


def test_a_diverging_run_stops_and_keeps_what_was_before(start, tmp_path):
    """The parameters grow ninefold a step: finite for some evaluations, then not."""
    wild = "--learning_rate=10 --weight_decay=1 --decay_lr=False --grad_clip=0 --eval_interval=2"
    with pytest.raises(Diverged, match=r"at step \d+: .*, learning rate 10\. .* lower --l"):
        start(tmp_path, "--max_iters=200", *wild.split())
    last = numbers(tmp_path)[-1]
    assert saved_steps(tmp_path)[-1] <= last["step"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state_of(tmp_path).params))


def test_bins_without_a_tokenizer_train_and_no_sample_is_shown(start, tmp_path, capsys):
    write_dataset(tmp_path / "bins", n_train=3000, n_val=200)
    folder = tmp_path / "run"
    assert start(folder, "--max_iters=2", "--vocab_size=9", dataset=tmp_path / "bins") == 0
    assert "The run lies in" in capsys.readouterr().out.splitlines()[-1]
    assert not (folder / "tokenizer.json").exists()


def test_a_run_goes_on_when_its_corpus_has_got_its_tokenizer_meanwhile(start, tmp_path, capsys):
    """As where the hub could not be reached at first; from then on the padding is known as such."""
    write_dataset(tmp_path / "bins", n_train=600, n_val=60)
    short = ("--eval_interval=20", "--vocab_size=16")
    assert start(tmp_path / "run", *short, "--max_iters=20", dataset=tmp_path / "bins") == 0
    (tmp_path / "bins" / "tokenizer.json").write_text('{"type": "char", "chars": "\\nabcdefgh"}')
    assert start(tmp_path / "run", *short, "--max_iters=40", dataset=tmp_path / "bins") == 0
    assert "going on with" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vocab_size"], config["known_tokens"]) == (16, 9)


@pytest.mark.parametrize(
    ("architecture", "vocab_size", "known_tokens", "expected"),
    [
        ("gpt", 16, 9, 9),
        ("gpt", 9, 9, None),
        ("gpt", 16, None, None),
        ("bigram", 16, 9, None),  # its head knows no padding
    ],
)
def test_a_model_knows_its_padding(architecture, vocab_size, known_tokens, expected):
    model = ModelConfig(**layers_of(architecture))
    corpus = Corpus("bins", {}, vocab_size, None, "", known_tokens)
    found = train.with_vocabulary(model, corpus)
    assert (found.vocab_size, found.known_tokens) == (vocab_size, expected)


def test_the_run_ends_with_a_sample(start, tmp_path, capsys):
    start(tmp_path, "--max_iters=2")
    stdout = capsys.readouterr().out
    text = stdout[stdout.index("writes more:") + len("writes more:\n") :]
    assert len(text.removesuffix("\n")) == train.SAMPLE_TOKENS
    assert set(text) <= set("\nabcdefgh")


def test_the_smallest_splits_and_the_smallest_batch(start, tmp_path, capsys):
    """block_size + 1 tokens: one window, and one evaluation of block_size targets."""
    write_dataset(tmp_path / "bins", n_train=17, n_val=17)
    more = "--max_iters=2", "--vocab_size=9", "--batch_size=1"
    assert start(tmp_path / "run", *more, dataset=tmp_path / "bins") == 0
    assert start(tmp_path / "run", *more, "--eval_only", dataset=tmp_path / "bins") == 0
    assert "16 tokens" in capsys.readouterr().out.splitlines()[-1]


def test_a_split_shorter_than_a_window_is_refused_and_nothing_written(start, tmp_path):
    write_dataset(tmp_path / "bins", n_train=3000, n_val=16)
    with pytest.raises(InputError, match=r"at least block_size \+ 1 = 17 tokens"):
        start(tmp_path / "run", "--max_iters=2", dataset=tmp_path / "bins")
    assert not (tmp_path / "run").exists()


def test_the_config_of_a_run_repeats_it(straight, start, tmp_path):
    """`--config` takes the config.json that a run leaves."""
    config = json.loads((straight / "config.json").read_text())
    asked = parse_train_config(["--config", str(straight / "config.json")])
    same = {name for name in config if name not in ("made_with", "config", "out_dir")}
    flat = run_folder.to_flat_dict(asked)
    assert {name: flat[name] for name in same} == {name: config[name] for name in same}
    assert run_folder.choose(asked, "letters", "shakespeare_char") == straight


def test_a_known_chips_run_tells_its_cost_beforehand_and_its_mfu(
    tmp_path, start, capsys, monkeypatch
):
    """A chip that is not in the table says so in place of a wrong number."""
    start(tmp_path / "unknown", "--max_iters=10")
    assert "FLOPs" in (told := capsys.readouterr().out)
    assert "MFU is not shown" in told
    assert not any("mfu" in row for row in read_metrics(tmp_path / "unknown"))

    h200 = train.chips.find("NVIDIA H200")
    monkeypatch.setattr(train.chips, "find", lambda kind: h200)
    start(tmp_path / "known", "--max_iters=10")
    assert "at the 16-bit peak of 1 x H200" in capsys.readouterr().out
    assert 0 < read_metrics(tmp_path / "known")[-1]["mfu"] < 0.01
