"""What the commands answer without JAX, whose import fails here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanogpt_jax import corpora
from nanogpt_jax.config import PRESETS, parse_train_config, to_flat_dict
from nanogpt_jax.config.fields import replace_fields
from nanogpt_jax.config.presets import ABOUT

ROOT = Path(__file__).parents[2]
STUB_MESSAGE = "this jax cannot be imported"
TEXT = (200 * "the cat sat on the mat and ate a rat, then it left.\n")[:6000]

TRAINING = [
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
    ("--dataset=short.txt", ["short.txt", "block_size + 1 = 33", "23"]),
    ("--dataset=book.txt --block_size=600", ["book.txt", "block_size + 1 = 601", "600"]),
    ("--dataset=binary.txt", ["binary.txt", "byte 0 is 0x89"]),
    ("--dataset=latin.txt", ["latin.txt", "byte 3 is 0xe9"]),
    ("--dataset=thesis", ["thesis", ".txt"]),
    ("--dataset=cut", ["val.bin", "399 bytes", "cut off"]),
    ("--dataset=past --vocab_size=65", ["train.bin", "65", "token 0 is 70"]),
    ("--dataset=book.txt --vocab_size=3", ["vocab_size", "got 3"]),
    ("--n_embd=10 --n_head=3", ["n_embd", "a multiple of n_head=3", "got 10"]),
    ("--n_embd=-4", ["n_embd", "at least 1", "got -4"]),
    ("--batch_size -1", ["batch_size", "at least 1", "got -1"]),
    ("--block_size=0", ["block_size", "at least 1", "got 0"]),
    ("--n_layer=four", ["n_layer must be a whole number, got 'four'"]),
    ("--max_iters", ["--max_iters needs a value"]),
    ("--dataset=book.txt --out_dir=book.txt", ["out_dir", "book.txt is a file"]),
    ("--dataset=book.txt --out_dir=book.txt/run", ["out_dir", "book.txt is a file"]),
    ("--dataset=latin.txt --out_dir=book.txt", ["out_dir", "book.txt is a file"]),
    ("--dataset=book.txt --out_dir=thesis", ["thesis", "must be empty or hold a run"]),
    ("--dataset=book.txt --out_dir=thesis --overwrite", ["thesis", "must be empty or hold a run"]),
    ("--dataset=book.txt --out_dir=run", ["n_layer 3 -> 2; dropout 0.1 -> 0.0."]),
    ("--dataset=book.txt --out_dir=new --eval_only", ["eval_only", "new"]),
]
SAMPLING = [
    ("--out_dir=none", ["run", "none"]),
    ("--out_dir=thesis", ["run", "thesis"]),
    ("--out_dir=book.txt", ["run", "book.txt"]),
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
    ("--init_from=resume", ["init_from=resume", "not needed"]),
    ("--checkpoint=first", ["'first'", "best", "latest"]),
    ("", ["python train.py"]),
]
PREPARING = [
    ("", ["one dataset must be named", "shakespeare_char"]),
    ("--shard_tokens 9", ["one dataset must be named", "pydocs"]),
    ("book.txt latin.txt", ["one dataset must be named", "got 2"]),
    ("shakespear", ["Did you mean shakespeare or shakespeare_char?"]),
    ("latin.txt", ["latin.txt", "byte 3 is 0xe9"]),
    ("empty.txt", ["empty.txt", "is empty"]),
    ("book.txt --vocab_size 300", ["vocab_size must be left out without --tokenizer bpe, got 300"]),
]
WRONG = {"train.py": TRAINING, "sample.py": SAMPLING, "data/prepare.py": PREPARING}
CASES = [
    pytest.param(script, argv, parts, id=f"{script} {argv}")
    for script, cases in WRONG.items()
    for argv, parts in cases
]

# Runs commands one after the other in one process, as `python SCRIPT ARGV` would run each.
RUN_COMMANDS = """
import contextlib, importlib.util, io, json, sys
from nanogpt_jax.errors import run_command

