"""A run on several devices is the run on one: same batches, same dropout, same losses."""

import dataclasses

import jax
import numpy as np
import pytest

from nanogpt_jax import data, sharding, steps
from nanogpt_jax.bench.step import compile_train_step, jit_steps
from nanogpt_jax.config import MODERN, PRESETS, ModelConfig
from nanogpt_jax.hardware import choose_compute, needed_bytes

N_STEPS = 30
CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    batch_size=8,
    gradient_accumulation_steps=2,
    max_iters=N_STEPS,
    model=ModelConfig(
        block_size=16, vocab_size=12, n_layer=1, n_head=2, n_embd=16, dropout=0.2, bias=True
    ),
)
MODERN_CONFIG = dataclasses.replace(
    CONFIG,
    max_iters=10,
    model=dataclasses.replace(CONFIG.model, bias=False, **MODERN),
    optim=dataclasses.replace(PRESETS["small-fast"].optim, learning_rate=1e-2),
)
TOKENS = np.random.default_rng(0).integers(0, 12, 500).cumsum().astype(np.uint16) % 12


def jit(config, sizes=(1, 1, 1)):
    mesh = sharding.make_mesh(sizes)
    compute, _ = choose_compute(config.compute, config.model, jax.devices()[0], mesh)
    return mesh, jit_steps(config, compute, mesh)


def run(sizes, config=CONFIG):
    """Train as train.py does; return (jitted, state, losses, gradient norms, validation loss)."""
    mesh, jitted = jit(config, sizes)
    init_key, dropout_key = steps.stream_keys(config.seed)
    state = jitted.init_state(init_key)
    block_size, shape = config.model.block_size, (config.gradient_accumulation_steps, 8)
    batches = data.TrainLoader(TOKENS, config.seed, block_size, shape, mesh)
    metrics = []
    for _ in range(config.max_iters):
        state, latest = jitted.train_step(state, next(batches), dropout_key)
        metrics.append(jax.device_get(latest))
    val_batches = data.EvalLoader(TOKENS, block_size, 8, mesh)
    val_loss = steps.evaluate(jitted.eval_step, state.params, val_batches)
    losses, grad_norms, *_ = np.array(metrics).T
    return jitted, state, losses, grad_norms, val_loss


@pytest.fixture(scope="module", autouse=True)
def compiled_fast():
    """Compile in a third of the time; the functions compared here are all compiled so."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def on_one(compiled_fast):
    return run((1, 1, 1))


SLOW_MESHES = [
    pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(4, 1, 1), (1, 4, 1), (2, 2, 1)]
]


@pytest.mark.parametrize("sizes", [(1, 2, 2), *SLOW_MESHES], ids=str)
def test_any_mesh_gives_the_losses_of_one_device(on_one, sizes):
    _, state, losses, grad_norms, val_loss = run(sizes)
    assert len(state.params["wte"]["embedding"].devices()) == 4
    np.testing.assert_allclose(losses, on_one[2], atol=1e-5)
    np.testing.assert_allclose(grad_norms, on_one[3], rtol=1e-4)
    assert val_loss == pytest.approx(on_one[4], abs=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_a_modern_gpt_with_muon_the_losses_of_one_device():
    """Muon looks at a matrix as a whole, of which each device holds a part."""
    _, _, losses_on_one, _, val_loss_on_one = run((1, 1, 1), MODERN_CONFIG)
    _, state, losses, _, val_loss = run((1, 2, 2), MODERN_CONFIG)
    kernel = state.params["h_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    assert state.step == 10
    np.testing.assert_allclose(losses, losses_on_one, atol=1e-5)
    assert losses[9] < losses[0] - 0.01
    assert val_loss == pytest.approx(val_loss_on_one, abs=1e-5)


def test_a_whole_run_compiles_one_training_and_one_evaluation_step(on_one):
    """Nothing is compiled again for a later step, a last batch or a new state."""
    jitted = on_one[0]
    assert jitted.train_step._cache_size() == 1
    assert jitted.eval_step._cache_size() == 1


def test_a_step_compiled_from_shapes_alone_is_the_step_that_trains(on_one):
    """So bench, --compile_for and train.py speak of the same step; the state is donated to it."""
    mesh, jitted = jit(CONFIG)
    compiled = compile_train_step(CONFIG, jitted, mesh, len(TOKENS))
    init_key, dropout_key = steps.stream_keys(CONFIG.seed)
    state = jitted.init_state(init_key)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.dtype != "key<fry>")
    assert state_bytes < needed_bytes(compiled) < 50 * state_bytes
    assert compiled.memory_analysis().alias_size_in_bytes > 0.9 * state_bytes
    batches = data.TrainLoader(TOKENS, CONFIG.seed, CONFIG.model.block_size, (2, 8), mesh)
    _, metrics = compiled(state, next(batches), dropout_key)
    assert metrics.loss == on_one[2][0]


@pytest.mark.slow
def test_sent_windows_give_the_loss_of_a_corpus_on_the_device(on_one, monkeypatch):
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    mesh, jitted = jit(CONFIG)
    compiled = compile_train_step(CONFIG, jitted, mesh, None)
    init_key, dropout_key = steps.stream_keys(CONFIG.seed)
    batches = data.TrainLoader(TOKENS, CONFIG.seed, CONFIG.model.block_size, (2, 8), mesh)
    batch = next(batches)
    batches.close()
    assert batch.corpus is None
    _, metrics = compiled(jitted.init_state(init_key), batch, dropout_key)
    assert metrics.loss == pytest.approx(float(on_one[2][0]), abs=1e-6)
