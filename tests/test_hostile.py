"""Bad input and hostile files: one line that says what was required, and nothing is done.

Inputs are made by hypothesis: few and always the same in the suite, NANOGPT_JAX_FUZZ=1000 tries so
many in each test, and others each time.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import pickle
import pkgutil
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import nanogpt_jax
from nanogpt_jax import corpora
from nanogpt_jax.config import (
    OF_A_START,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    field_types,
    parse_args,
    parse_train_config,
)
from nanogpt_jax.corpora import END_OF_TEXT
from nanogpt_jax.corpora.tokenizer import tokenizer_hash
from nanogpt_jax.errors import InputError, reading, visible
from nanogpt_jax.gpt2 import config as huggingface
from nanogpt_jax.gpt2 import convert as pretrained
from nanogpt_jax.gpt2 import weights
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run import plots as report

ROOT = Path(__file__).parent.parent
TRIALS = int(os.environ.get("NANOGPT_JAX_FUZZ", "0"))
settings.register_profile(
    "hostile",
    max_examples=TRIALS or 10,
    derandomize=not TRIALS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("hostile")


def load(script: str):
    """Return a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, sample, prepare = load("train.py"), load("sample.py"), load("data/prepare.py")


def answer(work) -> str | None:
    """Return the line with which work was refused, None where it was done; all else is raised."""
    try:
        work()
    except InputError as error:
        line = str(error)
        assert line
        assert line.isprintable() or all(char.isprintable() or char > "~" for char in line)
        assert len(line.splitlines()) == 1
        return line
    return None


# Fields


def configurations() -> list[type]:
    """All dataclasses that flags or files are read into."""
    names = [f"nanogpt_jax.{module.name}" for module in pkgutil.iter_modules(nanogpt_jax.__path__)]
    modules = [*map(importlib.import_module, names), prepare]
    values = [value for module in modules for value in vars(module).values()]
    classes = {kind for kind in values if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    asked = {kind for kind in classes if kind.__name__.endswith(("Config", "Flags"))}
    return sorted(asked, key=lambda kind: kind.__name__)


FIELDS = [
    pytest.param(cls, name, hint, id=f"{cls.__name__}.{name}")
    for cls in configurations()
    for name, hint in get_type_hints(cls).items()
    if not dataclasses.is_dataclass(hint)
]
# What these numbers mean; all other fields refuse them.
MEANINGS = {
    "warmup_iters": {0},  # none
    "eval_iters": {0},  # the whole split
    "num_processes": {0},  # found by JAX
    "process_id": {-1, 0},  # found by JAX; the first
    "max_new_tokens": {-1},  # with --stream: without end
    "top_k": {0},  # all
    "seed": {0, 2**31, 2**32 - 1},
    "port": {0},  # a free one
}


def parts_of(hint) -> tuple:
    return get_args(hint) or (hint,)


def refused(cls: type, name: str, value) -> None:
    line = answer(lambda: cls(**{name: value}))
    assert line is not None, f"{cls.__name__} takes {name}={value!r}"
    assert name in line


def test_every_configuration_is_found():
    names = {kind.__name__ for kind in configurations()}
    assert names >= {"TrainConfig", "ModelConfig", "OptimConfig", "ComputeConfig", "SampleConfig"}
    assert names >= {"CostConfig", "ExportConfig", "Flags", "LectureConfig", "ReportConfig"}
    assert {param.values[1] for param in FIELDS} >= field_types(TrainConfig).keys()


@pytest.mark.parametrize(("cls", "name", "hint"), FIELDS)
def test_a_number_out_of_its_range_is_refused(cls, name, hint):
    if int in parts_of(hint):
        numbers = {-(10**400), -(2**63), -2, -1, 0, 2**31, 2**32 - 1, 2**32, 2**63, 10**400}
        for number in numbers - MEANINGS.get(name, set()):
            refused(cls, name, number)
    if float in parts_of(hint):
        for number in (float("nan"), float("inf"), -float("inf"), -1e-9, -1, 1e39, 10**400):
            refused(cls, name, number)


@pytest.mark.parametrize(("cls", "name", "hint"), FIELDS)
def test_a_value_of_another_type_is_refused(cls, name, hint):
    """As a JSON file can bring them."""
    examples = {int: 4, float: 0.25, bool: True, str: "4", type(None): None, list: [4], dict: {}}
    known = {float: {int, float}}
    kinds = {str} if get_origin(hint) is Literal else set(parts_of(hint))
    allowed = set().union(*(known.get(kind, {kind}) for kind in kinds))
    for kind in examples.keys() - allowed:
        refused(cls, name, examples[kind])
    if get_origin(hint) is Literal:
        refused(cls, name, "another")


HOSTILE_TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("\0\n\x1b\ud800\udcff/.-=,:' 🎭\u202e9")),
    st.integers(190, 5000).map(lambda n: n * "x"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=20 * settings.default.max_examples)
