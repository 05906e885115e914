"""The house: who may import whom, how large it may be, and what importing it may not do."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import nanogpt_jax

PACKAGE = Path(nanogpt_jax.__file__).parent
ROOT = Path(__file__).parent.parent
CORE = ("attention", "model", "optim", "steps", "data", "sharding", "decoding")
# From the ground up: each imports only from what is before it.
ORDER = ("errors", "files", "config", "core", "hardware", "corpora", "gpt2", "run", "bench")
ORDER += ("lecture", "web", "nanogpt_jax", "__main__")
# Imports against that order: (module, what it imports, why it may).
UPWARD = {
    ("steps", "lecture", "make_model makes the lecture's models too, and a GPT needs none of them"),
    ("model", "hardware", "its products and kernels are in the forms that chips compute fast"),
    ("attention", "hardware", "its products are in the forms that chips compute fast"),
    ("steps", "hardware", "its loss is in the form that chips compute fast"),
    ("run.run", "nanogpt_jax", "a run records __version__, and may start with what find returns"),
    ("run.pretrained", "nanogpt_jax", "a run may start with what nanogpt_jax.find returns"),
    ("gpt2.convert", "nanogpt_jax", "the export is built on nanogpt_jax.load, as a user's code is"),
    ("lecture.climb", "nanogpt_jax", "a model's text is that of nanogpt_jax.generate"),
    ("web.app", "nanogpt_jax", "the page is built on nanogpt_jax.load, as a user's code is"),
    ("web.handlers", "nanogpt_jax", "the page is built on nanogpt_jax.stream"),
    ("web.session", "nanogpt_jax", "the page is built on nanogpt_jax.TrainedModel"),
}
# Imports of another package's room in place of its face.
ROOMS = {
    ("model", "hardware.fused", "the kernels are JAX, which hardware's face does not import"),
    ("model", "hardware.products", "the products are JAX too"),
    ("attention", "hardware.products", "the same"),
    ("steps", "hardware.products", "the same"),
    ("lecture.models", "hardware.products", "the same"),
    ("steps", "lecture.models", "the models are JAX, which the lecture's face does not import"),
}
WITHOUT_JAX = ("errors", "files", "config", "corpora")  # not even inside functions
READERS_PATH = [
    *(PACKAGE / f"{name}.py" for name in ("model", "attention", "optim", "steps", "data")),
    *(PACKAGE / "decoding.py", ROOT / "train.py", ROOT / "sample.py"),
]
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "data").glob("*.py"))]
MODULES = sorted(PACKAGE.rglob("*.py"))
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PYTORCH = {"torch", "transformers"}  # only its files are read and written


def name_of(path: Path) -> str:
    """Return a module's name inside the package: "steps", "run.folder", "run" for the face."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "nanogpt_jax"


NAMES = {name_of(path): path for path in MODULES}


def place_of(name: str) -> str:
    """Return the package of a module; the core for one that is in none."""
    top = name.partition(".")[0]
    return "core" if top in CORE else top


def imported(path: Path, only_at_import: bool = False) -> set[str]:
    """Return the full names of all that a file imports: in functions and for types too."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["nanogpt_jax" if node.level else "", node.module]))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, by `name_of`."""
    found = set()
    for full in imported(path):
        package, _, name = full.partition(".")
        if package == "nanogpt_jax":
            while name not in NAMES and name:
                name = name.rpartition(".")[0]  # what it takes from a module
            found.add(name or "nanogpt_jax")
    return found


def test_imports_are_found_however_they_are_written(tmp_path):
    """What this cannot see, the tests below cannot forbid."""
    path = tmp_path / "module.py"
    path.write_text(
        "import nanogpt_jax.model\n"
        "from nanogpt_jax import steps as s, load\n"
        "from nanogpt_jax.run import progress\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from nanogpt_jax.config import TrainConfig\n"
        "def f():\n    from nanogpt_jax.corpora.catalog import Corpus\n    from .optim import lr\n"
    )
    expected = {"model", "steps", "nanogpt_jax", "run.progress", "config", "corpora.catalog"}
    assert imported_modules(path) == expected | {"optim"}


def test_every_module_has_a_place():
    assert {place_of(name) for name in NAMES} == {*ORDER}


def test_imports_between_packages_run_one_way():
    allowed = {(name, place) for name, place, _ in UPWARD}
    upward = {
        (name, place_of(other))
        for name, path in NAMES.items()
        for other in imported_modules(path)
        if ORDER.index(place_of(other)) > ORDER.index(place_of(name))
    }
    assert upward - allowed == set()
    assert allowed - upward == set(), "an exception that nothing needs"


def test_no_package_imports_in_a_circle():
    """Inside the core, and inside each package, whose face imports all of its rooms."""
    for place in ORDER:
        rooms = {name for name in NAMES if place_of(name) == place and name != place}
        needs = {name: imported_modules(NAMES[name]) & rooms - {name} for name in rooms}
        while free := {name for name, others in needs.items() if not others & needs.keys()}:
            needs = {name: others for name, others in needs.items() if name not in free}
        assert not needs, f"{place} imports in a circle"


def test_a_module_imports_another_packages_face_and_not_its_rooms():
    allowed = {(name, room) for name, room, _ in ROOMS}
    files = [*NAMES.items(), *((f"/{path.name}", path) for path in SCRIPTS)]
    entered = {
        (name, other)
        for name, path in files
        for other in imported_modules(path)
        if "." in other and place_of(other) != place_of(name)
    }
    assert entered - allowed == set()
    assert allowed - entered == set(), "an exception that nothing needs"


