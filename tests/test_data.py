import itertools

import numpy as np
import pytest

from nanogpt_jax import data
from nanogpt_jax.corpora import open_tokens
from nanogpt_jax.data import TrainBatches, batch_offsets, eval_batches
from nanogpt_jax.errors import InputError


def gather(tokens, offsets, length):
    """Windows of ids, of shape (*offsets.shape, length), one by one."""
    windows = [tokens[offset : offset + length] for offset in np.ravel(offsets)]
    return np.array(windows).reshape(*np.shape(offsets), length)


@pytest.fixture
def tokens(tmp_path):
    """501 ids in a file, mapped as a run maps them."""
    np.random.default_rng(0).integers(0, 999, 501).astype("<u2").tofile(tmp_path / "train.bin")
    return open_tokens([tmp_path / "train.bin"], "uint16", 999, 9)[0]


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
    """Else a run that is resumed with a newer NumPy would read other batches than it began with.

    The numbers are those of an independent Philox4x64-10, counted from (1, step, 0, 0).
    """
    offsets = batch_offsets(seed, split, step, 1_003_854, 64, (2, 3))
    assert offsets.tolist() == expected
    assert offsets.dtype == np.int64


def test_offsets_are_a_function_of_seed_split_and_step_alone():
    first = batch_offsets(1, "train", 7, 10_000, 8, (2, 3))
    for step in (6, 8, 0):
        batch_offsets(1, "train", step, 10_000, 8, (2, 3))
    np.random.default_rng(0).random()
    np.testing.assert_array_equal(batch_offsets(1, "train", 7, 10_000, 8, (2, 3)), first)


def test_offsets_of_other_seeds_splits_and_steps_are_others():
    keys = list(itertools.product((0, 1, 1337, 2**32 - 1), data.SPLITS, (0, 1, 2, 600_000)))
    batches = {tuple(batch_offsets(*key, 10**6, 8, (12,))) for key in keys}
    assert len(batches) == len(keys)


def test_steps_share_no_window_by_more_than_chance():
    offsets = np.array([batch_offsets(0, "train", step, 10**9, 8, (64,)) for step in range(200)])
    assert len(np.unique(offsets)) >= offsets.size - 3


def test_a_batch_is_the_same_however_it_is_cut_into_micro_batches():
    flat = batch_offsets(5, "train", 3, 10_000, 8, (12,))
    np.testing.assert_array_equal(batch_offsets(5, "train", 3, 10_000, 8, (3, 4)).ravel(), flat)
    np.testing.assert_array_equal(batch_offsets(5, "train", 3, 10_000, 8, (5,)), flat[:5])


@pytest.mark.parametrize(("n_tokens", "block_size"), [(9, 8), (10, 8), (13, 8), (40, 1)])
def test_every_window_can_be_drawn_and_none_past_the_end(n_tokens, block_size):
    draws = [batch_offsets(0, "train", step, n_tokens, block_size, (64,)) for step in range(20)]
    windows = np.arange(n_tokens - block_size)
    assert set(np.ravel(draws)) == set(windows)
    assert windows[-1] + block_size + 1 == n_tokens


def test_offsets_are_uniform():
    draws = [batch_offsets(0, "train", step, 18, 8, (100,)) for step in range(100)]
    counts = np.bincount(np.ravel(draws), minlength=10)
    assert counts.min() > 900
    assert counts.max() < 1100


# Batches as the device takes them


def test_a_small_corpus_lies_on_the_device_whole(tokens, monkeypatch):
    assert data.is_resident(tokens)
    monkeypatch.setattr(data, "RESIDENT_BYTES", tokens.nbytes - 1)
    assert not data.is_resident(tokens)


def test_offsets_of_some_steps_are_those_of_each_step(tokens):
    batches = TrainBatches(tokens, 1337, 8, (2, 3), most_steps=5)
    assert batches.most_steps == 5
    offsets_NAB = batches.offsets(10, 4)
    assert offsets_NAB.shape == (5, 2, 3)
    for i in range(4):
        expected = batch_offsets(1337, "train", 10 + i, len(tokens), 8, (2, 3))
        np.testing.assert_array_equal(offsets_NAB[i], expected)
    assert not offsets_NAB[4].any()


def test_windows_are_read_where_they_begin(tokens):
    offsets_NAB = TrainBatches(tokens, 1, 8, (2, 3), most_steps=3).offsets(0, 3)
    windows_NABT1 = data.read_windows(tokens, offsets_NAB, 9)
    np.testing.assert_array_equal(windows_NABT1, gather(tokens, offsets_NAB, 9))
    assert not isinstance(windows_NABT1, np.memmap)


