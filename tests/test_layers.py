"""The house: a module imports only from below, JAX and pickle stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nanogpt_jax

PACKAGE = Path(nanogpt_jax.__file__).parent
ROOT = Path(__file__).parent.parent
LAYERS = (
    {"errors", "files"},
    {"config", "tokenizer", "data", "download", "hub", "sources", "shards", "costs", "chips"}
    | {"profiling", "stopping", "places"},
    {"command_line", "choice", "documents", "preparation", "opening", "run_folder", "counts"}
    | {"references", "optim", "startup", "devices", "mesh", "attention", "huggingface", "weights"},
    {"corpora", "presets", "model", "report", "loggers", "views", "loader"},
    {"steps", "generate", "rungs", "accounting", "answers", "race"},
    {"checkpoint", "progress", "sharding", "inspection"},
    {"programs", "player", "pretrained"},
    {"bench", "tpu", "lecture", "web"},
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
WITHOUT_JAX = {"errors", "files", "config", "tokenizer", "data", "download", "chips", "startup"}
WITHOUT_JAX |= {"command_line", "presets", "corpora", "run_folder", "counts", "references"}
WITHOUT_JAX |= {"sources", "shards", "costs", "choice", "documents", "preparation", "opening"}
WITHOUT_JAX |= {"stopping", "places", "hub", "huggingface", "weights", "pretrained"}
WITHOUT_JAX |= {"accounting", "report", "loggers", "views", "answers", "web"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "data").glob("*.py"))]
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PYTORCH = {"torch", "transformers"}  # only its files are read and written


def imported_modules(path: Path) -> set[str]:
    """Return full names of all that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["nanogpt_jax" if node.level else "", node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def imported_layers(path: Path) -> dict[str, int]:
    names = {name.split(".")[1] for name in imported_modules(path) if name[:12] == "nanogpt_jax."}
    return {name: LAYER_OF[name] for name in names if (PACKAGE / f"{name}.py").exists()}


def test_every_module_has_a_layer():
    assert {*MODULES} - {"__init__"} <= LAYER_OF.keys()
    assert not [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]


@pytest.mark.parametrize("module", sorted({*MODULES} & LAYER_OF.keys()))
def test_a_module_imports_only_from_lower_layers(module):
    above = {
        name: layer
        for name, layer in imported_layers(PACKAGE / f"{module}.py").items()
        if layer >= LAYER_OF[module]
    }
    assert not above


def test_imports_are_found_however_they_are_written(tmp_path):
    """What the test above cannot see, it cannot forbid."""
    path = tmp_path / "module.py"
    path.write_text(
        "import nanogpt_jax.model\n"
        "from nanogpt_jax import steps as s\n"
        "from . import progress\n"
        "def f():\n    from nanogpt_jax.corpora.catalog import Corpus\n    from .optim import lr\n"
    )
    assert imported_layers(path).keys() == {"model", "steps", "progress", "corpora", "optim"}


def test_the_package_itself_imports_nothing():
    assert not imported_modules(PACKAGE / "__init__.py")


def test_modules_without_jax_do_not_import_it():
    script = (
        "import importlib, sys\n"
        "before = set(sys.modules)\n"
        "import nanogpt_jax\n"
        "assert set(sys.modules) - before == {'nanogpt_jax'}, set(sys.modules) - before\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(f'nanogpt_jax.{name}')\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *sorted(WITHOUT_JAX)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert "nanogpt_jax" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "optax", "orbax", "matplotlib", "tyro"}


@pytest.mark.parametrize(
    "path", [*(PACKAGE / f"{name}.py" for name in MODULES), *SCRIPTS], ids=lambda path: path.stem
)
def test_nothing_reads_or_writes_pickles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {name.split(".")[0] for name in imported_modules(path)} & PICKLES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}
            assert not {arg.value for arg in node.args if isinstance(arg, ast.Constant)} & PICKLES


@pytest.mark.parametrize(
    "path", [*(PACKAGE / f"{name}.py" for name in MODULES), *SCRIPTS], ids=lambda path: path.stem
)
def test_nothing_imports_pytorch(path):
    assert not {name.split(".")[0] for name in imported_modules(path)} & PYTORCH


def test_the_scripts_exist_that_are_searched_for_pickles():
    assert {path.name for path in SCRIPTS} >= {"train.py", "sample.py", "prepare.py"}
