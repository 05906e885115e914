"""Bad input and hostile files: one line says what was required, and nothing is written."""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import pty
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from hostile import (
    BAD_JSON,
    DAMAGES,
    HOSTILE_TEXTS,
    another,
    answer,
    content_of,
    copied,
    damage,
    damaged_contents,
)
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import nanogpt_jax
from nanogpt_jax import corpora
from nanogpt_jax.config import ModelConfig, TrainConfig, parse_train_config
from nanogpt_jax.config.cli import START_FIELDS
from nanogpt_jax.corpora import END_OF_TEXT
from nanogpt_jax.corpora.tokenizer_spec import tokenizer_hash
from nanogpt_jax.errors import InputError, reading, visible
from nanogpt_jax.gpt2 import config as gpt2_config
from nanogpt_jax.gpt2 import convert, weights
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run import plots

ROOT = Path(__file__).parent.parent
OLD_RUN = ROOT / "tests" / "fixtures" / "run_v1"  # two checkpoints, and its text.txt beside it


def load(script: str):
    """Return a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, sample, prepare = load("train.py"), load("sample.py"), load("data/prepare.py")


PATHS = {
    train: ("config", "dataset", "out_dir", "data_dir", "tokenizer", "init_from"),
    sample: ("out_dir", "init_from", "start"),
    prepare: ("tokenizer", "data_dir"),
    plots: ("picture",),
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
def test_a_flag_with_an_impossible_name_is_refused_in_one_line(script, flag, text):
    """Whatever it is: everything else that the command names does not exist either."""
    words = {train: ["--dataset=none"], sample: ["--out_dir=none"], prepare: ["none"]}
    words |= {plots: ["none"]}
    value = f"FILE:x{text}" if flag == "start" else f"x{text}"
    others = [word for word in words[script] if not word.startswith(f"--{flag}=")]
    others = [] if flag == "init_from" and script is sample else others
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        assert answer(lambda: script.main([*others, f"--{flag}={value}"])) is not None
        assert not any(Path(place).iterdir())


@given(text=HOSTILE_TEXTS)
@example(text=300 * "x")
def test_a_word_that_cannot_be_a_name_is_refused_in_one_line(text):
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        for main, words in [
            (plots.main, [f"x{text}"]),
            (plots.main, ["x", f"x{text}"]),
            (prepare.main, [f"x{text}", "--data_dir=new"]),
            (convert.main, [f"x{text}", "new"]),
            (convert.main, ["none", f"x{text}"]),
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
    run = plots.read_run(folder, "tokens")
    plots.describe(run)
    plots.loss_figure({"run": run}, "tokens")


def write_corpus(folder: Path) -> None:
    """A prepared text."""
    (folder / "book.txt").write_text("the cat sat on the mat\n" * 9)
    prepared = corpora.prepare(corpora.Request(str(folder / "book.txt"), folder / "data", 9))
    for path in prepared.iterdir():
        path.rename(folder / path.name)


def use(tokenizer) -> None:
    """Use a tokenizer as training, sampling and export do."""
    for text in tokenizer.default_start, "the cat", END_OF_TEXT:
        answer(lambda text=text: tokenizer.encode_prompt(text))
    tokenizer.decode(range(tokenizer.vocab_size + 1))
    tokenizer_hash(tokenizer)
    model = ModelConfig(vocab_size=tokenizer.vocab_size)
    gpt2_config.config_files(model, tokenizer)


def write_gpt2(folder: Path) -> None:
    """A Hugging Face GPT-2 without its weights."""
    model = ModelConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=4, bias=True)
    for name, content in gpt2_config.config_files(model, BPE).items():
        (folder / name).write_text(content, encoding="utf-8")
    index = {"weight_map": {"wte.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_gpt2(folder: Path) -> None:
    gpt2_config.read_config(str(folder))
    use(corpora.read_tokenizer(folder / "tokenizer.json"))
    weights.open_tensors(str(folder))  # refused: there are none


def write_own(folder: Path) -> None:
    """Files that a user writes."""
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
ANYTHING = {"start.txt"}  # almost any content is valid
MAY_BE_MISSING = {"metrics.jsonl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A valid folder of each kind. Not to be changed."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in FOLDERS}
    for kind, folder in made.items():
        FOLDERS[kind][0](folder)
    return made


def answer_to(kind: str, folder: Path, name: str) -> str | None:
    """Return the line with which the readers of a folder refuse it; they write nothing."""
    before = content_of(folder)
    line = answer(lambda: FOLDERS[kind][1](folder))
    assert content_of(folder) == before
    return line


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_missing_unreadable_or_empty_file_is_named(folders, kind, name):
    good = answer_to(kind, folders[kind], name)
    assert good is None or "safetensors" in good  # the index names weights that are not there
    for kind_of_damage in DAMAGES:
        with copied(folders[kind]) as folder:
            damage(folder / name, kind_of_damage)
            line = answer_to(kind, folder, name)
        allowed = MAY_BE_MISSING if kind_of_damage == "missing" else {"start.txt", "metrics.jsonl"}
        assert line is not None or name in allowed
        assert line is None or name.split(".")[0] in line


@pytest.mark.parametrize(("kind", "name"), FILES)
@given(data=st.data())
def test_a_file_cut_off_or_of_random_bytes_is_refused_in_one_line(folders, kind, name, data):
    whole = (folders[kind] / name).read_bytes()
    content, is_random = data.draw(damaged_contents(whole))
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
def test_json_with_any_value_changed_is_accepted_or_refused_in_one_line(folders, kind, name, data):
    text = (folders[kind] / name).read_text(encoding="utf-8")
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(another(json.loads(lines[at]), data))
    with copied(folders[kind]) as folder:
        (folder / name).write_text("\n".join(lines) + "\n")
        answer_to(kind, folder, name)


@pytest.mark.parametrize(("kind", "name"), [file for file in FILES if file[1] not in ANYTHING])
def test_json_that_breaks_parsers_is_one_line(folders, kind, name):
    for content in BAD_JSON:
        with copied(folders[kind]) as folder:
            (folder / name).write_bytes(content + b"\n")
            line = answer_to(kind, folder, name)
        assert line is not None or (name, content) == ("mine.json", b"{}"), content[:12]


def test_a_panic_in_rust_is_one_line(capfd):
    """It is not an Exception, and Rust itself prints it too, which cannot be prevented."""
    fields = json.loads(BPE.to_json()) | {"normalizer": {"type": "Prepend", "prepend": ""}}
    rust = Tokenizer.from_str(json.dumps(fields))

    def encode():
        with reading("some/tokenizer.json", "one that can encode"):
            rust.encode("text")

    assert answer(encode).startswith("some/tokenizer.json: must be one that can encode, but ")
    assert "panicked" in capfd.readouterr().err


# Texts


@pytest.mark.parametrize("source", ["text", "file", "standard input"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfthe cat", "the cat"),
        (b"the\r\ncat", "the\ncat"),
        ("the 🎭".encode(), "the 🎭"),
        (b"a\0b", "a\0b"),
        (b"", ""),
    ],
)
def test_a_prompt_is_a_files_text(tmp_path, monkeypatch, content, expected, source):
    (tmp_path / "start.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    start = {"file": f"FILE:{tmp_path / 'start.txt'}", "standard input": "-", "text": expected}
    assert sample.read_start(start[source]) == expected


# Runs from others


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a trained run and its prepared corpus. Not to be changed."""
    place = tmp_path_factory.mktemp("home")
    shutil.copytree(OLD_RUN / "run", place / "run")
    corpora.prepare(corpora.Request(str(OLD_RUN / "text.txt"), place / "data", 17))
    return place


