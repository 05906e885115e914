"""What only an NVIDIA GPU can show; skipped without one. Each test is a process of its own: the
others compute on the CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no NVIDIA GPU"),
]
GPU = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share it
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def start(*argv, **environment):
    ours = ("JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, *argv], env=inherited | GPU | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def computed(script):
    done = start("-c", f"import jax, json\nassert jax.default_backend() == 'gpu'\n{script}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fused_attention_is_attention_forward_and_backward():
    errors = computed("""
import jax.numpy as jnp
from nanogpt_jax.attention import attention
from nanogpt_jax.hardware.fused import fused_attention
qkv = [jax.random.normal(key, (2, 256, 4, 64)) for key in jax.random.split(jax.random.key(0), 3)]
def loss(work, *qkv):
    return (work(*qkv).astype(jnp.float32) ** 2).sum()
def both(work, dtype):
    arrays = [x.astype(dtype) for x in qkv]
    return jax.value_and_grad(lambda *x: loss(work, *x), argnums=(0, 1, 2))(*arrays)
exact = both(attention, jnp.float32)
fused = both(lambda *x: fused_attention(*x, kernel="cudnn"), jnp.bfloat16)
norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))
print(json.dumps([norm(a.astype(jnp.float32) - b) / norm(b)
                  for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(exact))]))
""")
    assert max(errors) < 0.02


def test_dropout_masks_are_those_of_a_cpu():
    assert computed("""
import numpy as np
from nanogpt_jax.attention import random_bits
bits = []
for platform in "cpu", "gpu":
    with jax.default_device(jax.devices(platform)[0]):
        bits.append(np.asarray(random_bits(jax.random.key(5), (3, 7, 63))).tolist())
print(json.dumps(bits[0] == bits[1]))
""")


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def train(folder, book, *flags, **environment):
    common = f"--out_dir={folder}", f"--dataset={book}", "--n_embd=64"
    done = start("train.py", "--config=tiny", "--block_size=64", *common, *flags, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_follows_the_cpu(tmp_path, book):
    printed = train(tmp_path / "gpu", book)
    assert "on gpu: " in printed
    assert "attention by cudnn" in printed
    train(tmp_path / "cpu", book, JAX_PLATFORMS="cpu")
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.03)


def test_a_stopped_run_continues_bit_for_bit(tmp_path, book):
    flags, ordered = ["--lr_decay_iters=60"], {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
    printed = train(tmp_path / "whole", book, *flags, **ordered)
    assert "attention by xla (cudnn needs" in printed
    train(tmp_path / "stopped", book, *flags, "--max_iters=30", **ordered)
    train(tmp_path / "stopped", book, *flags, "--max_iters=60", **ordered)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