def test_a_field_takes_a_value_or_refuses_it_in_one_line(data):
    cls, name, _ = data.draw(st.sampled_from([param.values for param in FIELDS]))
    value = data.draw(JSON)
    answer(lambda: cls(**{name: value}))


@given(st.sampled_from([TrainConfig]), st.data())
@example(TrainConfig, None)
def test_a_flag_takes_a_text_or_refuses_it_in_one_line(cls, data):
    if data is None:
        name, text = "mesh", "data=" + 5000 * "9"
    else:
        name = data.draw(st.sampled_from(sorted(field_types(cls))))
        text = data.draw(HOSTILE_TEXTS)
    answer(lambda: parse_args(cls, {name: text}, cls(), ""))


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
            (pretrained.main, ["export", f"x{text}", "new"]),
            (pretrained.main, ["export", "none", f"x{text}"]),
        ]:
            assert answer(lambda main=main, words=words: main(words)) is not None
        assert not any(Path(place).iterdir())


# Files


def write_run(folder: Path) -> None:
    """A run without checkpoints."""
    config = parse_train_config(["--config=tiny", "--vocab_size=9"])
    run_folder.begin(folder, config, "0123456789abcdef", {"jax": "0.1"})
    rows = [
        {"step": step, loss: 2.5, "lr": 1e-3, "tokens_per_s": 9000, "elapsed_s": step / 10}
        for step, loss in [(0, "val_loss"), (10, "train_loss"), (20, "val_loss")]
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_run(folder: Path) -> None:
    run_folder.read_model_config(folder)
    run_folder.check_resumable(folder, parse_train_config(["--config=tiny"]), "0" * 16)
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


def read_corpus(folder: Path) -> None:
    corpora.known_val_tokens(str(folder), folder)
    corpus = corpora.open_corpus(folder, 9)
    for split in corpus.splits.values():
        assert int(np.asarray(split).max()) < corpus.vocab_size
    if corpus.tokenizer:
        use(corpus.tokenizer)


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
    (folder / "lines.jsonl").write_text(99 * '{"text": "the cat sat"}\n')


def read_own(folder: Path) -> None:
    parse_train_config(["--config", str(folder / "mine.json")])
    sample.read_start(f"FILE:{folder / 'start.txt'}")
    with tempfile.TemporaryDirectory() as data:
        corpora.prepare(str(folder / "lines.jsonl"), Path(data), 1, "char")
        assert len([*Path(data).iterdir()]) == 1


BPE = corpora.BPETokenizer.train(["the cat sat on the mat " * 50], 300)
FOLDERS = {
    "run": (write_run, read_run),
    "corpus": (write_corpus, read_corpus),
    "gpt2": (write_gpt2, read_gpt2),
    "own": (write_own, read_own),
}
FILES = [
    *[("run", "config.json"), ("run", "metrics.jsonl")],
    *[("corpus", name) for name in ("meta.json", "tokenizer.json", "train.bin", "val.bin")],
    *[("gpt2", name) for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")],
    *[("own", "mine.json"), ("own", "start.txt"), ("own", "lines.jsonl")],
]
ANYTHING = {"start.txt", "train.bin", "val.bin"}  # of which many a content is a good one
MAY_BE_MISSING = {"metrics.jsonl", "meta.json", "tokenizer.json"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A good folder of each kind. Not to be changed."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in FOLDERS}
    for kind, folder in made.items():
        FOLDERS[kind][0](folder)
    return made


@contextlib.contextmanager
def copied(folder: Path):
    """A copy of a folder, to be damaged."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(folder, Path(place, "copy")))


def answer_to(kind: str, folder: Path, name: str) -> str | None:
    """Return what the readers of a folder say of a file in it; they leave it as it was."""
    before = content_of(folder)
    line = answer(lambda: FOLDERS[kind][1](folder))
    assert content_of(folder) == before
    return line


def content_of(folder: Path) -> dict:
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {
        path: (stat.st_mtime_ns, stat.st_size, stat.st_mode)
        for path, stat in found.items()
        if stat.st_size < 2**30 or path.is_dir()
    }


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


def another(value, data):
    """Return a JSON value in which one part is another."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 4)):
        key = data.draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
        changed = value.copy()
        if data.draw(st.integers(0, 6)):
            changed[key] = another(value[key], data)
        else:
            del changed[key]
        return changed
    huge = st.sampled_from([-1, 0, 2**31, 2**32, 2**63, 10**400, 1e308, "a" * 9999, "../../x", "/"])
    return data.draw(st.one_of(JSON, huge))


@pytest.mark.parametrize(
    ("kind", "name"), [file for file in FILES if file[1].endswith((".json", ".jsonl"))]
)
@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"NaN", b"{}", b"null", b'"\\ud800"']
    + [b'{"config": "tiny", "config": "small"}', b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"\0" * 64],
    ids=lambda content: repr(content[:12]),
)
def test_a_json_file_that_breaks_parsers_is_one_line(folders, kind, name, content):
    with copied(folders[kind]) as folder:
        (folder / name).write_bytes(content + b"\n")
        line = answer_to(kind, folder, name)
    may_be = (name, content) in [("mine.json", b"{}"), ("meta.json", b"{}")]
    assert line is not None or may_be


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


@pytest.mark.parametrize("ending", ["text", "file", "standard input"])
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
def test_a_start_is_the_text_that_a_file_has(tmp_path, monkeypatch, content, expected, ending):
    (tmp_path / "start.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    start = {"file": f"FILE:{tmp_path / 'start.txt'}", "standard input": "-", "text": expected}
    assert sample.read_start(start[ending]) == expected


@pytest.mark.parametrize(
    "tokenizer", [BPE, corpora.CharTokenizer("\n\x1bath🎭")], ids=["bpe", "char"]
)
@given(text=HOSTILE_TEXTS)
@example(text="\ufeff\r\n\0🎭")
def test_a_text_comes_back_or_is_refused_in_one_line(tokenizer, text):
    def there_and_back():
        assert tokenizer.decode(tokenizer.encode(text)) == text
        tokenizer.encode_prompt(text)

    line = answer(there_and_back)
    is_half = any("\ud800" <= char <= "\udfff" for char in text)
    if isinstance(tokenizer, corpora.BPETokenizer):
        assert (line is not None) == is_half
    else:
        assert (line is None) == (set(text) <= set(tokenizer.chars))


# Runs of strangers


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run that was trained for a moment, its text and its prepared corpus."""
    home = tmp_path_factory.mktemp("trained")
    (home / "book.txt").write_text(40 * "the cat sat on the mat and ate a rat.\n")
    argv = [
        *("--config=tiny", "--n_layer=1", "--n_embd=16", "--block_size=16", "--max_iters=2"),
        *(f"--dataset={home / 'book.txt'}", f"--data_dir={home / 'data'}"),
        *(f"--out_dir={home / 'run'}", "--mesh=data=1"),
    ]
    assert in_peace(train.main, argv) == 0
    return home


def in_peace(main, argv: list[str]):
    """Run a command here, and undo what it does to signals."""
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        return main(argv)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


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
        assert run_folder.choose(config, "book", "shakespeare_char") == folder
    assert config.model.n_embd == 16
    usual = TrainConfig()
    for name in OF_A_START:
        assert getattr(config, name) == getattr(usual, name)
    (folder.parent).mkdir()
    mine = folder.parent / "mine.json"
    mine.write_text('{"compile_cache": "cache", "out_dir": "out/a"}')
    config = parse_train_config(["--config", str(mine)])
    assert (config.compile_cache, config.out_dir) == ("cache", "out/a")  # one's own file may


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "train.bin/../x", "val_00000.bin", "x"])
def test_a_meta_json_cannot_name_files_elsewhere(folders, name):
    with copied(folders["corpus"]) as folder:
        meta = json.loads((folder / "meta.json").read_text())
        meta["splits"]["train"]["files"][0]["name"] = name
        (folder / "meta.json").write_text(json.dumps(meta))
        assert "splits must say which files" in answer_to("corpus", folder, "meta.json")


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
    more = [f"--dataset={trained / 'data'}", "--loss_chunks=1", f"--out_dir={tmp_path / 'new'}"]
    (bins,) = (trained / "data").iterdir()
    more[0] = f"--dataset={bins}"
    line = answer(lambda: in_peace(train.main, ["--config=tiny", *flags, *more]))
    words = "must be at most", "must have at least", "must have room for three checkpoints"
    assert any(word in line for word in words)
    assert not (tmp_path / "new").exists()
    with copied(trained / "run") as run:
        asked = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(asked | shape))
        line = answer(lambda: write_some(run))
    assert "must be at most" in line or "must have at least" in line
    assert time.monotonic() - began_s < 10


def test_more_samples_than_memory_holds_are_refused(trained):
    line = answer(lambda: sample.main([f"--out_dir={trained / 'run'}", "--num_samples=1000000000"]))
    assert "GiB: take fewer --num_samples" in line


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
        return pretrained.main, ["export", str(folder), str(folder / "exported")]

    run = trained / "run"
    names = ["config.json", "metrics.jsonl", "tokenizer.json"]
    put(run, names, sampling, exporting, lambda folder: (report.main, [str(folder)]))
    files = [path.relative_to(run) for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert len(files) > 5
    put(run, files, restoring)
