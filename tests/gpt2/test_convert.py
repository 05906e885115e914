"""Hugging Face GPT-2s in and runs out; what PyTorch computes with them is in tests/golden/."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import nanogpt_jax
from nanogpt_jax import decoding, hardware, run, sharding, steps
from nanogpt_jax.config import ModelConfig, TrainConfig
from nanogpt_jax.config.presets import MODERN
from nanogpt_jax.corpora import (
    BPETokenizer,
    CharTokenizer,
    Corpus,
    load_tokenizer,
    save_tokenizer,
)
from nanogpt_jax.errors import InputError
from nanogpt_jax.gpt2 import config as gpt2_config
from nanogpt_jax.gpt2 import convert
from nanogpt_jax.model import GPT
from nanogpt_jax.optim import make_optimizer
from nanogpt_jax.run import folder as run_folder
from nanogpt_jax.run import pretrained
from nanogpt_jax.run.saving import Checkpoints

GOLDEN = Path(__file__).parent.parent / "golden" / "pretrained.npz"
ONE_DEVICE = (1, 1, 1)
TEXT = "the cat sat on the mat,\nand the rat ate it. "


def save_golden(folder: Path, n_heads: int) -> tuple[str, dict]:
    """Make a folder of a GPT-2 as `transformers` saved it, and return what it computed."""
    folder.mkdir()
    with np.load(GOLDEN) as arrays:
        prefix = f"{n_heads - 1}."
        golden = {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
    (folder / "config.json").write_bytes(golden.pop("config").tobytes())
    (folder / "model.safetensors").write_bytes(golden.pop("model").tobytes())
    return str(folder), golden


def load(source: str, config: ModelConfig | None = None, sizes=ONE_DEVICE):
    """Return (model, params) of a source, over a mesh."""
    config = config or gpt2_config.read_config(source)
    model = GPT(config)
    abstract = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    abstract = sharding.place(abstract, sharding.make_mesh(sizes))
    return model, convert.load_params(source, config, abstract)


def logits(model: GPT, params, batch_BT):
    return jax.jit(lambda params: model.apply({"params": params}, batch_BT)[0])(params)


def continuation(model: GPT, params, start_BT, n_tokens: int, **sampling):
    """Return start_BT with n_tokens more, the likeliest ones if nothing else is asked for."""
    keys_B = decoding.row_keys(0, range(len(start_BT)))
    sampling = decoding.Sampling(**({"temperature": 0.0} | sampling))
    made_BN = decoding.generate(model, params, start_BT, keys_B, n_tokens, sampling)
    return np.concatenate([start_BT, made_BN], axis=1)


def assert_equal(tree, other) -> None:
    """Bit for bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def random_params(config: ModelConfig, seed: int = 0, std: float = 0.3):
    abstract = jax.eval_shape(partial(steps.init_params, GPT(config)), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape, scale=std).astype("f")), abstract
    )


def save_run(folder: Path, config: ModelConfig, tokenizer, params, step: int = 7) -> None:
    """Make the folder of a run as training leaves it; again: with one more checkpoint."""
    run_folder.begin(folder, TrainConfig(model=config), {"jax": jax.__version__})
    if tokenizer:
        save_tokenizer(tokenizer, folder)
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS)
    state = steps.init_state(make_optimizer(TrainConfig().optim, 10), params)
    checkpoints.save(state._replace(step=jax.numpy.int32(step)), val_loss=step / 7)
    checkpoints.close()


def change_config(source: str, **fields) -> None:
    path = Path(source, "config.json")
    loaded = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in loaded.items() if value != "gone"}))