def in_peace(main, argv: list[str]):
    """Run a command and restore the signal handlers."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        return main(argv)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def sample_from(run: Path) -> None:
    sample.main([f"--out_dir={run}", "--num_samples=1", "--max_new_tokens=3"])


def test_a_strangers_run_is_sampled_and_nothing_is_written(home, tmp_path, monkeypatch, capsys):
    """Neither in it, nor where its links and its config.json point, nor in the current folder."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(home / "run", run)
    shutil.move(run / "checkpoints", elsewhere / "checkpoints")
    (run / "checkpoints").symlink_to(elsewhere / "checkpoints")
    (run / "tensorboard").symlink_to(elsewhere)
    (run / "up").symlink_to("..")
    (run / "loss.png").touch()
    for name in "metrics.jsonl", "loss.png", "tokenizer.json":
        (run / name).rename(elsewhere / name)
        (run / name).symlink_to(Path("..", "elsewhere", name))
    config = json.loads((run / "config.json").read_text())
    config |= dict.fromkeys(("out_dir", "data_dir", "compile_cache"), str(tmp_path / "evil"))
    config |= {"overwrite": True, "tensorboard": True, "wandb": True, "dataset": str(elsewhere)}
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = content_of(tmp_path)
    sample_from(run)
    assert len(capsys.readouterr().out) > 3
    assert content_of(tmp_path) == before


