"""A run laid over several devices is the run on one: same batches, same dropout, same losses."""

import dataclasses

import jax
import numpy as np
import pytest
from nanogpt_jax.programs import make_programs

from nanogpt_jax import data, steps
from nanogpt_jax import mesh as meshes
from nanogpt_jax.config import ModelConfig, presets
from nanogpt_jax.hardware import devices

N_STEPS = 50
CONFIG = dataclasses.replace(
    presets.tiny(),
    batch_size=8,
    gradient_accumulation_steps=2,
    max_iters=N_STEPS,
    model=ModelConfig(
        block_size=16, vocab_size=12, n_layer=2, n_head=2, n_embd=16, dropout=0.2, bias=True
    ),
)
TOKENS = np.random.default_rng(0).integers(0, 12, 500).cumsum().astype(np.uint16) % 12


MODERN = dataclasses.replace(
    CONFIG,
    max_iters=10,
    model=dataclasses.replace(CONFIG.model, bias=False, n_layer=1, **presets.MODERN),
    optim=dataclasses.replace(presets.small_fast().optim, learning_rate=1e-2),
)


def run(sizes, config=CONFIG, **compute):
    """Train as train.py does, and return (state, metrics, mean validation loss)."""
    mesh = meshes.make_mesh(sizes)
    asked = dataclasses.replace(config.compute, **compute)
    chosen, _ = devices.choose(asked, config.model, jax.devices()[0], mesh)
    programs = make_programs(config, chosen, mesh)
    init_key, dropout_key = steps.stream_keys(config.seed)
    state = programs.init_state(init_key)
    block_size, shape = config.model.block_size, (config.gradient_accumulation_steps, 8)
    batches = data.TrainBatches(TOKENS, config.seed, block_size, shape, config.max_iters)
    corpus = meshes.put_corpus(TOKENS, mesh)
    offsets_NAB = batches.offsets(0, batches.most_steps)
    places_NAB = meshes.put_places(
        TOKENS, offsets_NAB, block_size + 1, meshes.by_rows(mesh, axis=2)
    )
    n_steps = np.int32(batches.most_steps)
    state, metrics = programs.train_steps(state, corpus, places_NAB, n_steps, dropout_key)
    offsets_NB, counts_NB = data.eval_batches(TOKENS, block_size, 8)
    by_rows = meshes.by_rows(mesh, axis=1)
    places_NB = meshes.put_places(TOKENS, offsets_NB, block_size + 1, by_rows)
    counts_NB = meshes.put(counts_NB, by_rows)
    n = np.int32(len(counts_NB))
    sums, counts = programs.eval_steps(state.params, corpus, places_NB, counts_NB, np.int32(0), n)
    return state, metrics, sums.sum() / counts.sum()


@pytest.fixture(scope="module")
def on_one():
    return run((1, 1, 1))


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)], ids=str)
def test_any_mesh_gives_the_losses_of_one_device(on_one, sizes):
    state, metrics, val_loss = run(sizes)
    assert len(state.params["wte"]["embedding"].devices()) == 4
    np.testing.assert_allclose(metrics.loss, on_one[1].loss, atol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, on_one[1].grad_norm, rtol=1e-4)
    assert float(val_loss) == pytest.approx(float(on_one[2]), abs=1e-5)


def test_a_mesh_gives_a_modern_gpt_with_muon_the_losses_of_one_device():
    """Muon looks at a matrix as a whole, of which each device holds a part."""
    _, on_one, val_loss_on_one = run((1, 1, 1), MODERN)
    state, metrics, val_loss = run((1, 2, 2), MODERN)
    kernel = state.params["h_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4
    assert state.step == 10
    np.testing.assert_allclose(metrics.loss[:10], on_one.loss[:10], atol=1e-5)
    assert metrics.loss[9] < metrics.loss[0] - 0.01
    assert float(val_loss) == pytest.approx(float(val_loss_on_one), abs=1e-5)
