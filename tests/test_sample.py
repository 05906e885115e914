"""sample.py: from a run to text."""

import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_jax.errors import InputError
from nanogpt_jax.run.plots import read_metrics

ROOT = Path(__file__).parent.parent
SEPARATOR = "-" * 15 + "\n"
BLOCK_SIZE = 16
TEXT = "the cat sat on the mat and ate a rat, then it left.\n"


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = load("sample")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run under out/, trained for a moment."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "book.txt").write_text(40 * TEXT, encoding="utf-8")
    argv = [
        *("--config=tiny", "--n_layer=1", "--n_embd=16", f"--block_size={BLOCK_SIZE}"),
        *("--max_iters=60", "--eval_interval=20", f"--dataset={folder / 'book.txt'}"),
        *(f"--data_dir={folder / 'data'}", f"--out_dir={folder / 'out' / 'run'}"),
    ]
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    assert load("train").main(argv) == 0
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    return folder


@pytest.fixture
def write(home, monkeypatch, capsys):
    """Run sample.py in the run's home; return its samples, without the separators."""

    def run(*argv):
        monkeypatch.chdir(home)
        capsys.readouterr()
        assert sample.main([str(word) for word in argv]) == 0
        stdout = capsys.readouterr().out
        assert stdout.endswith("\n" + SEPARATOR)
        return stdout.split("\n" + SEPARATOR)[:-1]

    return run


def test_no_flag_gives_ten_different_samples(write):
    samples = write()
    assert len(samples) == len(set(samples)) == 10
    assert {character for text in samples for character in text} <= set(TEXT)


def test_no_flag_takes_the_newest_run_and_its_best_checkpoint(home, tmp_path, monkeypatch, capsys):
    """Of two runs, the one whose checkpoint is newer; of its checkpoints, the lowest val_loss."""
    for name in "older", "newer":
        shutil.copytree(home / "out" / "run", tmp_path / "out" / name)
    os.utime(tmp_path / "out" / "older" / "checkpoints", (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    sample.main(["--num_samples=1", "--max_new_tokens=1"])
    rows = [row for row in read_metrics(home / "out" / "run")[1:] if "val_loss" in row]
    best = min(rows, key=lambda row: row["val_loss"])["step"]
    assert f"{Path('out', 'newer')}, step {best}" in capsys.readouterr().err


def test_the_same_flags_give_the_same_text_and_another_seed_another(write):
    short = "--num_samples=2", "--max_new_tokens=48"
    assert write(*short) == write(*short)
    assert write(*short) != write(*short, "--seed=1")


def test_a_sample_is_the_same_however_many_are_drawn(write):
    assert write("--num_samples=3", "--max_new_tokens=48")[:2] == write(
        "--num_samples=2", "--max_new_tokens=48"
    )


def test_a_sample_is_the_start_and_as_many_new_characters_as_asked(write):
    texts = write("--start=the cat", "--num_samples=2", "--max_new_tokens=48")
    assert all(text.startswith("the cat") for text in texts)
    assert [len(text) for text in texts] == 2 * [len("the cat") + 48]


def test_a_start_can_come_from_a_file(write, tmp_path):
    path = tmp_path / "start.txt"
    path.write_text("the cat sat on the mat", encoding="utf-8")
    short = "--num_samples=2", "--max_new_tokens=48"
    assert write(*short, f"--start=FILE:{path}") == write(*short, "--start=the cat sat on the mat")


def test_a_start_can_come_from_standard_input(write, monkeypatch):
    short = "--num_samples=2", "--max_new_tokens=48"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    assert write(*short, "--start=-") == write(*short, "--start=the cat")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--start=the cat sat on the mat",),
        ("--top_k=3", "--top_p=0.9"),
        ("--stop=t l",),
        ("--exact_window",),
    ],
)
def test_streamed_text_is_the_same_text(write, more):
    flags = "--num_samples=2", "--max_new_tokens=48", *more
    assert write(*flags, "--stream") == write(*flags)


def test_temperature_zero_is_the_likeliest_text_each_time(write):
    first, second = write("--num_samples=2", "--max_new_tokens=48", "--temperature=0")
    assert first == second


def test_stop_ends_a_sample_before_its_first_occurrence(write):
    flags = "--num_samples=2", "--max_new_tokens=48", "--start=the cat"
    whole, stopped = write(*flags), write(*flags, "--stop=at")
    expected = ["the cat" + text.removeprefix("the cat").split("at")[0] for text in whole]
    assert stopped == expected
    assert stopped != whole


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_until_stops_though_the_stop_is_split_over_pieces(size):
    text = "abababc, and more"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(sample.until("abc", pieces)) == "abab"
    assert "".join(sample.until("nowhere", pieces)) == text
    assert "".join(sample.until("more!", pieces)) == text
    assert "".join(sample.until(None, pieces)) == text


def test_until_holds_back_no_more_than_it_must():
    seen = []

    def pieces():
        for piece in "abcdef":
            yield piece
            seen.append("".join(shown))

    shown = []
    for text in sample.until("xyz", pieces()):
        shown.append(text)
    assert seen == ["", "", "a", "ab", "abc", "abcd"]


def test_until_without_a_stop_shows_each_piece_at_once():
    assert list(sample.until(None, ["a", "b"]))[:2] == ["a", "b"]


def test_until_reads_no_further_than_the_stop():
    def pieces():
        yield from "ab"
        raise AssertionError("read on")

    assert "".join(sample.until("b", pieces())) == "a"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--start=the QZ cat"], "'Q', 'Z'"),
        (["--start="], "empty"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--out_dir=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_an_input_error(home, monkeypatch, argv, complaint):
    monkeypatch.chdir(home)
    with pytest.raises(InputError, match=complaint):
        sample.main([*argv, "--num_samples=1"])


def test_a_start_that_is_no_utf_8_is_told_with_its_byte(home, tmp_path):
    path = tmp_path / "start.txt"
    path.write_bytes(b"the \xff cat")
    with pytest.raises(InputError, match="position 4"):
        sample.main([f"--out_dir={home / 'out' / 'run'}", f"--start=FILE:{path}"])


def test_where_no_run_lies_the_error_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"train\.py"):
        sample.main([])


def test_a_run_without_a_tokenizer_cannot_be_sampled(home, tmp_path):
    shutil.copytree(home / "out" / "run", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        sample.main([f"--out_dir={tmp_path / 'run'}"])


def test_a_run_folder_is_all_that_is_needed(home, tmp_path, monkeypatch, capsys):
    """Moved elsewhere, without the text and the data it was made from."""
    shutil.copytree(home / "out" / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--out_dir=moved", "--num_samples=1", "--max_new_tokens=20"]) == 0
    assert capsys.readouterr().out.endswith(SEPARATOR)


def test_sampling_changes_nothing_in_the_run(home, write):
    def content():
        return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}

    before = content()
    write("--num_samples=1", "--max_new_tokens=5")
    assert content() == before


def test_text_without_end_goes_on_until_it_is_interrupted(home):
    argv = [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens=-1", "--stream"]
    with subprocess.Popen(
        argv, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        text = process.stdout.read(20 * BLOCK_SIZE)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert len(text) == 20 * BLOCK_SIZE
    assert set(text) <= set(TEXT)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_a_start_too_long_for_the_page_is_said_before_it_opens(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "long.txt").write_text("the cat " * 2000)
    with pytest.raises(
        InputError, match=r"start must have at most 10,000 .* --web, but has 16,000"
    ):
        sample.main(["--web", "--start", "FILE:long.txt"])