def tracked() -> list[Path]:
    """Return the package's files that git knows, or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "nanogpt_jax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        pytest.skip("this is not a git checkout")
    return [path for path in map(Path, done.stdout.split("\n")[:-1]) if (ROOT / path).exists()]


def test_no_folder_has_more_than_20_entries():
    entries = {}
    for path in tracked():
        for entry in [path, *path.parents]:
            entries.setdefault(entry.parent, set()).add(entry)
    del entries[Path()]
    assert {str(folder): len(found) for folder, found in entries.items() if len(found) > 20} == {}


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_house_is_as_small_as_it_promises():
    sizes = {
        "the reader's path": (sum(map(n_lines, READERS_PATH)), 1500),
        "train.py": (n_lines(ROOT / "train.py"), 170),
        "README.md": (n_lines(ROOT / "README.md"), 200),
        # It was 10,059 and 9,507; then came GPU programs, the report of a machine, a container's
        # memory, settings to debug JAX with, a GPT-2 and its tokenizer of unlike sizes, waiting for
        # processes that never come, a run that starts from another and then stands alone, noise in
        # the tokens read, a result for scripts, --minutes, samples. The goal is 8,500.
        "the package": (sum(map(n_lines, MODULES)), 10_324),
    }
    assert {name: size for name, size in sizes.items() if size[0] > size[1]} == {}


def test_every_face_says_what_its_package_is_for():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def in_a_process(script: str, *argv: str) -> str:
    """Run a script in a process of its own, in the repository; return what it prints."""
    command = [sys.executable, "-c", script, *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_data_and_config_errors_need_no_jax():
    """What train.py, sample.py and data/prepare.py import, and every package's face.

    The package itself imports none of its own modules.
    """
    script = """
import importlib, json, runpy, sys
import nanogpt_jax
heavy = ("jax", "jaxlib", "flax", "optax", "orbax", "matplotlib", "tyro", "huggingface_hub")
brought = {"nanogpt_jax": [name for name in sys.modules if name.startswith("nanogpt_jax.")]}
for name in sys.argv[1:]:
    before = set(sys.modules)
    if name.endswith(".py"):
        runpy.run_path(name)
    else:
        importlib.import_module(name)
    brought[name] = [module for module in heavy if module in set(sys.modules) - before]
print(json.dumps(brought))
"""
    faces = [f"nanogpt_jax.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.py"))]
    files = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    brought = json.loads(in_a_process(script, *faces, *files))
    assert {name: modules for name, modules in brought.items() if modules} == {}


def test_what_needs_no_jax_does_not_mention_it():
    libraries = {"jax", "jaxlib", "flax", "optax", "orbax"}
    for name, path in NAMES.items():
        if place_of(name) in WITHOUT_JAX:
            assert not {full.partition(".")[0] for full in imported(path)} & libraries, name


def test_importing_changes_nothing_in_the_process():
    """Libraries are imported first, so that what they change does not count."""
    script = """
import importlib, logging, os, signal, sys, threading, warnings
for name in sys.argv[1].split():
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import jax

def snapshot():
    loggers = {name: x for name, x in logging.root.manager.loggerDict.items()
               if isinstance(x, logging.Logger)} | {"": logging.root}
    found = {f"logger {name}": (x.level, x.disabled, x.propagate, [*x.handlers], [*x.filters])
             for name, x in loggers.items()}
    found |= {f"variable {name}": value for name, value in os.environ.items()}
    found |= {f"jax {name}": value for name, value in jax.config.values.items()}
    found |= {f"signal {n}": signal.getsignal(n) for n in signal.valid_signals()}
    for name in ("unraisablehook", "excepthook", "displayhook", "stdout", "stderr", "argv", "path"):
        value = getattr(sys, name)
        found[f"sys.{name}"] = [*value] if isinstance(value, list) else value
    found |= {"warnings": [*warnings.filters], "threads": threading.active_count()}
    found |= {"threading.excepthook": threading.excepthook, "folder": os.getcwd()}
    return found

before = snapshot()
for name in sys.argv[2:]:
    importlib.import_module(name)
after = snapshot()
for name in sorted(after.keys() | before.keys()):
    was = before.get(name, (0, False, True, [], []) if name.startswith("logger") else None)
    if after.get(name) != was:
        print(name, was, after.get(name))
"""
    names = [name for name in sorted(NAMES) if name not in ("nanogpt_jax", "__main__")]
    libraries = {full for path in MODULES for full in imported(path, only_at_import=True)}
    ours = sys.stdlib_module_names | {"nanogpt_jax"}
    third_party = sorted(name for name in libraries if name.partition(".")[0] not in ours)
    modules = ["nanogpt_jax", *(f"nanogpt_jax.{name}" for name in names)]
    assert in_a_process(script, " ".join(third_party), *modules) == ""


def test_nothing_reads_or_writes_pickles_and_nothing_imports_pytorch():
    assert {path.name for path in SCRIPTS} >= {"train.py", "sample.py", "prepare.py"}
    for path in [*MODULES, *SCRIPTS]:
        assert not {full.partition(".")[0] for full in imported(path)} & (PICKLES | PYTORCH), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, path
                words = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
                assert not words & PICKLES, path
