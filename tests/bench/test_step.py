"""The step that is timed, sized and compiled for absent chips is the one that trains."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from nanogpt_jax import bench, data, sharding, steps
from nanogpt_jax.bench.step import compile_step, new_state
from nanogpt_jax.config import PRESETS, ModelConfig
from nanogpt_jax.hardware import choose, needed_bytes, steps_per_call
from nanogpt_jax.model import Compute
from nanogpt_jax.optim import make_optimizer

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    batch_size=4,
    gradient_accumulation_steps=2,
    model=ModelConfig(block_size=16, vocab_size=12, n_layer=1, n_head=2, n_embd=16, dropout=0.2),
)
TOKENS = np.random.default_rng(0).integers(0, 12, 500).astype(np.uint16)


def first_batch(mesh):
    shape = CONFIG.gradient_accumulation_steps, CONFIG.batch_size
    n_steps = steps_per_call(CONFIG)
    loader = data.train_batches(
        TOKENS, CONFIG.seed, CONFIG.model.block_size, shape, mesh, 0, n_steps
    )
    batch = next(loader)
    loader.close()
    return batch


@pytest.fixture(scope="module")
def loss_of_the_step():
    """The loss of the first update, by steps.train_step on one device."""
    model = steps.make_model(CONFIG.model)
    tx = make_optimizer(CONFIG.optim, CONFIG.max_iters)
    init_key, dropout_key = steps.stream_keys(CONFIG.seed)
    mesh = sharding.make_mesh()

    @jax.jit
    def first_update(batch):
        state = steps.init_state(tx, steps.init_params(model, init_key))
        windows = data.gather(batch, CONFIG.model.block_size + 1)[0]
        return steps.train_step(model, tx, state, windows, dropout_key)[1].loss

    return first_update(first_batch(mesh))


@pytest.mark.parametrize("resident_bytes", [0, 2**20], ids=["windows sent", "corpus on the device"])
def test_a_step_compiled_from_shapes_alone_is_the_step_that_trains(
    loss_of_the_step, monkeypatch, resident_bytes
):
    """On a mesh, too; and the state is donated to it."""
    monkeypatch.setattr(data, "RESIDENT_BYTES", resident_bytes)
    mesh = sharding.make_mesh((1, 2, 2) if resident_bytes else (1, 1, 1))
    n_tokens = len(TOKENS) if resident_bytes else None
    compiled = compile_step(CONFIG, Compute(mesh=mesh), mesh, n_tokens)
    state = new_state(CONFIG, mesh)
    assert len(state.params["wte"]["embedding"].devices()) == mesh.size
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    device_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)
    assert device_bytes < needed_bytes(compiled) < 50 * device_bytes
    assert compiled.memory_analysis().alias_size_in_bytes > 0.9 * device_bytes
    batch = first_batch(mesh)
    assert (batch.corpus is None) == (n_tokens is None)
    _, metrics = compiled(state, batch, steps.stream_keys(CONFIG.seed)[1])
    assert metrics.loss[0] == pytest.approx(float(loss_of_the_step), abs=1e-5)


@pytest.mark.parametrize("resident_bytes", [0, 2**20], ids=["windows sent", "corpus on the device"])
@pytest.mark.slow
def test_an_update_is_timed_in_calls_as_train_makes_them(monkeypatch, resident_bytes):
    """A call makes ten of these updates."""
    monkeypatch.setattr(data, "RESIDENT_BYTES", resident_bytes)
    assert steps_per_call(CONFIG) == 10
    start_s = time.perf_counter()
    tokens = TOKENS.astype(np.uint32)  # as prepared for a larger vocabulary
    compile_s, step_s = bench.time_step(CONFIG, choose(CONFIG), tokens)
    assert 0 < compile_s + 3 * 10 * step_s < 1.5 * (time.perf_counter() - start_s)
    assert step_s < compile_s