def change_tensors(source: str, change) -> None:
    """Rewrite the weights; change(tensors) edits the dict."""
    path = Path(source, "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def corpus_of(tokenizer) -> Corpus:
    return Corpus("text", {}, 30, tokenizer, "")


@pytest.fixture
def gpt2(tmp_path) -> str:
    """A folder of the GPT-2 with three heads: block_size 9, vocab_size 23."""
    return save_golden(tmp_path / "gpt2", 3)[0]


# Weights in


@pytest.mark.parametrize("n_heads", [1, 3, 5])
def test_logits_and_greedy_continuations_are_pytorchs(tmp_path, n_heads):
    source, golden = save_golden(tmp_path / "gpt2", n_heads)
    model, params = load(source)
    assert model.config.n_head == n_heads
    logits_BTV = logits(model, params, golden["batch_BT"])
    np.testing.assert_allclose(logits_BTV, golden["logits_BTV"], rtol=0, atol=1e-5)
    start_BT = golden["made_BT"][:, :3]
    n_new = golden["made_BT"].shape[1] - 3
    np.testing.assert_array_equal(continuation(model, params, start_BT, n_new), golden["made_BT"])


def test_names_without_a_prefix_and_masks_are_read_too(gpt2):
    """So are OpenAI's own files; `transformers` writes neither any more."""
    _, expected = load(gpt2)

    def as_openai_has_it(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 9, 9), np.float32))
        tensors["h.0.attn.masked_bias"] = np.full(1, -1e4, np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    change_tensors(gpt2, as_openai_has_it)
    assert_equal(load(gpt2)[1], expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_become_float32(gpt2, dtype):
    _, exact = load(gpt2)
    change_tensors(gpt2, lambda t: t.update({name: t[name].astype(dtype) for name in t}))
    _, params = load(gpt2)
    assert_equal(params, jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype("f"), exact))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("f")}


def test_bfloat16_is_read_without_jax_too(gpt2):
    """JAX tells numpy of that type; who comes without it must do so too."""
    change_tensors(gpt2, lambda t: t.update({name: t[name].astype("bfloat16") for name in t}))
    script = (
        "import sys; from nanogpt_jax.gpt2 import weights\n"
        "for tensor in weights.open_tensors(sys.argv[1]).values(): assert tensor.read().size\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, gpt2], check=True)


def split_weights(source: str, names=("a-1.safetensors", "a-2.safetensors")) -> None:
    """Distribute the weights over two files and their index."""
    whole = Path(source, "model.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    weight_map = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, Path(source, file), {"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    Path(source, "model.safetensors.index.json").write_text(index)


def test_weights_in_several_files_are_the_same(gpt2):
    _, expected = load(gpt2)
    split_weights(gpt2)
    assert_equal(load(gpt2)[1], expected)


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (1, 2, 2), (1, 1, 4)])
def test_on_a_mesh_each_device_reads_only_its_part(tmp_path, monkeypatch, sizes):
    source, golden = save_golden(tmp_path / "gpt2", 4)
    config = replace(gpt2_config.read_config(source), vocab_size=32, known_tokens=10)
    model, expected = load(source, config)
    n_read = []
    real = convert.weights.Tensor.read

    def read(tensor, index=(slice(None),)):
        values = real(tensor, index)
        n_read.append(values.size)
        return values

    monkeypatch.setattr(convert.weights.Tensor, "read", read)
    _, params = load(source, config, sizes)
    assert_equal(params, expected)
    shards = [shard.data.size for x in jax.tree.leaves(params) for shard in x.addressable_shards]
    assert max(n_read) <= max(shards)
    assert (max(n_read) < 8 * 32) == (sizes != (4, 1, 1))  # the largest kernel
    np.testing.assert_allclose(
        logits(model, expected, golden["batch_BT"])[..., :10], golden["logits_BTV"], atol=1e-5
    )


def test_a_shorter_context_takes_the_first_positions(tmp_path):
    source, golden = save_golden(tmp_path / "gpt2", 3)
    model, params = load(source, replace(gpt2_config.read_config(source), block_size=5))
    assert params["wpe"]["embedding"].shape == (5, 12)
    logits_BTV = logits(model, params, golden["batch_BT"][:, :5])
    np.testing.assert_allclose(logits_BTV, golden["logits_BTV"][:, :5], atol=1e-5)


