"""nanogpt_jax in Python: load, generate and stream."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import nanogpt_jax
import train
from nanogpt_jax import steps
from nanogpt_jax.config import SampleConfig
from nanogpt_jax.corpora import BPETokenizer
from nanogpt_jax.errors import InputError

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "run_v1"
RUN = FIXTURE / "run"  # best at step 120, newest at step 140; block_size 16
SHORT = {"max_new_tokens": 48, "seed": 3}  # as in test_sample.py, compiled once for both


@pytest.fixture(scope="module")
def run():
    return nanogpt_jax.load(RUN)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a Hugging Face GPT-2 of three heads, and a tokenizer with as many tokens."""
    folder = tmp_path_factory.mktemp("gpt2")
    with np.load(ROOT / "tests" / "golden" / "pretrained.npz") as golden:
        config = json.loads(golden["2.config"].tobytes())
        (folder / "model.safetensors").write_bytes(golden["2.model"].tobytes())
    (folder / "config.json").write_text(json.dumps(config))
    chars = "".join(chr(ord("a") + n) for n in range(config["vocab_size"]))
    (folder / "tokenizer.json").write_text(json.dumps({"type": "char", "chars": chars}))
    return folder


def printed_by_sample(*flags: str) -> str:
    spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert sample.main([*flags]) == 0
    return stdout.getvalue()


@pytest.mark.parametrize(("checkpoint", "step"), [("best", 120), ("latest", 140)])
def test_a_checkpoint_is_loaded_with_all_that_the_folder_says(checkpoint, step):
    """The logits are those that the version which made the fixture computed."""
    run = nanogpt_jax.load(str(RUN), checkpoint=checkpoint)
    assert (run.step, run.config.block_size, run.model.config) == (step, 16, run.config)
    expected = json.loads((FIXTURE / "expected.json").read_text())["logits"][checkpoint]
    text = (FIXTURE / "text.txt").read_text()
    tokens_T = run.tokenizer.encode(text)[: run.config.block_size]
    logits_BTV, _ = run.model.apply({"params": run.params}, tokens_T[None])
    np.testing.assert_allclose(logits_BTV[0], expected, atol=1e-6 * np.abs(expected).max())


def test_without_a_source_the_newest_run_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"train\.py"):
        nanogpt_jax.load()
    shutil.copytree(RUN, "out/mine")
    assert nanogpt_jax.load().name == str(Path("out", "mine"))


def test_generate_and_stream_give_the_text_of_sample_py(run):
    flags = f"--out_dir={RUN}", "--max_new_tokens=48", "--seed=3", "--start=a cat"
    texts = nanogpt_jax.generate(run, "a cat", num_samples=2, **SHORT)
    printed = printed_by_sample(*flags, "--num_samples=2")
    assert printed == "".join(f"{text}\n{15 * '-'}\n" for text in texts)
    for sample, text in enumerate(texts):
        pieces = list(nanogpt_jax.stream(run, "a cat", sample=sample, **SHORT))
        assert "a cat" + "".join(pieces) == text
        assert len(pieces) > 20
    assert nanogpt_jax.generate(run, "a cat", **SHORT) == texts[0]


def test_without_a_prompt_the_model_starts_from_a_line_break(run):
    assert "\n" + nanogpt_jax.generate(run, **SHORT) == nanogpt_jax.generate(run, "\n", **SHORT)


def test_a_stream_continues_with_the_random_numbers_that_are_next(run):
    whole = nanogpt_jax.generate(run, "a", **SHORT)
    rest = nanogpt_jax.stream(run, whole[:6], n_generated=5, **SHORT | {"max_new_tokens": 9})
    assert whole[:6] + "".join(rest) == whole[:15]


def test_stop_ends_the_text(run):
    whole = nanogpt_jax.generate(run, "a", **SHORT)
    assert nanogpt_jax.generate(run, "a", stop="at", **SHORT) == whole.split("at")[0]
    assert "a" + "".join(nanogpt_jax.stream(run, "a", stop="at", **SHORT)) == whole.split("at")[0]


def test_a_second_call_and_a_second_checkpoint_compile_nothing(run):
    latest = nanogpt_jax.load(RUN, checkpoint="latest")
    nanogpt_jax.generate(run, "a cat", **SHORT)
    list(nanogpt_jax.stream(run, "a cat", **SHORT))
    compiled = []
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "logging.Logger._log",
            lambda self, level, message, *args, **kw: compiled.append(message % args[0]),
        )
        for loaded in run, latest:
            nanogpt_jax.generate(loaded, "a hat on a cat on a mat", **SHORT)
            list(nanogpt_jax.stream(loaded, "a", **SHORT | {"max_new_tokens": 3}))
        assert not compiled
        list(nanogpt_jax.stream(run, "a cat", **SHORT | {"temperature": 0.3}))
    assert compiled, "another temperature compiles a few operations"
    assert not any("read" in message for message in compiled), "but not the model"


def test_settings_are_those_of_sample_py():
    config = SampleConfig(temperature=0.5, stop="x")
    settings = nanogpt_jax.settings_of(config)
    assert settings["temperature"] == 0.5
    assert SampleConfig(**settings) == config


