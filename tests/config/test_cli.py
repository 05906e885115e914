"""What the commands answer before JAX is loaded: here it cannot even be imported."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanogpt_jax import corpora
from nanogpt_jax.config import PRESETS, parse_train_config
from nanogpt_jax.run import folder as run_folder

STUB_MESSAGE = "this jax cannot be imported"


@pytest.fixture(scope="session")
def without_jax(tmp_path_factory) -> dict[str, str]:
    """An environment in which importing JAX fails."""
    stub = tmp_path_factory.mktemp("stub")
    (stub / "jax").mkdir()
    (stub / "jax" / "__init__.py").write_text(f"raise ImportError({STUB_MESSAGE!r})\n")
    path = [str(stub), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture
def place(tmp_path, book) -> Path:
    """A folder with a prepared text, runs, and what a user may name by mistake."""
    for name, content in {
        "empty.txt": b"",
        "short.txt": b"too short for the block",
        "binary.txt": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" * 99,
        "latin.txt": b"caf\xe9 " * 999,
        "broken.json": b'{"n_layer": 4',
        "unknown.json": b'{"n_layers": 4}',
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, ids in {"cut": range(200), "past": [70] * 200}.items():
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            np.array(ids, "<u2").tofile(tmp_path / name / f"{split}.bin")
    (tmp_path / "cut" / "val.bin").write_bytes(bytes(399))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")

    corpus = corpora.open_corpus(corpora.prepare(str(book), tmp_path / "data"), 33)
    config = parse_train_config(["--config=tiny", "--n_layer=3", "--dropout=0.1"])
    model = replace(config.model, vocab_size=corpus.vocab_size)
    config = replace(config, model=model, optim=replace(config.optim, lr_decay_iters=60))
    for name in ("run", "run_of_bins"):
        run_folder.begin(tmp_path / name, config, corpus.fingerprint, {})
        (tmp_path / name / "checkpoints" / "9" / "params").mkdir(parents=True)
    corpora.save_tokenizer(corpus.tokenizer, tmp_path / "run")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def assert_answers_in_one_line(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    assert [part for part in parts if part not in result.stderr] == [], result.stderr
    assert result.stdout == ""
    assert result.returncode == 2


def test_here_jax_cannot_be_imported(run, place, without_jax):
    """Or nothing below would show that an answer came without it."""
    result = run("train.py", "--config=tiny", "--dataset=book.txt", env=without_jax)
    assert STUB_MESSAGE in result.stderr
    assert result.returncode == 1


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--n_layers=3", ["--n_layers", "n_layer"]),
        ("--device=cuda", ["--device", "JAX_PLATFORMS=cpu"]),
        ("config/train_gpt2.py", ["config/train_gpt2.py", "--config"]),
        ("--config=smal", ["'smal'", "Did you mean small?"]),
        ("--config=none.json", ["none.json", "cannot be read"]),
        ("--config=broken.json", ["broken.json", "must be a JSON file"]),
        ("--config=unknown.json", ["unknown.json", "'n_layers'", "Did you mean n_layer"]),
        ("--dataset=shakespear", ["'shakespear'", "Did you mean shakespeare or shakespeare_char?"]),
        ("--dataset=none.txt", ["'none.txt'"]),
        ("--dataset=empty.txt", ["empty.txt", "is empty"]),
        ("--dataset=short.txt", ["short.txt", "block_size + 1 = 33", "of 23"]),
        ("--dataset=book.txt --block_size=600", ["book.txt", "block_size + 1 = 601", "600"]),
        ("--dataset=binary.txt", ["binary.txt", "byte 8"]),
        ("--dataset=latin.txt", ["latin.txt", "byte 3 is 0xe9"]),
        ("--dataset=thesis", ["thesis", ".txt"]),
        ("--dataset=cut", ["val.bin", "399 bytes", "cut off"]),
        ("--dataset=past --vocab_size=65", ["train.bin", "65", "token 0 is 70"]),
        ("--dataset=book.txt --vocab_size=3", ["vocab_size", "got 3"]),
        ("--n_embd=10 --n_head=3", ["n_embd", "a multiple of n_head=3", "got 10"]),
        ("--n_embd=-4", ["n_embd", "at least 1", "got -4"]),
        ("--batch_size -1", ["batch_size", "at least 1", "got -1"]),
        ("--block_size=0", ["block_size", "at least 1", "got 0"]),
        ("--n_layer=four", ["--n_layer", "'four'"]),
        ("--max_iters", ["--max_iters needs a value"]),
        ("--dataset=book.txt --out_dir=book.txt", ["out_dir", "book.txt is a file"]),
        ("--dataset=book.txt --out_dir=book.txt/run", ["out_dir", "book.txt is a file"]),
        ("--dataset=latin.txt --out_dir=book.txt", ["out_dir", "book.txt is a file"]),
        ("--dataset=book.txt --out_dir=thesis", ["thesis", "must be empty or hold a run"]),
        (
            "--dataset=book.txt --out_dir=thesis --overwrite",
            ["thesis", "must be empty or hold a run"],
        ),
        ("--dataset=book.txt --out_dir=run", ["n_layer 3 -> 2; dropout 0.1 -> 0.0."]),
        ("--dataset=book.txt --out_dir=new --eval_only", ["--eval_only", "new"]),
    ],
)
def test_bad_input_to_training_is_answered_in_one_line(run, place, without_jax, argv, parts):
    before = contents(place)
    result = run("train.py", "--config=tiny", *argv.split(), env=without_jax)
    assert_answers_in_one_line(result, *parts)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("", ["no run lies under out/ yet", "python train.py"]),
        ("--out_dir=none", ["out_dir must hold a run", "none"]),
        ("--out_dir=thesis", ["out_dir must hold a run", "thesis"]),
        ("--out_dir=book.txt", ["out_dir must hold a run", "book.txt"]),
        ("--out_dir=run_of_bins", ["run_of_bins", "tokenizer.json"]),
        ("--out_dir=run --start=Zebra!", ["'!', 'Z'"]),
        ("--out_dir=run --start=FILE:none.txt", ["none.txt", "cannot be read"]),
        ("--out_dir=run --start=FILE:latin.txt", ["latin.txt", "UTF-8", "position 3"]),
        ("--top_p 0", ["top_p must be above 0 and at most 1, got 0.0"]),
        ("--top_k -1", ["top_k must be at least 0, got -1"]),
        ("--temperature -1", ["temperature", "at least 0", "got -1.0"]),
        ("--num_samples 0", ["num_samples", "at least 1", "got 0"]),
        ("--max_new_tokens -1", ["max_new_tokens", "--stream", "got -1"]),
        ("--temprature=1", ["--temprature", "Did you mean temperature?"]),
        ("--init_from=resume", ["init_from=resume", "leave it out"]),
        ("--checkpoint=first", ["'first'", "best", "latest"]),
    ],
)
def test_bad_input_to_sampling_is_answered_in_one_line(run, place, without_jax, argv, parts):
    before = contents(place)
    assert_answers_in_one_line(run("sample.py", *argv.split(), env=without_jax), *parts)
    assert contents(place) == before


def test_standard_input_that_is_not_utf8_is_answered_in_one_line(run, place, without_jax):
    """Python reads it strictly in most locales."""
    env = without_jax | {"PYTHONIOENCODING": "utf-8:strict"}
    with (place / "latin.txt").open("rb") as latin:
        result = run("sample.py", "--out_dir=run", "--start=-", stdin=latin, env=env)
    assert_answers_in_one_line(result, "start", "UTF-8")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("", ["one dataset must be named", "shakespeare_char"]),
        ("--force", ["one dataset must be named", "pydocs"]),
        ("shakespear", ["Did you mean shakespeare or shakespeare_char?"]),
        ("latin.txt", ["latin.txt", "byte 3 is 0xe9"]),
        ("empty.txt", ["empty.txt", "is empty"]),
        ("book.txt --vocab_size 300", ["vocab_size is that of --tokenizer bpe"]),
    ],
)
def test_bad_input_to_preparing_is_answered_in_one_line(run, place, without_jax, argv, parts):
    result = run("data/prepare.py", *argv.split(), env=without_jax)
    assert_answers_in_one_line(result, *parts)


def test_help_comes_quickly_and_names_every_preset(run, without_jax):
    """Seconds of work count, where waiting for other programs makes the clock's more."""
    best_s = float("inf")
    for _ in range(3):
        begun_s, begun = time.perf_counter(), os.times()
        result = run("train.py", "--help", env=without_jax)
        wall_s, ended = time.perf_counter() - begun_s, os.times()
        worked_s = sum(ended[2:4]) - sum(begun[2:4])  # of the child; Windows does not say it
        best_s = min(best_s, wall_s, worked_s or wall_s)
    assert result.returncode == 0
    assert result.stderr == ""
    assert best_s < 0.7
    for name, preset in PRESETS.items():
        assert f"  {name} " in result.stdout
        assert preset.__doc__ in result.stdout
    assert "--learning_rate FLOAT" in result.stdout