# A padded vocabulary


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """(model, params, the unpadded of both): 23 tokens, padded to 64."""
    gpt2, _ = save_golden(tmp_path_factory.mktemp("padded") / "gpt2", 3)
    model, params = load(gpt2)
    wide = replace(model.config, vocab_size=64, known_tokens=23)
    return *load(gpt2, wide), model, params


@pytest.mark.slow
def test_padding_changes_neither_logits_nor_loss_nor_gradients(padded):
    wide_model, wide_params, model, params = padded
    assert wide_params["wte"]["embedding"].shape == (64, 12)
    batch_BT = np.arange(27).reshape(3, 9) % 23

    def loss_and_grads(model, params):
        losses = jax.jit(lambda params: steps.token_losses(model, params, batch_BT).mean())
        return jax.value_and_grad(losses)(params)

    wide_loss, wide_grads = loss_and_grads(wide_model, wide_params)
    exact_loss, grads = loss_and_grads(model, params)
    np.testing.assert_allclose(wide_loss, exact_loss, rtol=1e-6)
    assert not np.any(wide_grads["wte"]["embedding"][23:])
    wide_grads["wte"]["embedding"] = wide_grads["wte"]["embedding"][:23]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), wide_grads, grads)
    logits_BTV = logits(wide_model, wide_params, batch_BT)
    np.testing.assert_allclose(logits_BTV[..., :23], logits(model, params, batch_BT), atol=1e-6)
    assert np.all(np.isneginf(logits_BTV[..., 23:]))


def test_padding_is_never_drawn(padded):
    """With zero rows but no mask, a high temperature would draw it two times out of three."""
    model, params, _, _ = padded
    logits_BV = jax.numpy.tile(logits(model, params, np.zeros((1, 1), np.int32))[0], (1000, 1))
    for sampling in (
        decoding.Sampling(temperature=0.0),
        decoding.Sampling(temperature=1e-30),
        decoding.Sampling(temperature=100.0),
        decoding.Sampling(temperature=100.0, top_k=60),
        decoding.Sampling(temperature=100.0, top_p=0.9999),
    ):
        tokens_B = decoding._draw(logits_BV, decoding.row_keys(0, range(1000)), 0, sampling)
        assert tokens_B.max() < 23
        assert len(set(tokens_B.tolist())) == (23 if sampling.temperature > 1 else 1)


# Shapes that are refused


def refused(source: str, *parts: str) -> None:
    """Expect one line that names the parts."""
    with pytest.raises(InputError) as error:
        load(source)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type must be gpt2, got 'llama'"),
        ({"model_type": "gone"}, "model_type must be gpt2, but is missing"),
        ({"n_layer": "gone"}, "n_layer must be a whole number from 1 to 1024, but is missing"),
        ({"n_layer": 10**9}, "n_layer must be a whole number from 1 to 1024, got 1000000000"),
        ({"n_embd": "12"}, "n_embd must be a whole number from 1 to 65536, got '12'"),
        ({"n_embd": 12.0}, "n_embd must be a whole number"),
        ({"n_head": True}, "n_head must be a whole number"),
        ({"n_head": 0}, "n_head must be a whole number"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head=5"),
        ({"vocab_size": None}, "vocab_size must be a whole number"),
        ({"vocab_size": [23]}, "vocab_size must be a whole number"),
        ({"n_positions": -9}, "n_positions must be a whole number"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon must be 1e-05 or left out, got 1e-06"),
        ({"layer_norm_epsilon": float("nan")}, "NaN"),
        ({"n_inner": 47}, "n_inner must be null or 4 n_embd = 48, got 47"),
        ({"activation_function": "relu"}, "activation_function must be one of gelu_new, gelu"),
        ({"activation_function": ["gelu"]}, "activation_function must be one of"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true or left out, got False"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be true"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be fal"),
        ({"add_cross_attention": True}, "add_cross_attention must be false"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.GPT"}}, "auto_map must be null"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be null"),
        ({"nanogpt_jax": {"bias": "no"}}, "nanogpt_jax must be like"),
        ({"nanogpt_jax": None}, "nanogpt_jax must be like"),
        ({"model_type": 10000 * "x"}, "model_type must be gpt2, got 'xxx"),
    ],
)
def test_another_model_than_ours_is_refused_by_its_config(gpt2, fields, message):
    change_config(gpt2, **fields)
    refused(gpt2, "config.json: ", message)


def test_fields_that_change_no_number_are_of_no_account(gpt2):
    expected = gpt2_config.read_config(gpt2)
    change_config(gpt2, attn_pdrop=0.9, n_ctx=3, n_inner=None, task_specific_params={"a": 1})
    change_config(gpt2, activation_function="gone", layer_norm_epsilon="gone")
    assert gpt2_config.read_config(gpt2) == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b'"gpt2"', 50_000 * b"[", b'{"n_layer": ' + 9999 * b"9"],
)
def test_a_config_that_is_none_is_one_line(gpt2, content):
    Path(gpt2, "config.json").write_bytes(content)
    refused(gpt2, "config.json: must")


