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

import nanogpt_jax
from nanogpt_jax.errors import InputError

ROOT = Path(__file__).parent.parent
SEPARATOR = "-" * 15 + "\n"
BLOCK_SIZE = 16
SHORT = "--num_samples=2", "--max_new_tokens=48"  # compiled once for most tests
CHARS = "\n .acehmnost"


def import_sample():
    spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = import_sample()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run under out/: best at step 120, newest at step 140."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "tests" / "fixtures" / "run_v1" / "run", folder / "out" / "run")
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
    assert {character for text in samples for character in text} <= set(CHARS)


def test_no_flag_takes_the_newest_run_and_its_best_checkpoint(home, tmp_path, monkeypatch, capsys):
    """Of two runs, the one whose checkpoint is newer; of its checkpoints, the lowest val_loss."""
    for name in "older", "newer":
        shutil.copytree(home / "out" / "run", tmp_path / "out" / name)
    os.utime(tmp_path / "out" / "older" / "checkpoints", (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    sample.main([*SHORT])
    assert f"{Path('out', 'newer')}, step 120" in capsys.readouterr().err


def test_the_same_flags_give_the_same_text_and_another_seed_another(write):
    assert write(*SHORT) == write(*SHORT)
    assert write(*SHORT) != write(*SHORT, "--seed=1")


def test_a_sample_is_the_same_however_many_are_drawn(write):
    assert write("--num_samples=1", "--max_new_tokens=48") == write(*SHORT)[:1]


def test_a_sample_is_the_prompt_and_as_many_new_characters_as_requested(write):
    texts = write("--start=a cat", *SHORT)
    assert all(text.startswith("a cat") for text in texts)
    assert [len(text) for text in texts] == 2 * [len("a cat") + 48]


def test_a_prompt_can_come_from_a_file(write, tmp_path):
    path = tmp_path / "start.txt"
    path.write_text("a cat sat on a mat", encoding="utf-8")
    assert write(*SHORT, f"--start=FILE:{path}") == write(*SHORT, "--start=a cat sat on a mat")


def test_a_prompt_can_come_from_standard_input(write, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a cat")))
    assert write(*SHORT, "--start=-") == write(*SHORT, "--start=a cat")
    monkeypatch.setattr("sys.stdin", None)  # closed, as by <&- in a shell
    with pytest.raises(InputError, match="start must have at least one character, but is empty"):
        write(*SHORT, "--start=-")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--start=a cat sat on a mat",),
        ("--stop=t o",),
        ("--top_k=3", "--top_p=0.9", "--exact_window"),
    ],
)
def test_streamed_text_is_the_same_text(write, more):
    flags = *SHORT, *more
    assert write(*flags, "--stream") == write(*flags)


def test_temperature_zero_is_the_likeliest_text_each_time(write):
    first, second = write(*SHORT, "--temperature=0")
    assert first == second


def test_stop_ends_a_sample_before_its_first_occurrence(write):
    flags = *SHORT, "--start=a cat"
    whole, stopped = write(*flags), write(*flags, "--stop=at")
    expected = ["a cat" + text.removeprefix("a cat").split("at")[0] for text in whole]
    assert stopped == expected
    assert stopped != whole


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_until_stops_though_the_stop_is_split_over_pieces(size):
    text = "abababc, and more"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(nanogpt_jax.until("abc", pieces)) == "abab"
    assert "".join(nanogpt_jax.until("nowhere", pieces)) == text
    assert "".join(nanogpt_jax.until("more!", pieces)) == text
    assert "".join(nanogpt_jax.until(None, pieces)) == text


def test_until_holds_back_only_what_may_begin_the_stop():
    seen = []

    def pieces():
        for piece in "abcdef":
            yield piece
            seen.append("".join(shown))

    shown = []
    for text in nanogpt_jax.until("xyz", pieces()):
        shown.append(text)
    assert seen == ["", "", "a", "ab", "abc", "abcd"]


def test_until_without_a_stop_yields_each_piece_at_once():
    assert list(nanogpt_jax.until(None, ["a", "b"]))[:2] == ["a", "b"]


def test_until_reads_no_further_than_the_stop():
    def pieces():
        yield from "ab"
        raise AssertionError("read on")

    assert "".join(nanogpt_jax.until("b", pieces())) == "a"


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--start=a QZ cat"], "'Q', 'Z'"),
        (["--start="], "empty"),
        (["--start=FILE:nowhere.txt"], "nowhere.txt"),
        (["--out_dir=nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_refused_in_one_line(home, monkeypatch, argv, complaint):
    monkeypatch.chdir(home)
    with pytest.raises(InputError, match=complaint):
        sample.main([*argv, "--num_samples=1"])


def test_a_prompt_that_is_not_utf_8_is_refused_with_its_position(home, tmp_path):
    path = tmp_path / "start.txt"
    path.write_bytes(b"the \xff cat")
    with pytest.raises(InputError, match="position 4"):
        sample.main([f"--out_dir={home / 'out' / 'run'}", f"--start=FILE:{path}"])


def test_without_any_run_the_error_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"train\.py"):
        sample.main([])


def test_a_run_without_a_tokenizer_cannot_be_sampled(home, tmp_path):
    shutil.copytree(home / "out" / "run", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        sample.main([f"--out_dir={tmp_path / 'run'}"])


def test_a_run_folder_is_all_that_is_needed(home, tmp_path, monkeypatch, capsys):
    """It was moved, and its text and data are not there."""
    shutil.copytree(home / "out" / "run", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--out_dir=moved", *SHORT]) == 0
    assert capsys.readouterr().out.endswith(SEPARATOR)


def test_sampling_changes_nothing_in_the_run(home, write):
    def content():
        return {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}

    before = content()
    write(*SHORT)
    assert content() == before


def test_an_endless_stream_runs_until_it_is_interrupted(home):
    argv = [sys.executable, str(ROOT / "sample.py"), "--max_new_tokens=-1", "--stream"]
    with subprocess.Popen(
        argv, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        text = process.stdout.read(20 * BLOCK_SIZE)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert len(text) == 20 * BLOCK_SIZE
    assert set(text) <= set(CHARS)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def test_a_prompt_too_long_for_the_page_is_refused_before_it_opens(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "long.txt").write_text("a cat " * 2000)
    with pytest.raises(
        InputError, match=r"start must have at most 10,000 .* --web, but has 12,000"
    ):
        sample.main(["--web", "--start", "FILE:long.txt"])