mains, answers = {}, []
for script, argv in json.load(sys.stdin):
    if script not in mains:
        spec = importlib.util.spec_from_file_location("script", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules["script"] = module
        spec.loader.exec_module(module)
        mains[script] = module.main
    sys.argv = [script, *argv]
    out, err = (io.TextIOWrapper(io.BytesIO()) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(mains[script])
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = repr(error)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    answers.append([code, *texts])
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def without_jax(tmp_path_factory) -> dict[str, str]:
    """An environment in which importing JAX fails."""
    stub = tmp_path_factory.mktemp("stub")
    (stub / "jax").mkdir()
    (stub / "jax" / "__init__.py").write_text(f"raise ImportError({STUB_MESSAGE!r})\n")
    path = [str(stub), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a prepared text, runs, and files that a user may name by mistake."""
    folder = tmp_path_factory.mktemp("place")
    for name, content in {
        "book.txt": TEXT.encode(),
        "empty.txt": b"",
        "short.txt": b"too short for the block",
        "binary.txt": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" * 99,
        "latin.txt": b"caf\xe9 " * 999,
        "broken.json": b'{"n_layer": 4',
        "unknown.json": b'{"n_layers": 4}',
    }.items():
        (folder / name).write_bytes(content)
    for name, ids in {"cut": range(200), "past": [70] * 200}.items():
        (folder / name).mkdir()
        for split in ("train", "val"):
            np.array(ids, "<u2").tofile(folder / name / f"{split}.bin")
    (folder / "cut" / "val.bin").write_bytes(bytes(399))
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.tex").write_text("years of work")

    prepared = corpora.prepare(corpora.Request(str(folder / "book.txt"), folder / "data"))
    corpus = corpora.open_corpus(prepared, 33)
    config = parse_train_config(["--config=tiny", "--n_layer=3", "--dropout=0.1"])
    config = replace_fields(config, {"vocab_size": corpus.vocab_size, "lr_decay_iters": 60})
    made_with = {"made_with": {"dataset_fingerprint": corpus.fingerprint}}
    for name in ("run", "run_of_bins"):
        (folder / name / "checkpoints" / "9" / "params").mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(to_flat_dict(config) | made_with))
    tokenizer = (prepared / "tokenizer.json").read_bytes()
    (folder / "run" / "tokenizer.json").write_bytes(tokenizer)
    return folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {
        path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def answers(place, without_jax) -> dict:
    """(exit code, standard output, standard error) of each command of CASES."""
    commands = [(script, argv) for script, argv, _ in (case.values for case in CASES)]
    script_argv = [
        (str(ROOT / script), [*(["--config=tiny"] if script == "train.py" else []), *argv.split()])
        for script, argv in commands
    ]
    before = contents(place)
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS],
        input=json.dumps(script_argv), cwd=place, env=without_jax, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(place) == before  # a refused command writes nothing
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("script", "argv", "parts"), CASES)
def test_wrong_input_is_answered_in_one_line(answers, script, argv, parts):
    code, out, err = answers[script, argv]
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert [part for part in parts if part not in err] == [], err


def test_here_jax_cannot_be_imported(run, tmp_path, without_jax):
    """Otherwise the tests here would prove nothing."""
    (tmp_path / "book.txt").write_text(TEXT)
    result = run("train.py", "--config=tiny", "--dataset=book.txt", env=without_jax)
    assert STUB_MESSAGE in result.stderr
    assert result.returncode == 1


def test_standard_input_that_is_not_utf8_is_answered_in_one_line(run, place, without_jax):
    """In most locales Python decodes it strictly."""
    env = without_jax | {"PYTHONIOENCODING": "utf-8:strict"}
    with (place / "latin.txt").open("rb") as latin:
        result = run("sample.py", "--out_dir=run", "--start=-", stdin=latin, env=env, cwd=place)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: start: standard input: must be UTF-8 text, but ")
    assert result.stderr.count("\n") == 1


def test_help_comes_quickly_and_names_every_preset(run, without_jax, tmp_path):
    """On a slow machine, where 0.7 s are not enough, in 3.5 times what two libraries take.

    CPU seconds count: the clock includes waiting for other programs.
    """

    def seconds(*command: str) -> float:
        begun_s, begun = time.perf_counter(), os.times()
        results.append(run(*command, env=without_jax))
        wall_s, ended = time.perf_counter() - begun_s, os.times()
        worked_s = sum(ended[2:4]) - sum(begun[2:4])  # of the child; Windows does not report it
        return min(wall_s, worked_s or wall_s)

    results = []
    (tmp_path / "libraries.py").write_text("import numpy, tyro")
    libraries_s = min(seconds(str(tmp_path / "libraries.py")) for _ in range(3))
    help_s = min(seconds("train.py", "--help") for _ in range(3))
    result = results[-1]
    assert (result.returncode, result.stderr) == (0, "")
    assert help_s < max(0.7, 3.5 * libraries_s)
    for name in PRESETS:
        assert f"  {name} " in result.stdout
        assert ABOUT[name] in result.stdout
    assert "--learning_rate FLOAT" in result.stdout


def help_of(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_train_config([*argv, "--help"], "about")
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_shows_the_values_of_the_requested_preset(capsys):
    shown = help_of(["--config=shakespeare", "--n_layer=5"], capsys)
    assert "width of the residual stream; a multiple of n_head (default: 384)" in shown
    assert "Transformer blocks (default: 6)" in shown


def test_help_explains_every_field(capsys):
    """From the comments beside and above the fields, in one form: no capital, no full stop."""
    shown = help_of([], capsys)
    fields = to_flat_dict(PRESETS["small"])
    for name, value in fields.items():
        flag = shown.index(f" --{name} ")
        end = shown.index("(default:", flag)
        explained = shown[flag:end].split()
        assert len(explained) > 3, name
        assert not explained[-1].endswith("."), name
        assert shown[end:].startswith(f"(default: {value if value != '' else repr('')}"), name


def test_help_can_be_piped_with_a_small_encoding(run, without_jax):
    """On Windows a pipe's code page lacks the box-drawing characters."""
    result = run("train.py", "--help", env=without_jax | {"PYTHONIOENCODING": "cp1252"})
    assert (result.returncode, result.stderr) == (0, "")


def test_every_command_starts_from_any_folder(run, tmp_path, without_jax):
    """Python finds the package beside the scripts or where it is installed."""
    (tmp_path / "elsewhere").mkdir()
    for script, flag in ("sample.py", "--max_new_tokens"), ("data/prepare.py", "--tokenizer"):
        result = run(script, "-h", cwd=tmp_path / "elsewhere", env=without_jax)
        assert result.returncode == 0
        assert flag in result.stdout
    assert not any((tmp_path / "elsewhere").iterdir())
