"""The package as it is installed: its wheel, and the oldest versions that it supports."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nanogpt_jax

ROOT = Path(__file__).parent.parent
SOURCES = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("nanogpt_jax/**/*.py")}
STYLE = "nanogpt_jax/web/page.css"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TOOLS = {"test", "browser"}  # of contributors, who take the newest
# Imports each module that it is given, and prints its file.
IMPORT = """
import importlib, sys
import nanogpt_jax
nanogpt_jax.load, nanogpt_jax.generate
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


def pins(file: str) -> dict[str, str]:
    """Return the version of each package in a file of .ci that has the same on every Python."""
    lines = (ROOT / ".ci" / file).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in (x.partition("#")[0] for x in lines) if line]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in requirements
        if one.marker is None
    }


def floors(requirements: list[str]) -> dict[str, str]:
    """Return the oldest version of each package, which is all that a requirement may state."""
    found = {}
    for requirement in map(Requirement, requirements):
        (specifier,) = requirement.specifier
        assert specifier.operator == ">=", requirement
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def test_every_floor_is_a_version_that_ci_tests():
    extras = [line for extra in EXTRAS.keys() - TOOLS - {"web"} for line in EXTRAS[extra]]
    oldest = floors(PROJECT["dependencies"] + extras)
    assert oldest.items() <= pins("floors.txt").items()
    # Gradio needs a newer huggingface_hub than the oldest, and is tested with the newest.
    assert floors(EXTRAS["web"]).items() <= pins("constraints.txt").items()


def test_the_minimum_of_jax_is_the_same_with_every_accelerator():
    (jax,) = {floors(EXTRAS[extra])["jax"] for extra in ("cuda12", "cuda13", "tpu")}
    assert jax == floors(PROJECT["dependencies"])["jax"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a copy: setuptools leaves folders where it builds."""
    folder = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
        elif path.name in ("nanogpt_jax", "tests"):
            shutil.copytree(path, folder / path.name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_every_module_and_the_pages_style_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = f"nanogpt_jax-{nanogpt_jax.__version__}.dist-info"
        assert {name for name in names if not name.startswith(f"{about}/")} == SOURCES | {STYLE}
        assert f"{about}/licenses/LICENSE" in names
        assert "License-Expression: MIT" in archive.read(f"{about}/METADATA").decode()


@pytest.mark.slow
def test_every_module_can_be_imported_from_the_installed_wheel(wheel, tmp_path):
    """In an environment of its own, which finds only the dependencies in that of the tests."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    # An editable install there is not seen: its own .pth file is not read.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*argv) -> str:
        result = subprocess.run(
            [python, *argv],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    run("-m", "pip", "install", "--no-index", "--no-deps", wheel)
    site_packages = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(others), encoding="utf-8")
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in sorted(SOURCES)]
    files = run("-c", IMPORT, *modules).splitlines()
    assert files == [str(site_packages / name) for name in sorted(SOURCES)]
