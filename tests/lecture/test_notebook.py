"""The lecture's notebook: its models are the package's, and it does what its outputs show."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, known_shakespeare, layers_of

from nanogpt_jax import steps
from nanogpt_jax.config import LECTURE_MODELS, ModelConfig

NOTEBOOK = ROOT / "nanogpt_jax" / "lecture" / "lecture.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
# What a trained model writes: rounding, which differs from one version to the next, changes it.
WRITTEN = {"evaluate", "generate", "write-another"}
DEFINING = ("linen", "model", "heads", "feedforward", "residual", "layernorm")


def source(cell) -> str:
    return "".join(cell["source"])


def printed(cell) -> str:
    """Return what a cell printed."""
    texts = (output["text"] for output in cell["outputs"] if output["output_type"] == "stream")
    return "".join("".join(text) for text in texts)


def pictures(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


@pytest.fixture(scope="module")
def names():
    """What is imported, and what the cells define that define modules."""
    cells = {cell["id"]: source(cell) for cell in CELLS}
    imports = [line for line in cells["imports"].splitlines() if re.match("import|from", line)]
    defined = {"V": 65}
    exec("\n".join([*imports, *(cells[name] for name in DEFINING)]), defined)
    return defined


@pytest.fixture(autouse=True)
def broadcasting():
    """As usual in JAX: the notebook adds positions_TD to x_BTD."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("architecture", LECTURE_MODELS[1:])
@pytest.mark.slow
def test_the_models_are_those_of_the_package(names, architecture):
    """The same logits with the same weights, which come in the same order."""
    Head, MultiHead, FeedForward = (names[name] for name in ("Head", "MultiHead", "FeedForward"))
    layers = {
        "head": [Head(32)],
        "multihead": [MultiHead(4)],
        "feedforward": [MultiHead(4), FeedForward()],
        "deep": [layer for _ in range(3) for layer in (MultiHead(4), FeedForward())],
        "residual": [names["ResidualBlock"](4) for _ in range(3)],
        "layernorm": [names["Block"](4) for _ in range(3)],
    }[architecture]
    ln_f = names["LayerNorm"]() if architecture == "layernorm" else None
    mine = names["LanguageModel"](layers, ln_f=ln_f)
    shape = layers_of(architecture, n_layer=3, n_head=4)
    config = ModelConfig(block_size=8, vocab_size=65, n_embd=32, **shape)
    theirs = steps.make_model(config)
    tokens_BT = jax.random.randint(jax.random.key(0), (4, 8), 0, 65)
    params = mine.init(jax.random.key(1), tokens_BT)["params"]
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), tokens_BT)["params"]
    leaves = jax.tree.leaves(params)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in jax.tree.leaves(shapes)]
    their_params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    logits_BTV, _ = theirs.apply({"params": their_params}, tokens_BT)
    np.testing.assert_allclose(mine.apply({"params": params}, tokens_BT), logits_BTV, atol=1e-5)


def test_weights_start_as_in_the_package(names):
    kernel = names["Linear"](1000).init(jax.random.key(0), jnp.ones((1, 400)))["params"]["kernel"]
    assert 0.049 < jnp.abs(kernel).max() <= 0.05  # 1 / sqrt(400)


def test_it_is_committed_with_its_outputs():
    codes = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == [*range(1, len(codes) + 1)]
    assert sum(map(pictures, codes)) == 2
    assert NOTEBOOK.stat().st_size < 400_000
    assert not re.search("error|warning", " ".join(map(printed, codes)), re.IGNORECASE)


def test_only_the_comparison_imports_the_package():
    pattern = re.compile("^(import|from) nanogpt_jax", re.MULTILINE)
    assert [cell["id"] for cell in CELLS if pattern.search(source(cell))] == ["package-compare"]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_gives_what_it_shows(tmp_path):
    """Its own cells compare losses with the video's; the rest is compared with its outputs.

    Without Shakespeare, only that it runs.
    """
    (tmp_path / "lecture.ipynb").write_bytes(NOTEBOOK.read_bytes())
    shakespeare = known_shakespeare()
    others = "".join(f"The {i * i % 97} cats sat on a mat, {i}.\n" for i in range(3000))
    text = shakespeare.read_text(encoding="utf-8") if shakespeare else others
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    ours = "XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION"  # of conftest.py
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = (
        "from nbclient.cli import main; main()",
        "--inplace",
        "--timeout=1200",
        "lecture.ipynb",
    )
    result = subprocess.run(
        [sys.executable, "-c", *command],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    cells = json.loads((tmp_path / "lecture.ipynb").read_text(encoding="utf-8"))["cells"]
    for shown, made in zip(CELLS, cells, strict=True):
        if made["cell_type"] == "code" and shakespeare:
            assert pictures(made) == pictures(shown)
            if made["id"] not in WRITTEN:
                assert_alike(printed(made), printed(shown))


def assert_alike(text: str, other: str) -> None:
    """Check that two texts have the same words, and numbers that differ in rounding only."""
    number = r"-?\d+\.\d*"
    assert re.sub(rf"\s*{number}", " 0", text) == re.sub(rf"\s*{number}", " 0", other)
    found, expected = (np.array(re.findall(number, each), float) for each in (text, other))
    np.testing.assert_allclose(found, expected, atol=0.03)