def test_a_config_that_is_a_book_is_not_read(gpt2):
    Path(gpt2, "config.json").write_bytes(b" " * (2**20 + 1))
    refused(gpt2, "larger than 1 MiB")


def test_a_run_that_starts_from_a_gpt2_adopts_its_shape_but_keeps_its_own_context(gpt2):
    theirs = gpt2_config.read_config(gpt2)
    n_positions, n_tokens = theirs.block_size, theirs.vocab_size

    def adopt(**fields):
        model = ModelConfig(
            **{"block_size": n_positions - 1, "n_layer": 9, "dropout": 0.1} | fields
        )
        config = TrainConfig(model=model, init_from=gpt2)
        return run.adopt(config)[0].model

    assert adopt() == replace(
        theirs, block_size=n_positions - 1, dropout=0.1, known_tokens=n_tokens
    )
    padded = adopt(vocab_size=64)
    assert (padded.vocab_size, padded.known_tokens) == (64, n_tokens)
    with pytest.raises(InputError, match=f"vocab_size must be at least {n_tokens} with"):
        adopt(vocab_size=1)
    with pytest.raises(InputError, match=f"block_size must be at most {n_positions} with"):
        adopt(block_size=n_positions + 1)


def test_a_source_is_a_gpt2_if_its_config_says_so(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpt2_config.is_gpt2(gpt2)
    assert gpt2_config.is_gpt2(Path(gpt2))
    assert gpt2_config.is_gpt2("gpt2-xl")
    assert not gpt2_config.is_gpt2(Path("gpt2-xl")), "a Path is always a folder"
    change_config(gpt2, model_type="gone", made_with={})
    assert not gpt2_config.is_gpt2(gpt2)
    for other in "", "nowhere", "no\0file", 5000 * "a":
        assert not gpt2_config.is_gpt2(other)


def test_weights_bring_their_tokenizer_where_they_have_one(gpt2):
    path = Path(gpt2, "tokenizer.json")
    found = nanogpt_jax.find(gpt2)
    assert (found.tokenizer, found.tokenizer_path) == (None, None)
    save_tokenizer(CHARS, Path(gpt2))
    found = nanogpt_jax.find(gpt2)
    assert (found.tokenizer, found.tokenizer_path) == (CHARS, str(path))


def test_a_corpus_of_other_tokens_than_the_weights_know_is_refused(gpt2):
    """It would train, on noise: token 5 of the one is not token 5 of the other."""
    mine, other = CharTokenizer("abc"), CharTokenizer("abd")
    pairs = BPETokenizer.train(["the cat sat" * 20], 270)
    save_tokenizer(mine, gpt2)
    config, source = TrainConfig(init_from=gpt2), nanogpt_jax.find(gpt2)
    assert run.adopt_tokenizer(config, source, corpus_of(mine)).tokenizer == mine
    assert run.adopt_tokenizer(config, source, corpus_of(None)).tokenizer == mine
    for tokenizer in (other, pairs):
        for requested in (None, "char"):
            with pytest.raises(InputError, match=f"the tokens that the weights of {gpt2} know"):
                run.adopt_tokenizer(
                    replace(config, tokenizer=requested), source, corpus_of(tokenizer)
                )


def test_weights_without_a_tokenizer_ask_for_one(gpt2):
    """As `model.save_pretrained` leaves them."""
    config, chars = TrainConfig(init_from=gpt2), CharTokenizer("abc")
    source = nanogpt_jax.find(gpt2)
    with pytest.raises(InputError, match=r"has no tokenizer.json, so .*name it with --tokenizer"):
        run.adopt_tokenizer(config, source, corpus_of(chars))
    assert run.adopt_tokenizer(replace(config, tokenizer="char"), source, corpus_of(chars))


def test_a_run_from_scratch_needs_no_weights():
    config = TrainConfig()
    assert run.adopt(config) == (config, None)
    corpus = corpus_of(CHARS)
    assert run.adopt_tokenizer(config, None, corpus) is corpus


def test_weights_are_found_missing_before_they_are_needed(gpt2):
    source = nanogpt_jax.find(gpt2)
    pretrained.check_weights(source)
    Path(gpt2, "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"there is no .*model\.safetensors"):
        pretrained.check_weights(source)


def test_the_four_names_have_their_shape_without_a_network(monkeypatch):
    monkeypatch.setattr(gpt2_config.hub, "find", None)
    config = gpt2_config.read_config("gpt2-xl")
    assert hardware.n_params(config) == 1_557_611_200
    assert (config.n_head, config.block_size, config.bias) == (25, 1024, True)
    assert config.activation == "gelu_tanh"
    assert hardware.n_params(gpt2_config.read_config("gpt2")) == 124_439_808


# Files that are refused


def edit(name: str, change):
    """Return a change of tensors: the one of this name becomes change(it)."""
    return lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))})


FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda t: t.pop(FC), ["lack 'h.0.mlp.c_fc.weight'"]),
        (lambda t: t.update({"score.weight": t[FC]}), ["have 'score.weight' in addition"]),
        (lambda t: t.update({"h.0.mlp.c_fc.weight": t[FC]}), ["'h.0.mlp.c_fc.weight' must come o"]),
        (lambda t: t.update({"a\nb" + 999 * "c": t[FC]}), [r"have 'a\nbccc"]),
        (edit(FC, np.transpose), ["c_fc.weight must have the shape (12, 48), as", "has (48, 12)"]),
        (edit("transformer.wpe.weight", lambda x: x[1:]), ["wpe.weight", "(9, 12)", "(8, 12)"]),
        (edit("transformer.wte.weight", lambda x: x[1:]), ["wte.weight", "(23, 12)", "(22, 12)"]),
        (edit("transformer.wte.weight", np.sum), ["wte.weight", "(23, 12)", "(1,)"]),
        (edit(FC, lambda x: x * np.float32(np.nan)), ["c_fc.weight must be finite"]),
        (edit(FC, lambda x: x / np.float32(0)), ["c_fc.weight must be finite"]),
        (edit(FC, lambda x: x.astype(np.int8)), ["dtype F32, F16, BF16, but has I8: load it with"]),
        (edit(FC, lambda x: x.astype(np.float64)), ["but has F64"]),
        (
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] * np.float32(1.001)}),
            ["lm_head.weight must equal wte.weight"],
        ),
        (
            lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"][:-1]}),
            ["lm_head.weight must equal wte.weight"],
        ),
        (lambda t: t.clear(), ["lack 'h.0.attn.c_attn.bias', ", " 12 more: take config.json"]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_tensors_that_are_not_the_models_are_named(gpt2, change, parts):
    change_tensors(gpt2, change)
    refused(gpt2, gpt2, *parts)


def test_a_missing_file_is_named(gpt2):
    Path(gpt2, "model.safetensors").unlink()
    refused(gpt2, "there is no", "model.safetensors")


def test_a_pickle_is_not_opened(gpt2):
    Path(gpt2, "model.safetensors").rename(Path(gpt2, "pytorch_model.bin"))
    refused(gpt2, "pytorch_model.bin: this is a pickle, which can run any code", "save_pretrained")


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/passwd", "..", "a/b.safetensors", "C:\\a.safetensors", "a.bin", ""],
)
def test_an_index_cannot_name_files_elsewhere(gpt2, name):
    split_weights(gpt2)
    index = Path(gpt2, "model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    shutil.copy(Path(gpt2, "a-1.safetensors"), Path(gpt2, "..", "a.safetensors"))
    refused(gpt2, "index.json: must be like", "with the names of files next to it")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', 9999 * "["]
)
def test_an_index_that_is_none_is_one_line(gpt2, content):
    split_weights(gpt2)
    Path(gpt2, "model.safetensors.index.json").write_text(content)
    refused(gpt2, "index.json: must be like")