def test_a_strangers_config_sets_what_is_trained_but_not_where_or_with_which_code(home, tmp_path):
    path = home / "run" / "config.json"
    config = json.loads(path.read_text())
    evil = {"out_dir": "out/best", "overwrite": True, "compile_cache": "evil"}
    evil |= {"num_processes": 2, "process_id": 1, "coordinator_address": "evil:80"}
    evil |= {"compile_for": "v5e:4x4"}
    with copied(home / "run") as folder:
        (folder / "config.json").write_text(json.dumps(config | evil))
        config = parse_train_config(["--config", str(folder / "config.json")])
        assert run_folder.choose(config, None) == folder
    assert config.model.n_embd == 4
    usual = TrainConfig()
    for name in START_FIELDS:
        assert getattr(config, name) == getattr(usual, name)
    mine = tmp_path / "mine.json"
    mine.write_text('{"compile_cache": "cache", "out_dir": "out/a"}')
    config = parse_train_config(["--config", str(mine)])
    assert (config.compile_cache, config.out_dir) == ("cache", "out/a")  # the user's own file may


SHAPES = [
    {"n_layer": 2_000_000_000},
    {"n_layer": 1024, "n_embd": 65536, "n_head": 1},
    {"vocab_size": 2**24, "n_embd": 65536, "n_head": 1},
    {"block_size": 2**31},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_no_machine_can_hold_is_refused_at_once(home, tmp_path, shape):
    began_s = time.monotonic()
    flags = [f"--{name}={value}" for name, value in shape.items()]
    (corpus,) = (home / "data").glob("[!.]*")
    more = [f"--dataset={corpus}", "--loss_chunks=1", f"--out_dir={tmp_path / 'new'}"]
    line = answer(lambda: in_peace(train.main, ["--config=tiny", *flags, *more]))
    words = "must be at most", "needs at least", "must have room for three checkpoints"
    assert any(word in line for word in words)
    assert not (tmp_path / "new").exists()
    with copied(home / "run") as run:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | shape))
        line = answer(lambda: sample_from(run))
    assert "must be at most" in line or "needs at least" in line
    assert time.monotonic() - began_s < 10


def test_more_samples_than_memory_holds_are_refused(home):
    line = answer(lambda: sample.main([f"--out_dir={home / 'run'}", "--num_samples=1000000000"]))
    assert "GiB: use fewer --num_samples" in line


def test_what_a_model_writes_cannot_command_a_terminal(home, capsys, monkeypatch):
    """A file or a pipe gets it unchanged."""
    with copied(home / "run") as run:
        evil = "\x07\t\n\x1babcd\x7f\x9bß\u202e"
        (run / "tokenizer.json").write_text(json.dumps({"type": "char", "chars": evil}))
        argv = [f"--out_dir={run}", "--start=\n", "--num_samples=1", "--max_new_tokens=300"]
        argv += ["--temperature=9"]
        assert sample.main(argv) == 0
        piped = capsys.readouterr().out
        ours, theirs = pty.openpty()
        with open(theirs, "w", encoding="utf-8") as terminal:
            monkeypatch.setattr("sys.stdout", terminal)
            assert sample.main(argv) == 0
        shown = b""
        with contextlib.suppress(OSError):  # Linux raises it once the other side is closed
            while piece := os.read(ours, 2**16):
                shown += piece
        os.close(ours)
    shown = shown.decode().replace("\r\n", "\n")
    assert {"\x07", "\x1b", "\x9b", "\u202e"} <= set(piped)
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    assert shown == visible(piped, keep="\n\t")


# Pickles


class Opened:
    """Creates a file when its pickle is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_pickle_of_these_tests_creates_a_file(tmp_path):
    pickle.loads(pickle.dumps(Opened(tmp_path / "opened")))
    assert (tmp_path / "opened").exists()


def test_a_pickle_is_opened_under_no_name(home, folders, tmp_path):
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
                        in_peace(*command(folder))
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
        return convert.main, [str(folder), str(folder / "exported")]

    run = home / "run"
    names = ["config.json", "metrics.jsonl", "tokenizer.json"]
    put(run, names, sampling, exporting, lambda folder: (plots.main, [str(folder)]))
    with copied(run) as one:  # with a second checkpoint, that would be loaded instead
        shutil.rmtree(one / "checkpoints" / "140")
        shutil.rmtree(one / "checkpoints" / "120" / "training")  # not read by load
        paths = (path for path in (one / "checkpoints").rglob("*") if path.is_file())
        files = [path.relative_to(one) for path in paths]
        assert len(files) > 12
        put(one, files, restoring)
