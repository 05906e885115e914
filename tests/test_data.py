"""Batches: which windows they hold, and their way to the devices."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest

from nanogpt_jax import data, steps
from nanogpt_jax.data import EvalLoader, batch_offsets, eval_offsets, gather, train_batches
from nanogpt_jax.errors import InputError
from nanogpt_jax.files import read_ahead
from nanogpt_jax.sharding import by_rows, make_mesh

TOKENS = np.random.default_rng(0).integers(0, 999, 501).astype(np.uint16)
BLOCK_SIZE = 8
SHAPE = (2, 4)
MESHES = ((1, 1, 1), (4, 1, 1), (2, 2, 1), (1, 1, 4))


def windows_at(tokens, offsets, length=BLOCK_SIZE + 1):
    """The windows that begin at some offsets, one by one: shape (*offsets.shape, length)."""
    windows = [tokens[offset : offset + length] for offset in np.ravel(offsets)]
    return np.array(windows).reshape(*np.shape(offsets), length)


# Where the windows of a batch begin


@pytest.mark.parametrize(
    ("seed", "split", "step", "expected"),
    [
        (1337, "train", 0, [[247095, 544727, 703278], [766883, 916602, 433861]]),
        (1337, "train", 1, [[174869, 474523, 244933], [23786, 324273, 146138]]),
        (1337, "val", 0, [[595614, 502773, 235420], [125060, 50850, 222430]]),
        (2**32 - 1, "train", 599_999, [[841693, 545023, 405122], [25624, 250985, 562438]]),
    ],
)
def test_offsets_never_change(seed, split, step, expected):
    """Otherwise a run resumed with a newer NumPy would read other batches than before.

    The numbers are those of an independent Philox4x64-10, counted from (1, step, 0, 0).
    """
    offsets = batch_offsets(seed, split, step, 1_003_854, 64, (2, 3))
    assert offsets.tolist() == expected
    assert offsets.dtype == np.int64


def test_offsets_depend_only_on_seed_split_and_step():
    first = batch_offsets(1, "train", 7, 10_000, 8, (2, 3))
    for step in (6, 8, 0):
        batch_offsets(1, "train", step, 10_000, 8, (2, 3))
    np.random.default_rng(0).random()
    np.testing.assert_array_equal(batch_offsets(1, "train", 7, 10_000, 8, (2, 3)), first)


def test_different_seeds_splits_and_steps_have_different_offsets():
    keys = list(itertools.product((0, 1, 1337, 2**32 - 1), data.SPLITS, (0, 1, 2, 600_000)))
    batches = {tuple(batch_offsets(*key, 10**6, 8, (12,))) for key in keys}
    assert len(batches) == len(keys)


def test_steps_share_windows_only_by_chance():
    offsets = np.array([batch_offsets(0, "train", step, 10**9, 8, (64,)) for step in range(200)])
    assert len(np.unique(offsets)) >= offsets.size - 3


def test_a_batch_does_not_depend_on_how_it_is_split_into_micro_batches():
    flat = batch_offsets(5, "train", 3, 10_000, 8, (12,))
    np.testing.assert_array_equal(batch_offsets(5, "train", 3, 10_000, 8, (3, 4)).ravel(), flat)
    np.testing.assert_array_equal(batch_offsets(5, "train", 3, 10_000, 8, (5,)), flat[:5])


@pytest.mark.parametrize(("n_tokens", "block_size"), [(9, 8), (10, 8), (13, 8), (40, 1)])
def test_every_window_can_be_drawn_and_none_goes_past_the_end(n_tokens, block_size):
    draws = [batch_offsets(0, "train", step, n_tokens, block_size, (64,)) for step in range(20)]
    windows = np.arange(n_tokens - block_size)
    assert set(np.ravel(draws)) == set(windows)
    assert windows[-1] + block_size + 1 == n_tokens


def test_offsets_are_uniform():
    draws = [batch_offsets(0, "train", step, 18, 8, (100,)) for step in range(100)]
    counts = np.bincount(np.ravel(draws), minlength=10)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_windows_are_read_at_their_offsets(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    offsets_AB = batch_offsets(1, "train", 0, len(TOKENS), 8, (2, 3))
    windows_ABT1 = data.read_windows(np.memmap(tmp_path / "train.bin", "u2"), offsets_AB, 9)
    np.testing.assert_array_equal(windows_ABT1, windows_at(TOKENS, offsets_AB))
    assert not isinstance(windows_ABT1, np.memmap)


# Training batches, with the corpus on the devices or read ahead


@pytest.fixture(params=[True, False], ids=["on the devices", "read ahead"])
def is_resident(request, monkeypatch):
    limit = TOKENS.nbytes if request.param else TOKENS.nbytes - 1
    monkeypatch.setattr(data, "RESIDENT_BYTES", limit)
    return request.param


def train_loader(mesh, start_step=0, tokens=TOKENS, n_steps=1):
    return train_batches(tokens, 1337, BLOCK_SIZE, SHAPE, mesh, start_step, n_steps)


def test_each_step_gets_its_batch_on_any_mesh(is_resident):
    gather_windows = jax.jit(gather, static_argnums=1)
    for sizes in MESHES:
        loader = train_loader(make_mesh(sizes), start_step=7)
        for step in range(7, 14):
            batch = next(loader)
            assert (batch.corpus is not None) == is_resident
            offsets_AB = batch_offsets(1337, "train", step, len(TOKENS), BLOCK_SIZE, SHAPE)
            windows_NABT1 = gather_windows(batch, BLOCK_SIZE + 1)
            np.testing.assert_array_equal(windows_NABT1, [windows_at(TOKENS, offsets_AB)])
            assert windows_NABT1.dtype == np.int32
        loader.close()


def test_several_steps_at_once_are_those_of_one_at_a_time(is_resident):
    single = train_loader(make_mesh(), start_step=3)
    several = train_loader(make_mesh(), start_step=3, n_steps=4)
    for _ in range(2):
        windows = [next(single).windows[0] for _ in range(4)]
        np.testing.assert_array_equal(next(several).windows, windows)
    single.close()
    several.close()


def test_a_resumed_loader_continues_the_sequence(is_resident):
    loader, resumed = train_loader(make_mesh()), train_loader(make_mesh(), start_step=5)
    batches = [next(loader) for _ in range(9)]
    for expected in batches[5:]:
        np.testing.assert_array_equal(next(resumed).windows, expected.windows)
    loader.close()
    resumed.close()


def test_rows_are_spread_over_the_devices(is_resident):
    for sizes in ((4, 1, 1), (2, 2, 1)):
        mesh = make_mesh(sizes)
        loader = train_loader(mesh)
        windows = next(loader).windows
        loader.close()
        n_axes = 3 if is_resident else 4
        assert windows.sharding.is_equivalent_to(by_rows(mesh, axis=2), n_axes)
        for device, shard in enumerate(windows.addressable_shards):
            assert shard.device == jax.devices()[device]
            rows = np.asarray(windows)[:, :, device : device + 1]
            np.testing.assert_array_equal(shard.data, rows)


def test_each_device_reads_only_its_own_rows(monkeypatch):
    read = []

    def spy(tokens, offsets, length):
        read.append(offsets.ravel().tolist())
        return read_windows(tokens, offsets, length)

    read_windows = data.read_windows
    monkeypatch.setattr(data, "read_windows", spy)
    rows = by_rows(make_mesh((4, 1, 1)), axis=1)
    data.put_batch(TOKENS, None, np.arange(16).reshape(2, 8), 9, rows)
    assert sorted(read) == [[i, i + 1, i + 8, i + 9] for i in (0, 2, 4, 6)]


def test_a_bad_file_raises_where_its_batch_is_requested(monkeypatch):
    """A large corpus is not checked in advance, but as its windows are read."""
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)

    class BadFile:
        dtype, nbytes = TOKENS.dtype, TOKENS.nbytes

        def __len__(self):
            return len(TOKENS)

        def __getitem__(self, index):
            if index.start in bad_offsets:
                raise InputError("train_00001.bin: ids must be below 500")
            return TOKENS[index]

    early = batch_offsets(1337, "train", 0, len(TOKENS), BLOCK_SIZE, SHAPE)
    bad_offsets = set(batch_offsets(1337, "train", 1, len(TOKENS), BLOCK_SIZE, SHAPE).flat)
    bad_offsets -= set(early.flat)
    loader = train_loader(make_mesh(), tokens=BadFile())
    next(loader)
    with pytest.raises(InputError, match=r"train_00001\.bin"):
        next(loader)
    loader.close()


# Reading ahead


def test_items_are_read_while_nothing_is_requested():
    read, enough = [], threading.Event()

    def note(step):
        read.append(step)
        if len(read) == 5:
            enough.set()
        return step

    ahead = read_ahead(map(note, itertools.count(3)), 4)
    assert next(ahead) == 3
    assert enough.wait(timeout=30)
    assert [next(ahead) for _ in range(5)] == [4, 5, 6, 7, 8]
    ahead.close()
    so_far = [*read]  # the thread may be reading one more
    assert so_far == sorted(set(so_far))


def test_reading_ahead_is_limited_and_ends_with_the_items():
    read = []
    ahead = read_ahead((read.append(i) or i for i in itertools.count()), 3)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert read == [0, 1, 2, 3]
    ahead.close()
    assert [*read_ahead(iter("ab"), 3)] == ["a", "b"]


def test_an_error_of_reading_is_raised_when_its_item_is_taken():
    def items():
        yield 0
        raise ValueError("the disk is gone")

    ahead = read_ahead(items(), 3)
    assert next(ahead) == 0
    with pytest.raises(ValueError, match="the disk is gone"):
        next(ahead)


def test_what_is_closed_reads_no_further():
    read, may_read = [], threading.Event()

    def note(step):
        read.append(step)
        assert step == 0 or may_read.wait(timeout=30)
        return step

    ahead = read_ahead(map(note, itertools.count()), 4)
    assert next(ahead) == 0
    (thread,) = (thread for thread in threading.enumerate() if "read-ahead" in thread.name)
    ahead.close()
    may_read.set()
    thread.join(30)
    assert not thread.is_alive()
    assert len(read) <= 2  # the one in progress at most


@pytest.mark.usefixtures("is_resident")
def test_a_loader_can_be_closed_before_it_is_read():
    train_loader(make_mesh()).close()


# Evaluation


def test_an_evaluation_predicts_each_token_but_the_first_once():
    for block_size, batch_size in itertools.product((1, 2, 5, 8), (1, 3, 4)):
        for n_tokens in range(block_size + 1, 4 * block_size + 4):
            ids = np.arange(n_tokens, dtype="<u2")  # each id is its position
            offsets_NB, counts_NB = eval_offsets(ids, block_size, batch_size)
            assert offsets_NB.shape == counts_NB.shape
            assert offsets_NB.shape[1] == batch_size
            windows = windows_at(ids, offsets_NB.ravel(), block_size + 1)
            counted = [
                position
                for window, count in zip(windows, counts_NB.ravel(), strict=True)
                for position in window[block_size + 1 - count :]
            ]
            assert sorted(counted) == list(range(1, n_tokens))
            assert counts_NB.min() >= 0
            assert counts_NB.max() <= block_size


def test_a_whole_evaluation_has_no_empty_batch():
    for n_tokens in range(9, 60):
        _, counts_NB = eval_offsets(np.zeros(n_tokens, "<u2"), 8, 3)
        assert counts_NB.sum(axis=1).all()


def test_a_limited_evaluation_has_a_fixed_set_of_batches():
    ids = np.arange(1001, dtype="<u2")
    first, again = (eval_offsets(ids, 8, 3, n_batches=5) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    offsets_NB, counts_NB = first
    assert offsets_NB.shape == (5, 3)
    assert counts_NB.sum() == 5 * 3 * 8


def test_a_limited_evaluation_is_evenly_spread_from_first_to_last_window():
    ids = np.arange(1001, dtype="<u2")
    offsets_NB, _ = eval_offsets(ids, 8, 3, n_batches=5)
    offsets = offsets_NB.ravel()
    assert offsets[0] == 0
    assert offsets[-1] + 9 == len(ids)
    gaps = np.diff(offsets)
    assert gaps.max() - gaps.min() <= 8
    assert len(np.unique(offsets)) == 15


def test_a_limit_above_the_whole_split_is_the_whole_split():
    ids = np.arange(101, dtype="<u2")
    whole = eval_offsets(ids, 8, 3)
    for n_batches in (5, 6, 1000):
        limited = eval_offsets(ids, 8, 3, n_batches)
        for one, other in zip(limited, whole, strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_evaluation_takes_no_more_memory_than_its_windows():
    """However many batches are requested, and however long the split is."""
    short = eval_offsets(np.zeros(101, "<u2"), 8, 3, 2**30)
    assert short[0].shape == (5, 3)
    long = np.lib.stride_tricks.as_strided(np.zeros(1, "<u2"), [10**11], [0])
    offsets_NB, counts_NB = eval_offsets(long, 1, 3, 2)
    assert offsets_NB.tolist()[0][0] == 0
    assert offsets_NB.tolist()[-1][-1] == 10**11 - 2
    assert counts_NB.sum() == 6
    for n_batches in (0, 2**30):
        with pytest.raises(InputError, match=r"eval_iters must be set .* try --eval_iters 200"):
            eval_offsets(long, 1, 3, n_batches)


@pytest.mark.usefixtures("is_resident")
def test_an_evaluation_is_the_mean_over_its_targets_on_any_mesh():
    @jax.jit
    def eval_step(scale, batch, counts_B):
        """The loss of a target is its id, scaled."""
        windows_BT1 = gather(batch, BLOCK_SIZE + 1)
        counted_BT = np.arange(BLOCK_SIZE)[None] >= BLOCK_SIZE - counts_B[:, None]
        return (scale * windows_BT1[:, 1:] * counted_BT).sum(), counts_B.sum()

    for sizes, n_batches in itertools.product(MESHES, (0, 3)):
        loader = EvalLoader(TOKENS, BLOCK_SIZE, 4, make_mesh(sizes), n_batches)
        offsets_NB, counts_NB = eval_offsets(TOKENS, BLOCK_SIZE, 4, n_batches)
        assert len(loader) == len(counts_NB)
        assert loader.n_targets == counts_NB.sum()
        targets = windows_at(TOKENS, offsets_NB)[..., 1:]
        counted = np.arange(BLOCK_SIZE) >= BLOCK_SIZE - counts_NB[..., None]
        loss = steps.evaluate(eval_step, np.float32(2), loader)
        assert loss == pytest.approx(2 * targets[counted].mean(), rel=1e-6)