def test_a_hugging_face_gpt2_is_loaded_from_its_folder(gpt2):
    loaded = nanogpt_jax.load(gpt2)
    assert (loaded.step, loaded.folder, loaded.config.n_head) == (None, None, 3)
    assert len(nanogpt_jax.generate(loaded, "abc", **SHORT)) == 3 + 48
    config = json.loads((gpt2 / "config.json").read_text())
    assert loaded.config.vocab_size == config["vocab_size"]
    printed = printed_by_sample(
        f"--init_from={gpt2}", "--num_samples=1", "--max_new_tokens=48", "--seed=3", "--start=abc"
    )
    assert printed.startswith(nanogpt_jax.generate(loaded, "abc", **SHORT))


@pytest.fixture
def with_tokens(gpt2, tmp_path):
    """Copy the GPT-2 with a tokenizer that has so many tokens more than its embedding."""

    def copy(n_more):
        chars = json.loads((gpt2 / "tokenizer.json").read_text())["chars"]
        chars = chars[:n_more] if n_more < 0 else chars + "yz{"[:n_more]
        shutil.copytree(gpt2, tmp_path / "copy")
        (tmp_path / "copy" / "tokenizer.json").write_text(
            json.dumps({"type": "char", "chars": chars})
        )
        return tmp_path / "copy", set(chars)

    return copy


def test_an_embedding_larger_than_its_tokenizer_writes_known_tokens_only(with_tokens):
    folder, chars = with_tokens(-4)
    loaded = nanogpt_jax.load(folder)
    assert set(nanogpt_jax.generate(loaded, max_new_tokens=400, top_k=0, temperature=2)) <= chars


def test_a_tokenizer_larger_than_its_embedding_is_refused_with_both_sizes(with_tokens, tmp_path):
    """Such as after adding a [PAD] and not resizing the model."""
    folder, chars = with_tokens(2)
    with pytest.raises(InputError, match="make room for them with transformers"):
        nanogpt_jax.find(folder)
    message = f"most the {len(chars) - 2} tokens of the model's embedding, but has {len(chars)}: "
    with pytest.raises(InputError, match=message):
        nanogpt_jax.find(folder)
    (tmp_path / "text.txt").write_text("abcab" * 200)
    argv = f"--init_from={folder}", f"--dataset={tmp_path / 'text.txt'}", "--block_size=8"
    with pytest.raises(InputError, match=message):
        train.main([*argv, f"--out_dir={tmp_path / 'run'}", "--config=tiny"])


def test_byte_pairs_are_streamed_as_whole_characters(run):
    tokenizer = BPETokenizer.train(["a cat sat on a mat\n" * 9], 290)
    config = dataclasses.replace(run.config, vocab_size=tokenizer.vocab_size)
    model = steps.make_model(config)
    params = steps.init_params(model, jax.random.key(0))
    loaded = nanogpt_jax.TrainedModel("new", None, config, tokenizer, model, params, None)
    text = nanogpt_jax.generate(loaded, "!", **SHORT)
    assert "!" + "".join(nanogpt_jax.stream(loaded, "!", **SHORT)) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "QZ"}, "'Q', 'Z'"),
        ({"prompt": ""}, "empty"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1"),
        ({"num_samples": 10**9}, "GiB"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(run, settings, message):
    with pytest.raises(InputError, match=message):
        nanogpt_jax.generate(run, **settings)


def test_an_unknown_setting_is_a_type_error(run):
    with pytest.raises(TypeError, match="temprature"):
        nanogpt_jax.generate(run, temprature=1.0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "there is no nowhere/config.json"),
        ("gpt2-midium", "Did you mean gpt2-medium"),
        ("openai-community/gpt2-xl", "Did you mean gpt2-xl"),
        ("llama", r"there is no llama/config\.json\.$"),
        (5000 * "a", "there is no aaa"),
        (Path("gpt2"), "there is no gpt2/config.json"),
        ("no\0file", "there is no"),
    ],
)
def test_what_is_not_a_model_is_refused_in_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        nanogpt_jax.load(source)
    assert "\n" not in str(error.value)


def test_an_unknown_checkpoint_or_dtype_is_refused(run):
    with pytest.raises(InputError, match="checkpoint must be one of best, latest"):
        nanogpt_jax.load(RUN, checkpoint="newest")
    with pytest.raises(InputError, match="dtype must be one of"):
        nanogpt_jax.load(RUN, dtype="int8")
    assert nanogpt_jax.load(RUN, dtype="bfloat16").model.compute.dtype == jax.numpy.bfloat16


def test_a_run_without_checkpoint_or_tokenizer_says_what_to_do(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    loaded = nanogpt_jax.load(tmp_path / "run")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        nanogpt_jax.generate(loaded)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint yet: train it first"):
        nanogpt_jax.load(tmp_path / "run")


def test_finding_a_model_imports_no_jax():
    script = (
        "import sys, nanogpt_jax\n"
        "assert not {name for name in sys.modules if name.startswith('nanogpt_jax.')}\n"
        "source = nanogpt_jax.find(sys.argv[1])\n"
        "assert source.tokenizer.vocab_size == source.config.vocab_size\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(RUN)], check=True)
