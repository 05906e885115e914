"""Generation: with and without a cache, streamed and at once; sampling as defined."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt_jax import decoding, steps
from nanogpt_jax.config import ModelConfig
from nanogpt_jax.config.presets import MODERN
from nanogpt_jax.corpora import CharTokenizer
from nanogpt_jax.decoding import Sampling
from nanogpt_jax.model import GPT

V = 11
CHARS = CharTokenizer("\n abcdefghi")
GREEDY = Sampling(temperature=0)
SAMPLING = Sampling(temperature=0.8, top_k=5)
KINDS = {"learned": {}, "rotary": {"positions": "rotary", "n_layer": 2}, "modern": MODERN}
SHIFT = {"token_shift": True}
KINDS |= {"shifted": SHIFT, "modern shifted": SHIFT | MODERN}
KINDS |= {"windowed": {"attention_window": 4, "n_layer": 2} | MODERN}
SLIDING = ["rotary", "modern", "modern shifted", "windowed"]  # none re-reads a full cache


@cache
def model_and_params(block_size=8, kind="learned"):
    """A model whose logits differ clearly, so that greedy text varies and has no near-ties."""
    shape = {"block_size": block_size, "vocab_size": V, "n_layer": 1, "n_head": 2, "n_embd": 12}
    model = GPT(ModelConfig(**shape | KINDS[kind]))
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    return model, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract)


def write(
    start,
    n_tokens,
    sampling=GREEDY,
    rows=(0, 2),
    seed=0,
    block_size=8,
    exact_window=False,
    kind="learned",
):
    """New tokens after a prompt, for the given rows of a seed."""
    keys_B = decoding.row_keys(seed, range(*rows))
    model, params = model_and_params(block_size, kind)
    prompt_BT = CHARS.encode(start)[None].repeat(len(keys_B), 0)
    return decoding.generate(model, params, prompt_BT, keys_B, n_tokens, sampling, exact_window)


@cache
def jitted_apply(block_size):
    return jax.jit(model_and_params(block_size)[0].apply)


def fresh_logits(window, block_size=8):
    """Logits of the token after a window, from one forward pass over it."""
    params = {"params": model_and_params(block_size)[1]}
    return jitted_apply(block_size)(params, np.array([window]))[0][0, -1]


def naive(start, n_tokens, sampling=GREEDY, row=0, seed=0, block_size=8, keep=None):
    """One token after another, each from a new forward pass over what the model sees.

    When the window is full, the last `keep` tokens stay; None: all but the first, as in nanoGPT.
    """
    key = jax.random.fold_in(jax.random.key(seed), row)
    window, new = CHARS.encode(start)[-block_size:].tolist(), []
    for n_generated in range(n_tokens):
        logits_BV = fresh_logits(window, block_size)[None]
        new.append(int(decoding._draw(logits_BV, key[None], n_generated, sampling)[0]))
        window.append(new[-1])
        if len(window) > block_size:
            window = window[-(keep or block_size) :]
    return new


STARTS = ["a", "abc", "abcdefg", "abcdefgh", "abc abc abc abc"]


@pytest.mark.parametrize(
    ("kind", "sampling"), [("learned", GREEDY), *((kind, SAMPLING) for kind in KINDS)]
)
def test_the_cache_changes_nothing_until_the_window_is_full(kind, sampling):
    for start in STARTS if kind == "learned" else ["abc", "abc abc abc abc"]:  # compiles less
        until_full = 8 - min(8, len(start)) + 1  # the last of them is drawn from the full window
        cached = write(start, 30, sampling, kind=kind)[0, :until_full]
        exact = write(start, 30, sampling, exact_window=True, kind=kind)[0, :until_full]
        np.testing.assert_array_equal(cached, exact, err_msg=start)


@pytest.mark.parametrize("start", ["ab", "abc abc abc"])
def test_exact_window_reads_the_last_block_again_for_each_token(start):
    sampling = SAMPLING
    made = write(start, 30, sampling, exact_window=True)[0]
    np.testing.assert_array_equal(made, naive(start, 30, sampling))


@pytest.mark.parametrize("start", ["ab", "abc abc abc"])
def test_a_full_window_keeps_its_last_half_and_continues(start):
    sampling = SAMPLING
    made = write(start, 30, sampling)[0]
    np.testing.assert_array_equal(made, naive(start, 30, sampling, keep=4))


@pytest.mark.parametrize(("block_size", "keep"), [(1, 1), (3, 1)])
def test_small_blocks_work_past_the_window(block_size, keep):
    sampling = SAMPLING
    for exact_window, kept in (True, None), (False, keep):
        made = write("abcd", 12, sampling, block_size=block_size, exact_window=exact_window)[0]
        expected = naive("abcd", 12, sampling, block_size=block_size, keep=kept)
        np.testing.assert_array_equal(made, expected)


def one_by_one(start, n_tokens, kind="learned", exact_window=False, **spied):
    """Two rows of new tokens as they are streamed, and the logits from which each was drawn."""
    model, params = model_and_params(8, kind)
    keys_B, logits_NBV = decoding.row_keys(0, range(2)), []
    draw = decoding._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_draw", lambda *args: (logits_NBV.append(args[0]), draw(*args))[1])
        prompt_BT = CHARS.encode(start)[None].repeat(2, 0)
        tokens = decoding.write(model, params, prompt_BT, keys_B, SAMPLING, exact_window)
        made = [np.asarray(next(tokens)) for _ in range(n_tokens)]
    return np.concatenate(made, axis=1), np.stack(logits_NBV)


@pytest.mark.parametrize("exact_window", [False, True])
def test_streaming_gives_the_same_text_and_the_logits_of_a_fresh_pass(exact_window):
    streamed_BN, logits_NBV = one_by_one("abc", 30, exact_window=exact_window)
    window = CHARS.encode("abc").tolist()
    for token, logits_BV in zip(streamed_BN[0], logits_NBV, strict=True):
        np.testing.assert_allclose(logits_BV[0], fresh_logits(window), atol=1e-3)
        window.append(int(token))
        if len(window) > 8:
            window = window[-8 if exact_window else -4 :]
    together_BN = write("abc", 30, SAMPLING, rows=(0, 2), exact_window=exact_window)
    np.testing.assert_array_equal(streamed_BN, together_BN)


def test_one_compilation_serves_all_prompts_and_another_temperature_needs_no_model():
    model, params = model_and_params()
    keys_B = decoding.row_keys(0, range(2))
    compiled = decoding._prefill, decoding._read, decoding._decode

    def sizes(start, sampling, at_once):
        prompt_BT = CHARS.encode(start)[None].repeat(2, 0)
        tokens = decoding.write(model, params, prompt_BT, keys_B, sampling, at_once=at_once)
        for _ in range(30):
            next(tokens)
        return [function._cache_size() for function in compiled]

    for at_once in (1, 4):
        first = sizes("a", SAMPLING, at_once)
        assert sizes("abc abc", SAMPLING, at_once) == first
    one_by_one = sizes("a", SAMPLING, 1)
    assert sizes("a", Sampling(temperature=0.123), 1) == one_by_one


# Rotary positions: the cache slides


MAX_TOKENS = 64  # of a text that the reference below can read


def banded_attention(S):
    """Attention without a cache in which each query sees the last S keys up to its own."""

    def attention(q_BTHK, k_BTHK, v_BTHK, *_):
        scores_BHTT = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK) / q_BTHK.shape[-1] ** 0.5
        behind_TT = np.subtract.outer(np.arange(MAX_TOKENS), np.arange(MAX_TOKENS))
        is_seen_TT = (0 <= behind_TT) & (behind_TT < S)
        weights_BHTT = jax.nn.softmax(jnp.where(is_seen_TT[None, None], scores_BHTT, -jnp.inf))
        return jnp.einsum("BHTS,BSHK->BTHK", weights_BHTT, v_BTHK)

    return attention


@cache
def banded_apply(block_size, kind):
    """The same model with a longer block: rotary positions have no parameters."""
    model, params = model_and_params(block_size, kind)
    longer = GPT(dataclasses.replace(model.config, block_size=MAX_TOKENS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "nanogpt_jax.model.attention",
            banded_attention(model.config.attention_window or block_size),
        )
        program = jax.jit(lambda tokens_BT: longer.apply({"params": params}, tokens_BT)[0])
        return program.lower(np.zeros((1, MAX_TOKENS), np.int32)).compile()


def banded_logits(tokens, block_size, kind):
    """Logits of the token after each one, from one pass over the whole text."""
    tokens_BT = np.zeros((1, MAX_TOKENS), np.int32)
    tokens_BT[0, : len(tokens)] = tokens
    return banded_apply(block_size, kind)(tokens_BT)[0][: len(tokens)]


@pytest.mark.parametrize(
    ("start", "kind", "block_size"),
    [("a", "rotary", 1), ("abc abc abc", "rotary", 3), ("a", "rotary", 8), ("a", "modern", 8)]
    + [("abc abc abc", "modern", 8), ("a", "windowed", 8)],
)
def test_each_layer_of_a_sliding_cache_sees_the_last_block_of_keys(start, kind, block_size):
    n_tokens = 30
    seen = CHARS.encode(start)[-block_size:].tolist()
    made = write(start, n_tokens, block_size=block_size, kind=kind)[0].tolist()
    logits_TV = banded_logits(seen + made, block_size, kind)
    assert made == logits_TV.argmax(-1)[len(seen) - 1 : -1].tolist()


@pytest.mark.parametrize("kind", SLIDING)
def test_streaming_with_a_sliding_cache_gives_the_same_text_and_the_banded_logits(kind):
    streamed_BN, logits_NBV = one_by_one("abc", 30, kind)
    together_BN = write("abc", 30, SAMPLING, rows=(0, 2), kind=kind)
    np.testing.assert_array_equal(streamed_BN, together_BN)
    expected_TV = banded_logits([*CHARS.encode("abc"), *streamed_BN[0]], 8, kind)
    np.testing.assert_allclose(logits_NBV[:, 0], expected_TV[2:-1], atol=1e-3)


@pytest.mark.parametrize(("kind", "slides"), [("learned", False), *((k, True) for k in SLIDING)])
def test_a_sliding_cache_is_prefilled_once(kind, slides, monkeypatch):
    prefill, lengths = decoding._prefill, []
    monkeypatch.setattr(
        decoding, "_prefill", lambda *args: (lengths.append(args[3]), prefill(*args))[1]
    )
    write("abc", 30, kind=kind)
    # 6 tokens until the window is full, then 5 in each half of it
    assert lengths == [3] if slides else lengths == [3, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_no_program_branches_or_loops_an_unknown_number_of_times(kind):
    """On a GPU, each would wait for the host."""
    model, params = model_and_params(8, kind)
    keys_B, window_BS = decoding.row_keys(0, range(2)), np.zeros((2, 8), np.int32)
    _, cache = jax.eval_shape(partial(decoding.prefill, model), params, window_BS, 3)
    decode = partial(decoding.decode, model, n_tokens=4, sampling=Sampling(0.8, 5, 0.9))
    programs = [
        jax.make_jaxpr(decode)(params, cache, window_BS[:, 0], keys_B, 3),
        jax.make_jaxpr(partial(decoding.prefill, model))(params, window_BS, 3),
    ]
    for program in map(str, programs):
        assert "cond[" not in program
        assert "while[" not in program


def test_padding_of_the_prompt_has_no_influence():
    model, params = model_and_params()
    window_BS, length = decoding.start_window(CHARS.encode("abc")[None], 8)
    other_BS = np.where(np.arange(8) < length, window_BS, 7)
    logits_BV, other_BV = (
        decoding._prefill(model, params, x_BS, length)[0] for x_BS in (window_BS, other_BS)
    )
    np.testing.assert_array_equal(logits_BV, other_BV)
    np.testing.assert_allclose(logits_BV[0], fresh_logits(CHARS.encode("abc")), atol=1e-4)


def test_a_row_does_not_depend_on_the_number_of_rows():
    sampling = SAMPLING
    three_BN = write("ab", 30, sampling, rows=(0, 3))
    assert len({tuple(row) for row in three_BN}) == 3
    np.testing.assert_array_equal(write("ab", 30, sampling, rows=(0, 2))[0], three_BN[0])
    np.testing.assert_array_equal(write("ab", 30, sampling, rows=(1, 3))[1], three_BN[2])
    assert (write("ab", 30, sampling, seed=1)[0] != three_BN[0]).any()


def draw(logits, sampling, n=4000, seed=0):
    """The share of each token among many draws."""
    keys_B = jax.random.split(jax.random.key(seed), n)
    logits_BV = jnp.tile(jnp.array(logits, jnp.float32), (n, 1))
    tokens_B = decoding._draw(logits_BV, keys_B, 0, sampling)
    return np.bincount(tokens_B, minlength=len(logits)) / n


def drawn(logits, sampling):
    """The tokens that are drawn at all."""
    return set(np.flatnonzero(draw(logits, sampling)).tolist())


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)]
)
def test_ways_to_be_greedy(sampling):
    assert drawn([0.0, 2.0, 1.9, -1.0], sampling) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature):
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    expected = np.exp(logits / temperature)
    expected /= expected.sum()
    frequencies = draw(logits, Sampling(temperature), n=20_000)
    chi_squared = 20_000 * ((frequencies - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3  # p = 0.001 for 3 degrees of freedom


def test_top_k_keeps_the_likeliest_and_their_ratios():
    frequencies = draw(np.log([0.1, 0.4, 0.2, 0.3]), Sampling(top_k=2), n=20_000)
    np.testing.assert_allclose(frequencies, [0, 4 / 7, 0, 3 / 7], atol=0.015)


def test_top_k_keeps_ties():
    assert drawn([1.0, 2.0, 1.0, 1.0, 0.0], Sampling(top_k=2)) == {0, 1, 2, 3}


@pytest.mark.parametrize("top_k", [0, 3, 4, 200])
def test_top_k_of_zero_or_beyond_the_vocabulary_keeps_all(top_k):
    assert drawn([0.0, 0.1, 0.2], Sampling(top_k=top_k)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.3, {2}),
        (0.39, {2}),
        (0.41, {2, 0}),
        (0.69, {2, 0}),
        (0.71, {2, 0, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, expected):
    assert drawn(np.log([0.3, 0.1, 0.4, 0.2]), Sampling(top_p=top_p)) == expected


def test_top_p_applies_after_temperature_and_top_k():
    """Flattened by temperature, or cut to 0.57 and 0.43 by top_k, it needs the second token too."""
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert drawn(logits, Sampling(temperature=50.0, top_p=0.45)) == {0, 1}
    assert drawn(logits, Sampling(top_k=2, top_p=0.58)) == {0, 1}
    assert drawn(logits, Sampling(top_k=2, top_p=0.56)) == {0}


def test_a_prompt_is_padded_or_truncated_to_its_last_tokens():
    window_BT, length = decoding.start_window(CHARS.encode("abc")[None].repeat(2, 0), 5)
    assert length == 3
    np.testing.assert_array_equal(window_BT[:, :3], [[2, 3, 4], [2, 3, 4]])
    window_BT, length = decoding.start_window(CHARS.encode("abcdefg")[None], 5)
    assert length == 5
    np.testing.assert_array_equal(window_BT, [[4, 5, 6, 7, 8]])