def test_reading_steps_one_by_one_or_together_gives_the_same(tokens):
    batches = TrainBatches(tokens, 1, 8, (1, 4), most_steps=6)
    one_by_one = [batches.offsets(step, 1)[0] for step in range(3, 9)]
    np.testing.assert_array_equal(batches.offsets(3, 6), one_by_one)


def test_few_steps_are_read_at_once_where_windows_are_large(tokens, monkeypatch):
    step_bytes = 2 * 3 * 9 * tokens.itemsize
    for limit, most_steps in ((8 * 3 * step_bytes, 3), (8 * 3 * step_bytes - 8, 2), (0, 1)):
        monkeypatch.setattr(data, "RESIDENT_BYTES", limit)
        large = np.broadcast_to(tokens[:1], 10**6)
        assert TrainBatches(large, 1, 8, (2, 3), most_steps=100).most_steps == most_steps


# Evaluation


@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_an_evaluation_predicts_each_token_but_the_first_once(block_size, batch_size):
    for n_tokens in range(block_size + 1, 4 * block_size + 4):
        ids = np.arange(n_tokens, dtype="<u2")  # an id is its own place
        offsets_NB, counts_NB = eval_batches(ids, block_size, batch_size)
        assert offsets_NB.shape == counts_NB.shape
        assert offsets_NB.shape[1] == batch_size
        windows_NBT1 = gather(ids, offsets_NB, block_size + 1)
        counted = [
            place
            for window, count in zip(
                windows_NBT1.reshape(-1, block_size + 1), counts_NB.ravel(), strict=True
            )
            for place in window[block_size + 1 - count :]
        ]
        assert sorted(counted) == list(range(1, n_tokens))
        assert counts_NB.min() >= 0
        assert counts_NB.max() <= block_size


def test_a_whole_evaluation_has_no_batch_that_counts_nothing():
    for n_tokens in range(9, 60):
        _, counts_NB = eval_batches(np.zeros(n_tokens, "<u2"), 8, 3)
        assert counts_NB.sum(axis=1).all()


def test_a_limited_evaluation_has_so_many_batches_and_is_fixed():
    ids = np.arange(1001, dtype="<u2")
    first, again = (eval_batches(ids, 8, 3, n_batches=5) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    offsets_NB, counts_NB = first
    assert offsets_NB.shape == (5, 3)
    assert counts_NB.sum() == 5 * 3 * 8


def test_a_limited_evaluation_is_evenly_spread_from_the_first_window_to_the_last():
    ids = np.arange(1001, dtype="<u2")
    offsets_NB, _ = eval_batches(ids, 8, 3, n_batches=5)
    offsets = offsets_NB.ravel()
    assert offsets[0] == 0
    assert offsets[-1] + 9 == len(ids)
    gaps = np.diff(offsets)
    assert gaps.max() - gaps.min() <= 8
    assert len(np.unique(offsets)) == 15


def test_a_limit_above_the_whole_split_is_the_whole_split():
    ids = np.arange(101, dtype="<u2")
    whole = eval_batches(ids, 8, 3)
    for n_batches in (5, 6, 1000):
        limited = eval_batches(ids, 8, 3, n_batches)
        for one, other in zip(limited, whole, strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_evaluation_takes_no_more_memory_than_its_windows():
    """However many batches are asked for, and however long the split is."""
    short = eval_batches(np.zeros(101, "<u2"), 8, 3, 2**30)
    assert short[0].shape == (5, 3)
    long = np.lib.stride_tricks.as_strided(np.zeros(1, "<u2"), [10**11], [0])
    offsets_NB, counts_NB = eval_batches(long, 1, 3, 2)
    assert offsets_NB.tolist()[0][0] == 0
    assert offsets_NB.tolist()[-1][-1] == 10**11 - 2
    assert counts_NB.sum() == 6
    for n_batches in (0, 2**30):
        with pytest.raises(InputError, match=r"eval_iters must be given .* like --eval_iters 200"):
            eval_batches(long, 1, 3, n_batches)


def test_a_dispatch_of_huge_batches_has_few_steps():
    batches = data.TrainBatches(np.zeros(101, "<u2"), 0, 8, (1024, 1024), 1024)
    assert batches.offsets(0, 1).shape == (2, 1024, 1024)
