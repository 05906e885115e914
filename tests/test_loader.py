"""The feeds give a run the batches of its steps, wherever the corpus lies."""

import threading
import time

import jax
import numpy as np
import pytest
from nanogpt_jax.loader import EvalFeed, ReadAhead, TrainFeed

from nanogpt_jax import data, loader, steps
from nanogpt_jax import mesh as meshes

BLOCK_SIZE = 8
SHAPE = (2, 4)
TOKENS = np.random.default_rng(0).integers(11, size=500).astype(np.uint16)
MESHES = ((1, 1, 1), (4, 1, 1), (2, 2, 1), (1, 1, 4))


@pytest.fixture(params=MESHES, ids=str)
def mesh(request):
    return meshes.make_mesh(request.param)


@pytest.fixture(params=["on the device", "read ahead"])
def place(request, monkeypatch):
    if request.param == "read ahead":
        monkeypatch.setattr(data, "is_resident", lambda tokens: False)
    return request.param


def train_feed(mesh, first_step=0, most_steps=5) -> TrainFeed:
    return TrainFeed(TOKENS, 1337, BLOCK_SIZE, SHAPE, mesh, first_step, most_steps)


def batch_of(step: int) -> np.ndarray:
    """The batch of a step by its definition: batch_ABT1."""
    offsets = data.batch_offsets(1337, "train", step, len(TOKENS), BLOCK_SIZE, SHAPE)
    return TOKENS[offsets[..., None] + np.arange(BLOCK_SIZE + 1)]


def test_each_step_is_given_its_own_batch(mesh, place):
    feed = train_feed(mesh, first_step=7)
    step = 7
    for n_steps in (0, 1, 5, 2, 3):
        places_NAB = feed.places(n_steps)
        windows = np.asarray(steps.read_windows(feed.corpus, places_NAB, BLOCK_SIZE + 1))
        assert windows.shape == (5, *SHAPE, BLOCK_SIZE + 1)
        for i in range(n_steps):
            np.testing.assert_array_equal(windows[i], batch_of(step + i))
        step += n_steps
    feed.close()


def test_places_lie_where_rows_are_shared_out(mesh, place):
    feed = train_feed(mesh)
    assert feed.places(2).sharding.is_equivalent_to(
        meshes.by_rows(mesh, axis=2), 3 + (place == "read ahead")
    )
    feed.close()


def test_a_process_reads_only_the_rows_of_its_devices():
    """Of a mesh of which only some devices are its own."""
    mesh = meshes.make_mesh((4, 1, 1))
    of_all = loader.local_rows(meshes.by_rows(mesh, axis=2), (5, 2, 8))
    assert of_all == slice(0, 8)

    class OfOneHost:
        def addressable_devices_indices_map(self, shape):
            whole = meshes.by_rows(mesh, axis=2).devices_indices_map(shape)
            return {device: whole[device] for device in list(whole)[2:]}

    assert loader.local_rows(OfOneHost(), (5, 2, 8)) == slice(4, 8)


def test_windows_are_read_while_nothing_is_asked_for():
    read, enough = [], threading.Event()

    def note(step):
        read.append(step)
        if len(read) == 4:
            enough.set()
        return np.int64(step)

    ahead = ReadAhead(note, first_step=3, ahead=4)
    assert enough.wait(timeout=30)
    assert ahead.take(2) == [3, 4]
    assert ahead.take(3) == [5, 6, 7]
    ahead.close()
    assert read == sorted(set(read))


def test_no_more_is_read_ahead_than_may_be():
    read = []
    ahead = ReadAhead(read.append, first_step=0, ahead=3)
    time.sleep(0.2)
    assert read == [0, 1, 2]
    ahead.close()


def test_what_reading_raises_is_raised_where_it_is_asked_for():
    def fail(step):
        if step == 1:
            raise ValueError("the disk is gone")
        return step

    ahead = ReadAhead(fail, first_step=0, ahead=3)
    assert ahead.take(1) == [0]
    with pytest.raises(ValueError, match="the disk is gone"):
        ahead.take(1)
    ahead.close()


def test_a_closed_feed_leaves_no_thread_behind(place):
    feed = train_feed(meshes.make_mesh((1, 1, 1)))
    feed.close()
    assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


@pytest.mark.parametrize("n_batches", [0, 3])
def test_an_evaluation_is_the_mean_over_its_targets(mesh, place, n_batches):
    feed = EvalFeed(TOKENS, BLOCK_SIZE, 4, mesh, n_batches)
    offsets_NB, counts_NB = data.eval_batches(TOKENS, BLOCK_SIZE, 4, n_batches)
    assert feed.n_targets == counts_NB.sum()

    def eval_steps(params, corpus, places_NB, counts_NB, first, n):
        """The loss of a target is its id times a parameter."""
        asked = (np.arange(len(counts_NB)) >= first) & (np.arange(len(counts_NB)) < first + n)
        counts_NB = np.where(asked[:, None], counts_NB, 0)
        windows = steps.read_windows(corpus, places_NB, BLOCK_SIZE + 1)
        counted = np.arange(BLOCK_SIZE) >= BLOCK_SIZE - np.asarray(counts_NB)[..., None]
        return (params * windows[..., 1:] * counted).sum((1, 2)), counts_NB.sum(1)

    windows = TOKENS[offsets_NB[..., None] + np.arange(1, BLOCK_SIZE + 1)]
    counted = np.arange(BLOCK_SIZE) >= BLOCK_SIZE - counts_NB[..., None]
    expected = 2.0 * windows[counted].mean()
    assert feed.loss(eval_steps, jax.numpy.float32(2)) == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_tells_how_far_it_is_and_stops_when_told_to(monkeypatch):
    """Of a large corpus it takes minutes, in which Ctrl-C shall not be waited for."""
    feed = EvalFeed(TOKENS, BLOCK_SIZE, 4, meshes.make_mesh((1, 1, 1)))
    monkeypatch.setattr(loader, "SECONDS_PER_DISPATCH", 0)  # a batch at a time
    evaluated = []

    def eval_steps(params, corpus, places_NB, counts_NB, first, n):
        evaluated.append(int(first))
        return np.ones(len(counts_NB)), np.ones(len(counts_NB), np.int32)

    told = []
    assert feed.loss(eval_steps, None, lambda share: told.append(share) or False) == 1.0
    n_batches = len(evaluated)
    assert evaluated == list(range(n_batches))
    assert told == [(i + 1) / n_batches for i in range(n_batches)]
    evaluated.clear()
    assert feed.loss(eval_steps, None, lambda share: len(evaluated) == 2) is None
    assert evaluated == [0, 1]
