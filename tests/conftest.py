"""Settings and fixtures for all tests: 4 virtual CPU devices, and rank promotion is an error."""

import atexit
import dataclasses
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

# Half of the suite's time is XLA's. Without its CPU optimizations it compiles a training step three
# times faster; float32 results differ in the last digits. Scripts that tests start (`run`) do
# without these flags: they compute what a user's would.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Workers and scripts share this folder, so equal functions are compiled once in a session.
if "NANOGPT_JAX_TEST_CACHE" not in os.environ:
    os.environ["NANOGPT_JAX_TEST_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["NANOGPT_JAX_TEST_CACHE"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["NANOGPT_JAX_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import numpy as np
import pytest

from nanogpt_jax.config import ModelConfig, TrainConfig, presets

ROOT = Path(__file__).parent.parent


def known_shakespeare() -> Path | None:
    """Return the file of tiny Shakespeare if it is at hand, without a network."""
    paths = [ROOT / "data" / "shakespeare_char" / "input.txt"]
    paths += [Path(path) for path in [os.environ.get("NANOGPT_JAX_SHAKESPEARE")] if path]
    return next((path for path in paths if path.exists()), None)


def layers_of(architecture: str, n_layer: int = 2, n_head: int = 2) -> dict:
    """Return fields of a ModelConfig that suit an architecture: its layers, heads and biases."""
    is_deep = architecture in ("gpt", "deep", "residual", "layernorm")
    has_heads = architecture not in ("bigram", "head")
    return {
        "architecture": architecture,
        "bias": architecture != "gpt",
        "n_layer": n_layer if is_deep else 1,
        "n_head": n_head if has_heads else 1,
    }


def random_params(model, std: float = 0.3):
    """Return parameters of a model without compiling its initialization."""
    import jax

    from nanogpt_jax import steps

    abstract = jax.eval_shape(lambda key: steps.init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape, scale=std), "f"), abstract
    )


@pytest.fixture
def model_config() -> ModelConfig:
    """A GPT that compiles in a second; all sizes differ, so no axis is mistaken for another."""
    return ModelConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12)


@pytest.fixture
def tiny_config(model_config) -> TrainConfig:
    """The preset `tiny` with that model."""
    return dataclasses.replace(presets.TINY, model=model_config)


@pytest.fixture
def book(tmp_path) -> Path:
    """A text file of 6000 characters, 20 distinct."""
    words = ["the", "cat", "sat", "on", "mat", "and", "ate", "a", "rat,", "then", "it", "left.\n"]
    text = " ".join(words[(i * i + i // 7) % len(words)] for i in range(3000))[:6000]
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path):
    """Run a script of the repository, or a module, in an empty folder.

    For example run("train.py", "--config", "tiny") or run("-m", "nanogpt_jax", "report").
    """

    def run_script(script: str, *argv: str, **kwargs) -> subprocess.CompletedProcess:
        command = [sys.executable, script if script == "-m" else str(ROOT / script)]
        one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        kwargs = {"cwd": tmp_path, "text": True, "capture_output": True, "timeout": 300} | kwargs
        kwargs = {"env": one_device} | kwargs
        return subprocess.run([*command, *map(str, argv)], check=False, **kwargs)

    return run_script


@pytest.fixture
def read_only(tmp_path):
    """A folder on a read-only file system, where not even root can write."""
    place = tmp_path / "read_only"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def hub(monkeypatch):
    """Put files on the Hub: hub({name: bytes, or an error}) -> what is asked for from then on."""
    import huggingface_hub

    pytest.importorskip("pyarrow.parquet")
    asked, stored = [], {}

    class Api:
        def dataset_info(self, repository, timeout):
            assert timeout
            asked.append(repository)
            names = [SimpleNamespace(rfilename=name) for name in stored]
            return SimpleNamespace(sha=f"sha{asked.count(repository)}", siblings=names)

    class System:
        def open(self, path):
            asked.append(path)
            content = next(stored[name] for name in stored if path.endswith(f"/{name}"))
            if isinstance(content, Exception):
                raise content
            return io.BytesIO(content)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", System)

    def store(files):
        stored.clear()
        stored.update(files)
        return asked

    return store