def test_a_file_that_an_index_names_must_be_there(gpt2):
    split_weights(gpt2)
    Path(gpt2, "a-2.safetensors").unlink()
    refused(gpt2, "there is no", "a-2.safetensors")


def header(**fields) -> bytes:
    """Return a safetensors file that tells of one tensor, without its numbers."""
    content = json.dumps({"wte.weight": {"dtype": "F32"} | fields}).encode()
    return len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(8),
        (4 * 2**30).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04" + bytes(100),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        header(shape=[2**31, 2**31], data_offsets=[0, 4]),
        header(shape=[-1], data_offsets=[0, 4]) + bytes(4),
        header(shape=[1], data_offsets=[4, 0]),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_tensors_is_one_line(gpt2, content):
    Path(gpt2, "model.safetensors").write_bytes(content)
    refused(gpt2, "model.safetensors: must be a safetensors file, but ")


def test_a_damaged_file_gives_tensors_or_an_input_error(gpt2):
    """Cut off anywhere, or with random bytes in its header or anywhere else."""
    path = Path(gpt2, "model.safetensors")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in [*range(0, header, 17), *range(header, len(whole), 997)]]
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.integers(header if rng.random() < 0.8 else len(whole), size=3):
            content[place] = rng.integers(256)
        damaged.append(bytes(content))
    damaged += [rng.bytes(int(n)) for n in rng.integers(1, 500, size=50)]
    model = GPT(gpt2_config.read_config(gpt2))
    abstract = jax.eval_shape(partial(steps.init_params, model), jax.random.key(0))
    abstract = sharding.place(abstract, sharding.make_mesh())
    refusals = []
    for content in damaged:
        path.unlink()  # not written over: what was read may still be mapped
        path.write_bytes(content)
        try:
            convert.load_params(gpt2, gpt2_config.read_config(gpt2), abstract)
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) > 0.9 * len(damaged)
    assert not any("\n" in refusal for refusal in refusals)


# A run out


CONFIG = ModelConfig(block_size=16, n_layer=2, n_head=2, n_embd=12, bias=True)
CHARS = CharTokenizer("".join(sorted(set(TEXT))))
BPE = BPETokenizer.train([TEXT], 300)
RUNS = {
    "chars": (replace(CONFIG, vocab_size=CHARS.vocab_size), CHARS),
    "bpe": (replace(CONFIG, vocab_size=BPE.vocab_size, activation="gelu_tanh"), BPE),
    "no_bias": (replace(CONFIG, vocab_size=CHARS.vocab_size, bias=False), CHARS),
    "padded": (replace(CONFIG, vocab_size=320, known_tokens=BPE.vocab_size, n_head=3), BPE),
}


@pytest.fixture(scope="module", params=RUNS)
def exported(request, tmp_path_factory):
    """(config, tokenizer, params, folder of its export) of runs of several kinds."""
    config, tokenizer = RUNS[request.param]
    params, folder = random_params(config), tmp_path_factory.mktemp("exported")
    save_run(folder / "run", config, tokenizer, params)
    convert.export(folder / "run", folder / "hf")
    return config, tokenizer, params, folder / "hf"