def test_help_shows_the_values_of_the_preset_it_is_asked_with(run, without_jax):
    result = run("train.py", "--config=shakespeare", "--help", "--n_layer=5", env=without_jax)
    assert result.returncode == 0
    lines = " ".join(result.stdout.split())
    assert "Width of the residual stream; a multiple of n_head. │ │ (default: 384)" in lines
    assert "Transformer blocks. (default: 6)" in lines


def test_help_of_sampling_names_every_flag(run, without_jax):
    result = run("sample.py", "-h", env=without_jax)
    assert result.returncode == 0
    for flag in ("start", "num_samples", "max_new_tokens", "temperature", "top_p", "stop"):
        assert f"--{flag}" in result.stdout


def test_answers_can_be_piped_where_the_encoding_is_small(run, without_jax):
    """On Windows a pipe has a code page without the characters that boxes are drawn of."""
    env = without_jax | {"PYTHONIOENCODING": "cp1252"}
    result = run("train.py", "--help", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    usual, result = (run("train.py", "--n_layer=four", env=e) for e in (without_jax, env))
    assert_answers_in_one_line(result, "--n_layer", "'four'")
    assert result.stderr == usual.stderr


def test_every_command_starts_from_any_folder(run, tmp_path, without_jax):
    """The package is found beside the scripts or where it is installed, not where one stands."""
    (tmp_path / "elsewhere").mkdir()
    for script in ("train.py", "sample.py"):
        result = run(script, "--help", cwd=tmp_path / "elsewhere", env=without_jax)
        assert result.returncode == 0
    assert not any((tmp_path / "elsewhere").iterdir())
