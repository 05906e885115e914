"""Bad input and hostile files: one line that says what was required, and nothing is done.

tests/hostile.py says how the input is generated.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import pty
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hostile import BAD_JSON, HOSTILE_TEXTS, another, answer, content_of, copied
from hypothesis import example, given
from hypothesis import strategies as st
from make_old_run import ROOT, sample
from runs import start, train, write_dataset, write_tokenizer
from tokenizers import Tokenizer

import nanogpt_jax
from nanogpt_jax import corpora
from nanogpt_jax.config import ModelConfig, TrainConfig, parse_train_config
from nanogpt_jax.config.cli import START_FIELDS
from nanogpt_jax.corpora import END_OF_TEXT
from nanogpt_jax.corpora.tokenizer import tokenizer_hash
from nanogpt_jax.errors import InputError, reading, visible
from nanogpt_jax.gpt2 import config as huggingface
from nanogpt_jax.gpt2 import convert as pretrained
from nanogpt_jax.gpt2 import weights
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run import plots as report

spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
PATHS = {
    train: ("config", "dataset", "out_dir", "data_dir", "tokenizer", "init_from"),
    sample: ("out_dir", "init_from", "start"),
    prepare: ("tokenizer", "data_dir"),
    report: ("picture",),
}


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        pytest.param(script, flag, id=f"{script.__name__}-{flag}")
        for script, flags in PATHS.items()
        for flag in flags
    ],
)
@given(text=HOSTILE_TEXTS)
def test_a_name_that_no_file_has_is_refused_in_one_line(tmp_path_factory, script, flag, text):
    """Whatever it is, and nothing is written: all that is asked for besides is not there."""
    words = {train: ["--dataset=none"], sample: ["--out_dir=none"], prepare: ["none"]}
    words |= {report: ["none"]}
    start = f"FILE:x{text}" if flag == "start" else f"x{text}"
    asked = [word for word in words[script] if not word.startswith(f"--{flag}=")]
    asked = [] if flag == "init_from" and script is sample else asked
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        assert answer(lambda: script.main([*asked, f"--{flag}={start}"])) is not None
        assert not any(Path(place).iterdir())


@given(text=HOSTILE_TEXTS)
@example(text=300 * "x")
def test_a_word_that_no_file_has_for_a_name_is_refused_in_one_line(text):
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        for main, words in [
            (report.main, [f"x{text}"]),
            (report.main, ["x", f"x{text}"]),
            (prepare.main, [f"x{text}", "--data_dir=new"]),
            (pretrained.main, [f"x{text}", "new"]),
            (pretrained.main, ["none", f"x{text}"]),
        ]:
            assert answer(lambda main=main, words=words: main(words)) is not None
        assert not any(Path(place).iterdir())


# Files


def write_run(folder: Path) -> None:
    """A run without checkpoints."""
    config = parse_train_config(["--config=tiny", "--vocab_size=9"])
    run_folder.begin(folder, config, {"jax": "0.1", "dataset_fingerprint": "0123456789abcdef"})
    rows = [
        {"step": step, loss: 2.5, "lr": 1e-3, "tokens_per_s": 9000, "elapsed_s": step / 10}
        for step, loss in [(0, "val_loss"), (10, "train_loss"), (20, "val_loss")]
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_run(folder: Path) -> None:
    run_folder.read_model_config(folder)
    run_folder.can_resume(folder, parse_train_config(["--config=tiny"]), "0" * 16)
    parse_train_config(["--config", str(folder / "config.json")])
    run = report.read_run(folder, "tokens")
    report.describe(run)
    report.loss_figure({"run": run}, "tokens")


def write_corpus(folder: Path) -> None:
    """A prepared text."""
    (folder / "book.txt").write_text("the cat sat on the mat\n" * 9)
    prepared = corpora.prepare(str(folder / "book.txt"), folder / "data", 9)
    for path in prepared.iterdir():
        path.rename(folder / path.name)


def use(tokenizer) -> None:
    """Ask a tokenizer for all that training, sampling and export do."""
    for text in tokenizer.default_start, "the cat", END_OF_TEXT:
        answer(lambda text=text: tokenizer.encode_prompt(text))
    tokenizer.decode(range(tokenizer.vocab_size + 1))
    tokenizer_hash(tokenizer)
    model = ModelConfig(vocab_size=tokenizer.vocab_size)
    huggingface.config_files(model, tokenizer)


def write_gpt2(folder: Path) -> None:
    """A GPT-2 of Hugging Face's, whose weights are not opened here."""
    model = ModelConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=4, bias=True)
    for name, content in huggingface.config_files(model, BPE).items():
        (folder / name).write_text(content, encoding="utf-8")
    index = {"weight_map": {"wte.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_gpt2(folder: Path) -> None:
    huggingface.read_config(str(folder))
    use(corpora.read_tokenizer(folder / "tokenizer.json"))
    weights.open_tensors(str(folder))  # there are none


def write_own(folder: Path) -> None:
    """What a user writes."""
    (folder / "mine.json").write_text('{"config": "tiny", "n_layer": 3, "dropout": 0.5}')
    (folder / "start.txt").write_text("the cat", encoding="utf-8")


def read_own(folder: Path) -> None:
    parse_train_config(["--config", str(folder / "mine.json")])
    sample.read_start(f"FILE:{folder / 'start.txt'}")


BPE = corpora.BPETokenizer.train(["the cat sat on the mat " * 50], 300)
FOLDERS = {
    "run": (write_run, read_run),
    "corpus": (write_corpus, None),  # read in tests/corpora
    "gpt2": (write_gpt2, read_gpt2),
    "own": (write_own, read_own),
}
FILES = [
    *[("run", "config.json"), ("run", "metrics.jsonl")],
    *[("gpt2", name) for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")],
    *[("own", "mine.json"), ("own", "start.txt")],
]
ANYTHING = {"start.txt"}  # of which many a content is a good one
MAY_BE_MISSING = {"metrics.jsonl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A good folder of each kind. Not to be changed."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in FOLDERS}
    for kind, folder in made.items():
        FOLDERS[kind][0](folder)
    return made


def answer_to(kind: str, folder: Path, name: str) -> str | None:
    """Return what the readers of a folder say of a file in it; they leave it as it was."""
    before = content_of(folder)
    line = answer(lambda: FOLDERS[kind][1](folder))
    assert content_of(folder) == before
    return line


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_file_that_is_missing_a_folder_or_empty_is_named(folders, kind, name):
    good = answer_to(kind, folders[kind], name)
    assert good is None or "safetensors" in good  # the index names weights that are not there
    for damage in ("missing", "folder", "empty", "unreadable"):
        with copied(folders[kind]) as folder:
            path = folder / name
            path.unlink()
            if damage == "folder":
                path.mkdir()
            elif damage == "empty":
                path.touch()
            elif damage == "unreadable":
                path.symlink_to("/proc/self/mem")  # root may read all else
            line = answer_to(kind, folder, name)
        allowed = MAY_BE_MISSING if damage == "missing" else {"start.txt", "metrics.jsonl"}
        assert line is not None or name in allowed
        assert line is None or name.split(".")[0] in line


@pytest.mark.parametrize(("kind", "name"), FILES)
@given(data=st.data())
def test_a_file_cut_off_or_of_random_bytes_is_refused_in_one_line(folders, kind, name, data):
    whole = (folders[kind] / name).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    content, is_random = data.draw(
        st.one_of(
            st.just((whole[:at], False)),
            st.just((whole[:at] + bytes([whole[at] ^ 2 ** (at % 8)]) + whole[at + 1 :], False)),
            st.binary(min_size=1, max_size=300).map(lambda content: (content, True)),
        )
    )
    with copied(folders[kind]) as folder:
        (folder / name).write_bytes(content)
        line = answer_to(kind, folder, name)
    if is_random and name not in ANYTHING:
        with contextlib.suppress(ValueError):
            json.loads(content)
            return
        assert line is not None or (name == "metrics.jsonl" and b"\n" not in content)


@pytest.mark.parametrize(("kind", "name"), [file for file in FILES if file[1] not in ANYTHING])
@given(data=st.data())
def test_a_file_of_right_form_with_something_else_in_it_is_taken_or_refused(
    folders, kind, name, data
):
    """One value somewhere in its JSON is any other, is gone, or is as large as can be."""
    text = (folders[kind] / name).read_text(encoding="utf-8")
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(another(json.loads(lines[at]), data))
    with copied(folders[kind]) as folder:
        (folder / name).write_text("\n".join(lines) + "\n")
        answer_to(kind, folder, name)


@pytest.mark.parametrize(
    ("kind", "name"), [file for file in FILES if file[1].endswith((".json", ".jsonl"))]
)
def test_a_json_file_that_breaks_parsers_is_one_line(folders, kind, name):
    with copied(folders[kind]) as folder:
        for content in BAD_JSON:
            (folder / name).write_bytes(content + b"\n")
            line = answer_to(kind, folder, name)
            assert line is not None or (name, content) == ("mine.json", b"{}")


def test_a_panic_of_rusts_is_one_line(capfd):
    """It is no Exception; and Rust tells of it itself, which cannot be helped."""
    fields = json.loads(BPE.to_json()) | {"normalizer": {"type": "Prepend", "prepend": ""}}
    rust = Tokenizer.from_str(json.dumps(fields))

    def encode():
        with reading("some/tokenizer.json", "one that can encode"):
            rust.encode("text")

    assert answer(encode).startswith("some/tokenizer.json: must be one that can encode, but ")
    assert "panicked" in capfd.readouterr().err


# Texts


def test_a_start_is_the_text_of_a_file_or_of_standard_input(tmp_path, monkeypatch):
    for content, expected in [
        (b"\xef\xbb\xbfthe cat", "the cat"),
        (b"the\r\ncat", "the\ncat"),
        ("the 🎭".encode(), "the 🎭"),
        (b"a\0b", "a\0b"),
        (b"", ""),
    ]:
        (tmp_path / "start.txt").write_bytes(content)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        for prompt in f"FILE:{tmp_path / 'start.txt'}", "-", expected:
            assert sample.read_start(prompt) == expected


# Runs of strangers


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run that was trained for a moment, and its dataset."""
    home = tmp_path_factory.mktemp("trained")
    write_tokenizer(write_dataset(home / "letters"))
    assert start(home / "run", home / "letters", "--max_iters=2") == 0
    return home


def write_some(run: Path) -> None:
    sample.main([f"--out_dir={run}", "--num_samples=1", "--max_new_tokens=3"])


def test_a_strangers_run_is_sampled_and_nothing_is_written(trained, tmp_path, monkeypatch, capsys):
    """Neither in it, nor where its links and its config.json lead, nor here."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(trained / "run", run)
    shutil.move(run / "checkpoints", elsewhere / "checkpoints")
    (run / "checkpoints").symlink_to(elsewhere / "checkpoints")
    (run / "tensorboard").symlink_to(elsewhere)
    (run / "up").symlink_to("..")
    for name in "metrics.jsonl", "loss.png", "tokenizer.json":
        (run / name).rename(elsewhere / name)
        (run / name).symlink_to(Path("..", "elsewhere", name))
    asked = json.loads((run / "config.json").read_text())
    asked |= dict.fromkeys(("out_dir", "data_dir", "compile_cache"), str(tmp_path / "evil"))
    asked |= {"overwrite": True, "tensorboard": True, "wandb": True, "dataset": str(elsewhere)}
    (run / "config.json").write_text(json.dumps(asked))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = content_of(tmp_path)
    write_some(run)
    assert len(capsys.readouterr().out) > 3
    assert content_of(tmp_path) == before


def test_a_strangers_config_says_what_is_trained_and_not_where_or_with_which_code(trained):
    path = trained / "run" / "config.json"
    asked = json.loads(path.read_text())
    asked |= {"out_dir": "out/best", "overwrite": True, "compile_cache": "evil", "num_processes": 2}
    asked |= {"process_id": 1, "coordinator_address": "evil:80", "compile_for": "v5e:4x4"}
    with copied(trained / "run") as folder:
        (folder / "config.json").write_text(json.dumps(asked))
        config = parse_train_config(["--config", str(folder / "config.json")])
        assert run_folder.choose(config, None) == folder
    assert config.model.n_embd == 16
    usual = TrainConfig()
    for name in START_FIELDS:
        assert getattr(config, name) == getattr(usual, name)
    (folder.parent).mkdir()
    mine = folder.parent / "mine.json"
    mine.write_text('{"compile_cache": "cache", "out_dir": "out/a"}')
    config = parse_train_config(["--config", str(mine)])
    assert (config.compile_cache, config.out_dir) == ("cache", "out/a")  # one's own file may


SHAPES = [
    {"n_layer": 2_000_000_000},
    {"n_layer": 1024, "n_embd": 65536, "n_head": 1},
    {"vocab_size": 2**24, "n_embd": 65536, "n_head": 1},
    {"block_size": 2**31},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_no_machine_can_hold_is_refused_at_once(trained, tmp_path, shape):
    began_s = time.monotonic()
    flags = [f"--{name}={value}" for name, value in shape.items()]
    more = [f"--dataset={trained / 'letters'}", f"--out_dir={tmp_path / 'new'}"]
    line = answer(lambda: train.main(["--config=tiny", *flags, *more]))
    words = "must be at most", "needs at least", "must have room for three checkpoints"
    assert any(word in line for word in words)
    assert not (tmp_path / "new").exists()
    with copied(trained / "run") as run:
        asked = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(asked | shape))
        line = answer(lambda: write_some(run))
    assert "must be at most" in line or "needs at least" in line
    assert time.monotonic() - began_s < 10


def test_more_samples_than_memory_holds_are_refused(trained):
    line = answer(lambda: sample.main([f"--out_dir={trained / 'run'}", "--num_samples=1000000000"]))
    assert "GiB: use fewer --num_samples" in line


def test_what_a_model_writes_cannot_command_a_terminal(trained, capsys):
    """But a file or a pipe gets it as it is."""
    with copied(trained / "run") as run:
        n_chars = len(json.loads((run / "tokenizer.json").read_text())["chars"])
        evil = "\x07\t\n\x1b" + "abcdefghijklmnopqrst"[: n_chars - 8] + "\x7f\x9bß\u202e"
        (run / "tokenizer.json").write_text(json.dumps({"type": "char", "chars": evil}))
        argv = [f"--out_dir={run}", "--start=\n", "--num_samples=1", "--max_new_tokens=300"]
        argv += ["--temperature=9"]
        assert sample.main(argv) == 0
        piped = capsys.readouterr().out
        command = [sys.executable, str(ROOT / "sample.py"), *argv]
        ours, theirs = pty.openpty()
        with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # Linux says so that the other side is closed
                while piece := os.read(ours, 2**16):
                    shown += piece
        os.close(ours)
    assert process.returncode == 0
    assert {"\x07", "\x1b", "\x9b", "\u202e"} <= set(piped)
    shown = shown.decode().replace("\r\n", "\n")
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    assert shown == visible(piped, keep="\n\t")


# Pickles


class Opened:
    """What writes a file when its pickle is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_pickle_of_these_tests_does_what_it_should(tmp_path):
    pickle.loads(pickle.dumps(Opened(tmp_path / "opened")))
    assert (tmp_path / "opened").exists()


def test_a_pickle_is_opened_under_no_name(trained, folders, tmp_path, capsys):
    opened = tmp_path / "opened"
    content = pickle.dumps(Opened(opened))
    content += bytes(len(content) % 2)

    def put(home: Path, names, *commands) -> None:
        for name in names:
            with copied(home) as folder:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
                for command in commands:
                    with contextlib.suppress(InputError, UnicodeDecodeError):  # of Orbax
                        main, argv = command(folder)
                        main(argv)
            assert not opened.exists(), name

    def training(folder):
        more = [f"--out_dir={folder / 'new'}", "--eval_only", "--vocab_size=99"]
        return train.main, ["--config=tiny", f"--dataset={folder}", *more]

    bins = ["train.bin", "val.bin", "meta.pkl", "meta.json", "tokenizer.json", "input.txt"]
    put(folders["corpus"], bins, training)

    def preparing(name):
        return lambda folder: (prepare.main, [str(folder / name), f"--data_dir={folder / 'new'}"])

    for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.pkl"):
        put(folders["own"], [name], preparing(name))
    put(folders["own"], ["mine.json"], lambda f: (train.main, ["--config", str(f / "mine.json")]))

    def sampling_from(folder):
        return sample.main, [f"--init_from={folder}", "--num_samples=1", "--max_new_tokens=1"]

    weights_there = ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"]
    put(folders["gpt2"], [*weights_there, "config.json", "tokenizer.json"], sampling_from)

    def sampling(folder):
        return sample.main, [f"--out_dir={folder}", "--num_samples=1", "--max_new_tokens=1"]

    def restoring(folder):
        return nanogpt_jax.load, folder

    def exporting(folder):
        return pretrained.main, [str(folder), str(folder / "exported")]

    run = trained / "run"
    names = ["config.json", "metrics.jsonl", "tokenizer.json"]
    put(run, names, sampling, exporting, lambda folder: (report.main, [str(folder)]))
    files = [path.relative_to(run) for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) > 5
    put(run, files, restoring)
