"""What the four READMEs name is there: files, tests, presets, flags and commands."""

import ast
import importlib.util
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from nanogpt_jax.config import PRESETS, SampleConfig, field_types, parse_train_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanogpt_jax"
DOCUMENTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "nanogpt_jax/README.md", "data/README.md", "tests/README.md")
}
README = DOCUMENTS["README.md"]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
PROMISE = re.compile(r"\| \[`(test_\w+)`\]\(([\w/]+\.py)\) \| ?(slow)? ?\|$", re.MULTILINE)
COMMAND = re.compile(r"python (train\.py|sample\.py|data/prepare\.py|-m nanogpt_jax)\b(.*)")
OF_OTHERS = ("torchrun", "srun", "gcloud", "pytest")  # whose flags are not ours


def code(text: str, of_nanogpt: bool = False) -> list[str]:
    """Return code blocks line by line and code spans, without what nanoGPT's users type there."""
    if not of_nanogpt:
        begin = text.find("| nanoGPT | here |")
        rows = text[begin:].split("\n\n")[0] if begin >= 0 else ""
        text = text.replace(rows, re.sub(r"^\|[^|]*\|", "|", rows, flags=re.MULTILINE))
    blocks = re.findall(r"^ {4}(?=\S)(.*)$", text, re.MULTILINE)
    return blocks + re.findall(r"`([^`\n]+)`", text)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return each command of ours in a document: the script, and its arguments."""
    found = []
    for script, rest in itertools.chain.from_iterable(map(COMMAND.findall, code(text))):
        rest = re.split(r"\s#|&&|\|\s|[>…]|\.\.\.", rest)[0]
        if rest.count('"') % 2:  # the command was itself in quotes
            rest = rest.rpartition('"')[0]
        found.append((script, shlex.split(rest)))
    return found


ALL_COMMANDS = [command for text in DOCUMENTS.values() for command in commands(text)]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_slow(path: Path, name: str) -> bool:
    """Return whether a test of a file runs only with -m slow.

    Raises:
        KeyError: the file has no such test.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    of_file = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    marks = [ast.unparse(mark) for mark in tests[name].decorator_list]
    return "pytest.mark.slow" in marks or any("pytest.mark.slow" in mark for mark in of_file)


def test_the_readme_can_be_read_in_ten_minutes():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 13_000


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_linked_exists(name):
    document = ROOT / name
    links = LINK.findall(DOCUMENTS[name])
    assert links
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_source_file_that_is_named_exists(name):
    files = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")]
    for span in code(DOCUMENTS[name]):
        for path in re.findall(r"(?<![\w/.])[\w/]+\.py\b(?!\w)", span):
            assert any(f"/{file}".endswith(f"/{path}") for file in files), path


def test_every_command_of_ci_exists():
    named = {
        path
        for line in code(DOCUMENTS["tests/README.md"])
        for path in re.findall(r"^\.ci/\w+", line)
    }
    assert {".ci/quick", ".ci/run"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_promise_names_its_test_and_says_whether_it_is_slow():
    promises = PROMISE.findall(DOCUMENTS["tests/README.md"])
    assert len(promises) > 30
    assert len(promises) == DOCUMENTS["tests/README.md"].count("[`test_")
    for name, path, slow in promises:
        assert is_slow(ROOT / "tests" / path, name) == bool(slow), name


def test_a_test_that_is_not_there_would_be_noticed():
    with pytest.raises(KeyError):
        is_slow(Path(__file__), "test_of_nothing")


def test_every_preset_has_a_row_and_every_row_a_preset():
    rows = README.partition("## Presets")[2].partition("\n## ")[0]
    named = re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", rows, re.MULTILINE)))
    lecture = re.findall(r"\| `(lecture-[\w-]+)` \|", README)
    assert {*named, *lecture} == PRESETS.keys()


def test_every_training_command_is_understood():
    commands_of_training = [argv for script, argv in ALL_COMMANDS if script == "train.py"]
    assert len(commands_of_training) > 20
    for argv in commands_of_training:
        parse_train_config(["small" if word == "NAME" else word for word in argv])


def test_every_flag_exists():
    """Those of sample.py in SampleConfig; of all commands, as a field or in the source."""
    sampling = [argv for script, argv in ALL_COMMANDS if script == "sample.py"]
    assert len(sampling) > 5
    words = (word for argv in sampling for word in argv if re.match("--[a-z]", word))
    assert {word[2:].partition("=")[0] for word in words} <= field_types(SampleConfig).keys()

    fields = set()
    for path in (*PACKAGE.rglob("*.py"), ROOT / "data/prepare.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                fields |= {*re.findall(r"^--([a-z_]+)$", node.value)}
    for text in DOCUMENTS.values():
        ours = (
            line.partition("python ")[2] if line.startswith(OF_OTHERS) else line
            for line in code(text)
        )
        flags = {flag for line in ours for flag in re.findall(r"(?<![\w=-])--([a-z]\w+)", line)}
        assert flags <= fields | {"help"}


def test_every_tool_is_behind_the_door(run):
    shown = run("-m", "nanogpt_jax", "--help", cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    tools = {argv[0] for script, argv in ALL_COMMANDS if script == "-m nanogpt_jax"} - {"COMMAND"}
    assert len(tools) > 5
    assert tools <= {*re.findall(r"^\s*(\w+)", shown.stdout, re.MULTILINE)}


def test_every_extra_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for text in DOCUMENTS.values() for extra in re.findall(r"'\.\[(\w+)\]'", text)}
    assert {"cuda12", "tpu", "web", "corpora", "test"} <= named
    assert named <= project["optional-dependencies"].keys()


def test_the_layout_has_every_package_and_the_first_files_their_length():
    built = DOCUMENTS["nanogpt_jax/README.md"]
    layout = built.partition("## Layout")[2].partition("\n## ")[0]
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {*re.findall(r"\[(\w+)/\]", layout)} == packages
    start = built.partition("## Start here")[2].partition("\n## ")[0]
    lengths = re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \| (\d+) \|", start, re.MULTILINE)
    assert len(lengths) == 5
    for path, told in lengths:
        n_lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
        assert abs(n_lines - int(told)) <= 15, f"{path} has {n_lines} lines"


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    """As it is printed, on a run that a newcomer could have made."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(example.split("\n\n")[-1].splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("ROMEO: But soft! What light breaks?\n" * 200, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 200)  # as in the example: compiled once
    argv = ["--config=tiny", "--dataset=text.txt", "--out_dir=out/small", "--max_iters=1"]
    assert train.main([*argv, "--n_layer=1", "--batch_size=1", "--eval_iters=1"]) == 0
    capsys.readouterr()
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("ROMEO:")


def test_the_badge_opens_the_notebook_of_the_repository_that_the_notebook_names():
    (badge,) = re.findall(
        r"colab\.research\.google\.com/github/(\S+)/blob/main/colab\.ipynb", README
    )
    cells = json.loads((ROOT / "colab.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "".join("".join(cell["source"]) for cell in cells)
    assert re.search(r'REPOSITORY = "https://github\.com/([^"]+)"', source)[1] == badge
    assert README.count(f"git clone https://github.com/{badge} ") == 1
