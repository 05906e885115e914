"""Live against Hugging Face's `transformers`: its GPT-2s in, our runs out, the same numbers.

Needs what the suite does without: pip install torch==2.13.0 transformers
"""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their imports
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file
from test_convert import (
    BPE,
    CHARS,
    RUNS,
    TEXT,
    assert_equal,
    continuation,
    load,
    logits,
    random_params,
    save_run,
)

from nanogpt_jax.gpt2 import config as gpt2_config
from nanogpt_jax.gpt2 import convert
from nanogpt_jax.model import GPT

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

SHAPES = (
    {"n_layer": 1, "n_head": 1, "n_embd": 16, "vocab_size": 50, "n_positions": 12},
    {"n_layer": 3, "n_head": 5, "n_embd": 40, "vocab_size": 211, "n_positions": 33},
    {"n_layer": 2, "n_head": 3, "n_embd": 48, "vocab_size": 97, "n_positions": 64}
    | {"activation_function": "gelu"},
    {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 128, "n_positions": 20}
    | {"activation_function": "gelu_pytorch_tanh", "n_inner": 256},
)


def random_gpt2(shape: dict):
    """Return a GPT-2 of theirs with weights much larger than a new one's."""
    torch.manual_seed(shape["n_embd"])
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None, **shape)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(float(".ln_" in name and name.endswith("weight")), 0.15)
    return model


def their_logits(model, batch_BT):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(batch_BT))).logits.numpy()


def their_continuation(model, start_BT, n_tokens: int):
    start_BT = torch.tensor(np.asarray(start_BT))
    made_BT = model.generate(
        start_BT,
        attention_mask=torch.ones_like(start_BT),
        do_sample=False,
        max_new_tokens=n_tokens,
        pad_token_id=0,
    )
    return made_BT.numpy()


def random_batch(vocab_size: int, *shape: int):
    return np.random.default_rng(0).integers(vocab_size, size=shape)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_head']}-heads")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)], ids=["one-device", "mesh-of-four"])
def test_a_gpt2_of_theirs_writes_the_same_here(tmp_path, shape, sizes):
    theirs = random_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    model, params = load(str(tmp_path), sizes=sizes)
    batch_BT = random_batch(shape["vocab_size"], 3, shape["n_positions"])
    ours, expected = logits(model, params, batch_BT), their_logits(theirs, batch_BT)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    n_new = shape["n_positions"] - 4
    start_BT = batch_BT[:, :4]
    np.testing.assert_array_equal(
        continuation(model, params, start_BT, n_new), their_continuation(theirs, start_BT, n_new)
    )


def test_weights_that_they_split_over_files_are_the_same(tmp_path):
    theirs = random_gpt2(SHAPES[1])
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "split", max_shard_size="50KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 3
    assert_equal(load(str(tmp_path / "split"))[1], load(str(tmp_path / "whole"))[1])


def test_a_shorter_context_and_a_padded_vocabulary_change_no_logits(tmp_path):
    theirs = random_gpt2(SHAPES[1])
    theirs.save_pretrained(tmp_path)
    config = gpt2_config.read_config(str(tmp_path))
    config = replace(config, block_size=16, vocab_size=256, known_tokens=211)
    model, params = load(str(tmp_path), config, sizes=(1, 4, 1))
    batch_BT = random_batch(211, 3, 16)
    np.testing.assert_allclose(
        logits(model, params, batch_BT)[..., :211], their_logits(theirs, batch_BT), atol=1e-4
    )


def test_their_model_through_us_is_bit_for_bit_theirs(tmp_path):
    theirs = random_gpt2(SHAPES[1])
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load(str(tmp_path / "theirs"))
    save_run(tmp_path / "run", model.config, None, params)
    convert.export(tmp_path / "run", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_of_ours_writes_the_same_there(tmp_path, kind):
    config, tokenizer = RUNS[kind]
    params = random_params(config)
    save_run(tmp_path / "run", config, tokenizer, params)
    convert.export(tmp_path / "run", tmp_path / "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()), report
    known = config.known_tokens or config.vocab_size
    assert theirs.config.vocab_size == known
    batch_BT = random_batch(known, 3, config.block_size)
    ours = logits(GPT(config), params, batch_BT)
    np.testing.assert_allclose(ours[..., :known], their_logits(theirs, batch_BT), atol=1e-4)

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    start = "the cat"
    start_BT = np.array(their_tokenizer(start).input_ids)[None]
    np.testing.assert_array_equal(start_BT[0], tokenizer.encode(start))
    n_new = config.block_size - start_BT.shape[1]
    theirs.generation_config.eos_token_id = None  # ours goes on after the end of a document
    theirs_BT = their_continuation(theirs, start_BT, n_new)
    ours_BT = continuation(GPT(config), params, start_BT, n_new)
    np.testing.assert_array_equal(ours_BT, theirs_BT)
    assert their_tokenizer.decode(theirs_BT[0]) == tokenizer.decode(ours_BT[0])

    theirs.save_pretrained(tmp_path / "again")  # their way of writing it, read by us
    (again,) = (tmp_path / "again").glob("*.safetensors")
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(again)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert_equal(load(str(tmp_path / "again"))[1], load(str(tmp_path / "hf"))[1])
    assert load(str(tmp_path / "again"))[0].config.bias == config.bias


@pytest.mark.parametrize("tokenizer", [CHARS, BPE], ids=["chars", "bpe"])
def test_their_tokenizer_says_the_same_of_any_text(tmp_path, tokenizer):
    config = replace(RUNS["bpe"][0], vocab_size=tokenizer.vocab_size)
    for name, content in gpt2_config.config_files(config, tokenizer).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, model_max_length=10**6)
    texts = [TEXT, "", "\n", "  \n\n  cat  ,  the", "cat,cat .", " a  t "]
    if tokenizer is BPE:
        texts += ["Grüße, 世界! 🎭 e\u0301\r\n\tit's I 'd , . ?", "a<|endoftext|>\n<|endoftext|>b"]
    else:
        texts = [text.replace("'", "") for text in texts]
    for text in texts:
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode_prompt(text).tolist()
        assert theirs.decode(ids) == text == tokenizer.decode(ids)
    assert len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_their_pipeline_writes_with_its_defaults(tmp_path, kind):
    """Up to 256 new tokens, for which this model has no positions."""
    config, tokenizer = RUNS[kind]
    save_run(tmp_path / "run", config, tokenizer, random_params(config))
    convert.export(tmp_path / "run", tmp_path / "hf")
    write = transformers.pipeline("text-generation", str(tmp_path / "hf"))
    (found,) = write("the cat", do_sample=False, eos_token_id=-1, return_tensors=True)
    assert len(found["generated_token_ids"]) == config.block_size
    with pytest.raises(ValueError, match=f"`max_length` is set to {config.block_size}"):
        write("the cat " * 30)


def test_they_end_at_the_end_of_a_document_where_there_is_one(tmp_path):
    for tokenizer, expected in (BPE, 0), (CHARS, None):
        config = replace(RUNS["bpe"][0], vocab_size=tokenizer.vocab_size)
        folder = tmp_path / str(expected)
        save_run(folder / "run", config, tokenizer, random_params(config))
        convert.export(folder / "run", folder / "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
        found = theirs.generation_config.eos_token_id, theirs.config.eos_token_id
        assert found == (expected, expected)
        assert "bos_token_id" in json.loads((folder / "hf" / "config.json").read_text())