def test_what_was_exported_comes_back_bit_for_bit(exported):
    config, tokenizer, params, folder = exported
    again = gpt2_config.read_config(str(folder))
    known = config.known_tokens or config.vocab_size
    assert again == replace(config, vocab_size=known, known_tokens=None)
    expected = params | {"wte": {"embedding": params["wte"]["embedding"][:known]}}
    assert_equal(load(str(folder))[1], expected)
    assert load_tokenizer(folder).to_json() == tokenizer.to_json()


def test_an_export_has_every_tensor_of_a_gpt2_in_float32(exported):
    config, _, _, folder = exported
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == 4 + 12 * config.n_layer
    assert {array.dtype for array in tensors.values()} == {np.dtype("f")}
    assert all(name.startswith("transformer.") for name in tensors)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # older `transformers` refuse what lacks it
    biases = [array for name, array in tensors.items() if name.endswith(".bias")]
    assert any(array.any() for array in biases) == config.bias


def test_who_may_read_one_file_of_an_export_may_read_all(exported):
    _, _, _, folder = exported
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_an_export_tells_its_end_of_text_or_that_there_is_none(exported):
    _, tokenizer, _, folder = exported
    for name in "config.json", "generation_config.json":
        loaded = json.loads((folder / name).read_text())
        expected = 0 if isinstance(tokenizer, BPETokenizer) else None
        assert (loaded["bos_token_id"], loaded["eos_token_id"]) == (expected, expected)


