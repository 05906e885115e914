"""The notebook, run from start to end as on Colab, but with `tiny` and a short text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_jax.run.plots import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "colab.ipynb"
# Changes to the cell of parameters.
CHANGES = {
    "INSTALL": False,
    "CONFIG": "tiny",
    "BIG_CONFIG": "lecture-bigram",
    "BIG_ON": ("cpu",),
    "START": "the cat",
}
# The stop button, or a disconnect, interrupts a run that would not end by itself; it resumes.
STOPPED = """
folder = f"{RUNS}/stopped"
long = "--config=tiny", "--lr_decay_iters=60", "--eval_interval=100000"
train(folder, *long, "--max_iters=10000000", stop_at=10)
stopped_at = last_step(folder)
train(folder, *long, f"--max_iters={stopped_at + 20}")
print("stopped at", stopped_at, "then", last_step(folder))
"""


def source(cell):
    return "".join(cell["source"])


def parameters(cell):
    return "parameters" in cell["metadata"].get("tags", [])


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def executed(notebook, tmp_path_factory):
    """Return (cells, folder): the executed notebook, in a checkout with its own data."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in "train.py", "sample.py", "nanogpt_jax":
        (folder / name).symlink_to(ROOT / name)
    words = ["the", "cat", "sat", "on", "a", "mat.\n"]
    text = " ".join(words[i * i % 7 % 6] for i in range(3000))
    for name in "data/shakespeare_char/input.txt", "mine.txt":
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    changes = CHANGES | {"RUNS": str(folder / "runs"), "TEXT": str(folder / "mine.txt")}
    for cell in notebook["cells"]:
        if parameters(cell):
            assigned = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
            cell["source"] = f"{source(cell)}\n{assigned}"
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    notebook["cells"].append({**code, "id": "stopped", "source": STOPPED})
    (folder / "colab.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", "from nbclient.cli import main; main()", "--inplace", "colab.ipynb"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "colab.ipynb").read_text(encoding="utf-8"))["cells"], folder


def printed(cell):
    return "".join(
        "".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"
    )


def cell_with(cells, text):
    return next(c for c in cells if c["cell_type"] == "code" and text in source(c))


def test_every_cell_ran(executed):
    cells, _ = executed
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")


def test_it_trains_samples_and_shows_the_curve_inline(executed):
    cells, folder = executed
    for config in "tiny", "lecture-bigram", "tiny-mine":
        assert read_metrics(folder / "runs" / config)[-1]["val_loss"] < 3
    pictures = [
        cell for cell in cells if cell["cell_type"] == "code"
        and any("image/png" in output.get("data", {}) for output in cell["outputs"])
    ]  # fmt: skip
    assert len(pictures) == 5
    text = printed(cell_with(cells, 'nanogpt_jax.load(f"{RUNS}/{CONFIG}")'))
    assert text.count("the cat") >= 2


def test_training_again_says_that_the_run_is_complete(executed):
    """Running the notebook again in the next session loses nothing."""
    cells, _ = executed
    again = [c for c in cells if c["cell_type"] == "code" and 'f"--config={CONFIG}")' in source(c)]
    assert "is complete: 60 steps are done" in printed(again[0])


def test_the_stop_button_saves_and_the_run_resumes(executed):
    cells, folder = executed
    output = printed(cells[-1])
    assert "saved: the same command resumes from there" in output
    rows = read_metrics(folder / "runs" / "stopped")
    stopped_at, end = (int(word) for word in output.splitlines()[-1].split() if word.isdecimal())
    assert f"resuming {folder / 'runs' / 'stopped'} from step" in output
    assert end == stopped_at + 20
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


def test_it_is_committed_without_outputs_and_opens_on_a_gpu(notebook):
    source_cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in source_cells)
    assert sum(parameters(cell) for cell in source_cells) == 1
    assert notebook["metadata"]["accelerator"] == "GPU"


def test_colabs_jax_is_never_upgraded(notebook):
    """pip keeps what satisfies the floors; a cell compares the versions of jax and its plugins."""
    code = "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert "%pip install -q -e .\n" in code
    assert "-U" not in code
    assert "--upgrade" not in code
    assert 'raise RuntimeError(f"pip changed' in code
