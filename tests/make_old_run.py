"""Make tests/fixtures/run_v1: a run in today's format, which every later version must read.

    python tests/make_old_run.py

It was made with the oldest supported versions, since newer ones read older files. Make it again
only for a change of format that drops such runs: then it gets another number.
"""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp

import nanogpt_jax
from nanogpt_jax.run import plots, read_metrics

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "fixtures" / "run_v1"
TEXT = "".join(f"a cat sat on {what}.\n" for what in ("a mat", "a hat", "me", "tom") * 25)
TRAIN = [
    *("--config=tiny", "--n_layer=1", "--n_embd=4", "--n_head=2", "--block_size=16", "--seed=1"),
    *("--learning_rate=0.05", "--decay_lr=False", "--lr_decay_iters=140", "--mesh=data=1"),
    *("--eval_interval=20", "--log_interval=20", "--dataset=text.txt", "--out_dir=run"),
]
N_STEPS, N_STEPS_MORE = 140, 10  # the best checkpoint is then not the newest
RESUME = "--log_interval=1", "--eval_interval=1000", f"--max_iters={N_STEPS + N_STEPS_MORE}"
SAMPLE = "--out_dir=run", "--num_samples=1", "--max_new_tokens=60", "--temperature=0"


def load(name: str):
    """Return a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, sample = load("train"), load("sample")


def printed_by(main, argv: list[str]) -> str:
    """Return what a command prints, which must succeed."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert not main(list(argv))
    return stdout.getvalue()


def logits_of(folder: Path, checkpoint: str) -> list[list[float]]:
    """Return the logits, (T, V), of the first positions of the text."""
    run = nanogpt_jax.load(folder, checkpoint=checkpoint)
    ids = run.tokenizer.encode(TEXT)[: run.config.block_size]
    logits_BTV, _ = run.model.apply({"params": run.params}, jnp.asarray(ids)[None])
    return [[float(f"{logit:.9g}") for logit in logits_V] for logits_V in logits_BTV[0].tolist()]


def without_traces(folder: Path) -> None:
    """Remove from a run what is not part of its format: the picture, and its place and time."""
    (folder / "loss.png").unlink()
    for path in folder.rglob("commit_success.txt"):
        path.write_text(path.read_text().replace(f"{folder.absolute().parent}/", ""))
    for path in folder.rglob("_CHECKPOINT_METADATA"):
        timeless = re.sub(r'(timestamp_nsecs": )\d+', r"\g<1>1700000000000000000", path.read_text())
        path.write_text(timeless)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        run = Path("run")
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        print(printed_by(train.main, [*TRAIN, f"--max_iters={N_STEPS}"]))
        without_traces(run)
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(run, FOLDER / run)
        shutil.copy("text.txt", FOLDER)
        expected = {
            "logits": {name: logits_of(run, name) for name in ("best", "latest")},
            "sample": printed_by(sample.main, SAMPLE),
            "report": printed_by(plots.main, [str(run)]).splitlines()[0],
        }
        print(printed_by(train.main, [*TRAIN, *RESUME]))
        rows = read_metrics(run)
        expected["losses"] = [row["train_loss"] for row in rows if row["step"] > N_STEPS]
        (FOLDER / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")