def test_a_gpt2_goes_through_us_bit_for_bit(gpt2, tmp_path):
    model, params = load(gpt2)
    save_run(tmp_path / "run", model.config, None, params)
    convert.export(tmp_path / "run", tmp_path / "again")
    before, after = (
        load_file(Path(folder, "model.safetensors")) for folder in (gpt2, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == set()


def test_biases_that_were_zeros_when_exported_must_be_so_still(saved_run, tmp_path):
    convert.export(saved_run, tmp_path / "hf")
    name = "transformer.ln_f.bias"
    change_tensors(str(tmp_path / "hf"), edit(name, lambda x: x + np.float32(1)))
    refused(str(tmp_path / "hf"), "ln_f.bias must be zero in a model without biases")


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory) -> Path:
    config, tokenizer = RUNS["no_bias"]
    folder = tmp_path_factory.mktemp("saved") / "run"
    save_run(folder, config, tokenizer, random_params(config))
    return folder


@pytest.fixture
def chars_run(saved_run, tmp_path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


def test_best_and_latest_are_those_asked_for(chars_run, tmp_path, capsys):
    config, tokenizer = RUNS["no_bias"]
    save_run(chars_run, config, tokenizer, random_params(config, seed=1), step=14)
    for asked, step, seed in ("best", 7, 0), ("latest", 14, 1):
        folder = tmp_path / asked
        convert.main([str(chars_run), str(folder), "--checkpoint", asked])
        out = capsys.readouterr().out
        assert f"step {step}: " in out
        assert "the model has no biases" in out
        assert_equal(load(str(folder))[1], random_params(config, seed=seed))


def test_a_run_without_a_tokenizer_is_exported_without_one(chars_run, tmp_path, capsys):
    (chars_run / "tokenizer.json").unlink()
    convert.export(chars_run, tmp_path / "hf")
    assert "the run has no tokenizer.json" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip


def test_a_folder_that_holds_files_is_left_alone(chars_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="mine: must be a new folder or an empty one"):
        convert.export(chars_run, tmp_path / "mine")
    for place in tmp_path / "mine" / "thesis.tex", tmp_path / "mine" / "thesis.tex" / "below":
        with pytest.raises(InputError, match=r"thesis\.tex.*: cannot be written"):
            convert.export(chars_run, place)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_export_that_fails_leaves_nothing_behind(chars_run, tmp_path, monkeypatch, error):
    def fail(path, *args, **kwargs):
        raise error

    monkeypatch.setattr(Path, "write_text", fail)
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is InputError else None):
        convert.export(chars_run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_weights_come_before_the_config_without_which_nothing_loads(
    chars_run, tmp_path, monkeypatch
):
    """So a kill at any time leaves nothing that loads as a half-written model."""
    real, written = Path.write_text, []

    def write_text(path, *args, **kwargs):
        assert (path.parent / "model.safetensors").exists()
        written.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    convert.export(chars_run, tmp_path / "hf")
    assert written[-1] == "config.json"


def test_what_is_no_run_to_export_is_one_line(chars_run, tmp_path):
    with pytest.raises(InputError, match=r"there is no .*nothing.config\.json"):
        convert.export(tmp_path / "nothing", tmp_path / "hf")
    shutil.rmtree(chars_run / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        convert.export(chars_run, tmp_path / "hf")
    rung = ModelConfig(architecture="bigram", n_layer=1, n_head=1, vocab_size=9, bias=True)
    run_folder.begin(tmp_path / "rung", TrainConfig(model=rung), {})
    with pytest.raises(InputError, match="whose architecture must be gpt, but is bigram"):
        convert.export(tmp_path / "rung", tmp_path / "hf")
    few = replace(RUNS["bpe"][0], vocab_size=100)
    run_folder.begin(tmp_path / "few", TrainConfig(model=few), {})
    save_tokenizer(BPE, tmp_path / "few")
    (tmp_path / "few" / "checkpoints" / "7" / "params").mkdir(parents=True)
    with pytest.raises(InputError, match="at most the 100 tokens"):
        convert.export(tmp_path / "few", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


OTHER_THAN_GPT2 = {name: value for name, value in MODERN.items() if name != "zero_init"}
OTHER_THAN_GPT2 |= {"token_shift": True, "attention_window": 4}


@pytest.mark.parametrize(
    "fields",
    [{"activation": "relu2"}, *({name: value} for name, value in OTHER_THAN_GPT2.items()), MODERN],
    ids=str,
)
def test_a_run_with_a_part_that_gpt2_has_not_is_not_exported(tmp_path, fields):
    run = tmp_path / "run"
    run_folder.begin(run, TrainConfig(model=replace(RUNS["chars"][0], **fields)), {})
    with pytest.raises(InputError) as error:
        convert.export(run, tmp_path / "hf")
    message = str(error.value)
    assert message.startswith(f"{run}: only a GPT-2 can be exported")
    assert "\n" not in message
    named = re.search(r"whose (\w+) must be .* but is ", message)[1]
    assert named in fields
    assert f"but is {fields[named]}: name another run" in message
    assert not (tmp_path / "hf").exists()


def test_how_a_run_began_is_of_no_account_for_its_export(tmp_path):
    config = replace(RUNS["chars"][0], zero_init=True)
    params = random_params(config)
    save_run(tmp_path / "run", config, CHARS, params)
    convert.export(tmp_path / "run", tmp_path / "hf")
    loaded = load(str(tmp_path / "hf"))[1]
    assert_equal(loaded, params)


# The command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "export takes two words, a run's folder and a new one, got 0"),
        (["out/small"], "for example: python -m nanogpt_jax export out/small small-gpt"),
        (["a", "b", "c"], "got 3; "),
        (["a", "b", "--checkpont", "best"], "Did you mean checkpoint?"),
        (["a", "b", "--checkpoint", "worst"], "worst"),
        (["a", "b"], "a run's folder, like out/small, .* but there is no a/config.json"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        convert.main(argv)


def test_a_gpt2_is_not_exported_again(gpt2, tmp_path):
    with pytest.raises(InputError, match="Hugging Face GPT-2 already"):
        convert.main([gpt2, str(tmp_path / "again")])


def test_the_command_validates_its_request_without_importing_jax(chars_run, tmp_path):
    (tmp_path / "mine").write_text("a file")
    script = "import sys; from nanogpt_jax.gpt2.convert import main; main(sys.argv[1:])"
    for argv, message in (["--help"], "--checkpoint"), ([str(chars_run), "mine"], "mine: cannot"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", script, *argv],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert message in done.stdout + done.stderr
        assert not re.search(r"\| +(jax|flax|huggingface_hub)$", done.stderr, re.MULTILINE)
