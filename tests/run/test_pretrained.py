"""Runs that start from the weights of another run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import content, copied, saved_steps, state_of, train

import nanogpt_jax
from nanogpt_jax.bench import cost, shardings
from nanogpt_jax.config import ModelConfig, TrainConfig
from nanogpt_jax.corpora import CharTokenizer, load_tokenizer
from nanogpt_jax.errors import InputError
from nanogpt_jax.run import read_metrics
from nanogpt_jax.run.pretrained import adopt_shape

RUN = Path(__file__).parent.parent / "fixtures" / "run_v1" / "run"  # the best is step 120 of 140
NEW = "nana came home at ten.\nthat hot hen has not eaten a nest\n" * 30  # in its characters
SHAPE = ["--config=tiny", "--block_size=16", "--mesh=data=1", "--dataset=new.txt"]
SHORT = [*SHAPE, "--max_iters=4", "--eval_interval=2", "--init_from=mine", "--out_dir=tuned"]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Train on a new text, from a copy of the run."""
    monkeypatch.chdir(tmp_path)
    copied(RUN, Path("mine"))
    Path("new.txt").write_text(NEW)
    return lambda *more: train.main([*SHORT, *more])


def config_of(folder: str) -> dict:
    return json.loads(Path(folder, "config.json").read_text())


def params_of(folder: str, step: int | None = None) -> dict:
    return state_of(Path(folder), step).params


def test_a_run_is_finetuned_on_a_new_text(start, capsys):
    """It starts with the best checkpoint, keeps the characters, and notes what it came from."""
    before = content(Path("mine"))
    assert train.main([*SHAPE, "--eval_only", "--init_from=mine"]) == 0
    printed = capsys.readouterr().out
    assert start() == 0
    first, *_, last = [row["val_loss"] for row in read_metrics(Path("tuned")) if "val_loss" in row]
    assert f"mine: val loss {first:.4f}" in printed
    assert last < first
    assert load_tokenizer(Path("tuned")) == load_tokenizer(RUN)
    config = config_of("tuned")
    assert config["init_from"] == "mine"
    origin = config["made_with"]["init_from"]
    assert origin["step"] == 120, "the best, and not the newest"
    assert re.fullmatch("[0-9a-f]{8}", origin["checksum"])
    assert content(Path("mine")) == before
    assert nanogpt_jax.load("tuned").config == nanogpt_jax.load("mine").config


def test_the_weights_are_those_of_the_best_checkpoint(start):
    assert start("--learning_rate=1e-12", "--min_lr=0", "--weight_decay=0") == 0
    jax.tree.map(
        lambda old, new: np.testing.assert_allclose(old, new, atol=1e-9),
        params_of("mine", 120), params_of("tuned"),
    )  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_keeps_its_origin_though_the_first_run_went_on(start):
    assert start() == 0
    origin = config_of("tuned")["made_with"]["init_from"]
    shutil.rmtree("mine/checkpoints/120")
    assert start("--max_iters=6", "--lr_decay_iters=4") == 0
    assert saved_steps(Path("tuned"))[-1] == 6
    assert config_of("tuned")["made_with"]["init_from"] == origin
    assert start("--overwrite") == 0
    again = config_of("tuned")["made_with"]["init_from"]
    assert again["step"] == 140
    assert again["checksum"] != origin["checksum"]


@pytest.mark.slow
def test_a_chain_of_runs(start):
    assert start() == 0
    assert start("--init_from=tuned", "--out_dir=again") == 0
    assert config_of("again")["made_with"]["init_from"]["step"] in saved_steps(Path("tuned"))


def test_unknown_characters_of_a_new_text_are_all_listed(start):
    """Also those that only its end has."""
    Path("new.txt").write_text(NEW * 20 + "é" + NEW * 20 + "!?")
    with pytest.raises(InputError, match=r"new\.txt: .* only its 12 .* '!', '\?', 'é', or"):
        start()
    assert sorted(path.name for path in Path().iterdir()) == ["mine", "new.txt"]


def test_a_dataset_of_other_tokens_is_refused(start):
    Path("new.txt").write_text(NEW.replace("t", "x"))
    with pytest.raises(InputError, match="the tokens that the weights of mine know, but has other"):
        start("--tokenizer=char")


@pytest.mark.slow
def test_token_files_without_a_tokenizer_stay_as_they_are(start, capsys):
    """They should be those of the weights; nothing is written beside them."""
    ids = load_tokenizer(RUN).encode(NEW).astype("<u2")
    Path("bins").mkdir()
    for split in ("train", "val"):
        ids.tofile(f"bins/{split}.bin")
    before = content(Path("bins"))
    assert start("--dataset=bins") == 0
    assert "bins has no tokenizer; its tokens should be those of mine" in capsys.readouterr().out
    assert content(Path("bins")) == before
    assert load_tokenizer(Path("tuned")) == load_tokenizer(RUN)
    (ids + 5).tofile("bins/train.bin")
    with pytest.raises(InputError, match=r"train\.bin"):
        start("--dataset=bins", "--out_dir=other")


def test_a_resumed_run_needs_its_source_no_more(start):
    """Which may be moved, or named in other words."""
    assert start() == 0
    longer = "--max_iters=6", "--lr_decay_iters=4"
    origin = config_of("tuned")["made_with"]["init_from"]
    assert start(*longer, "--init_from=./mine/") == 0
    assert config_of("tuned")["made_with"]["init_from"] == origin
    Path("mine").rename("moved")
    assert start(*longer, "--max_iters=8") == 0
    assert saved_steps(Path("tuned"))[-1] == 8
    assert train.main(["--config=tuned/config.json", "--eval_only"]) == 0
    with pytest.raises(InputError, match="init_from 'mine' -> 'moved'"):
        start("--init_from=moved")


@pytest.mark.slow
def test_evaluating_a_start_is_not_evaluating_the_run_that_came_of_it(start, capsys):
    command = [*SHAPE, "--init_from=mine", "--eval_only"]
    assert train.main(command) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    assert first.startswith("mine: val loss ")
    assert train.main([*SHAPE, "--init_from=mine", "--max_iters=4", "--eval_interval=2"]) == 0
    (tuned,) = Path("out").iterdir()
    capsys.readouterr()
    assert train.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first
    assert train.main([*command, "--max_iters=4", f"--out_dir={tuned}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{tuned}, step 4: val loss ")
    with pytest.raises(InputError, match="Undo these to evaluate it"):
        train.main([*command, f"--out_dir={tuned}", "--seed=3"])


def test_a_model_of_the_lecture_is_not_padded(start):
    """It would predict tokens that do not exist: nothing masks them."""
    argv = [*SHAPE, "--config=lecture-bigram", "--max_iters=2", "--out_dir=bigram"]
    with pytest.raises(InputError, match=r"vocab_size must be 12, .* got 64: leave it out"):
        train.main([*argv, "--vocab_size=64"])


def test_other_commands_know_the_shape_of_the_weights(start, capsys):
    cost.main(["--init_from=mine", "--block_size=16"])
    assert re.search(r"token embedding +48 ", capsys.readouterr().out)  # 12 x 4
    shardings.main(["--init_from=mine", "--block_size=16"])
    assert re.search(r"wte.embedding +\(12, 4\)", capsys.readouterr().out)


@pytest.mark.parametrize("inner", ["mine/config.json", "mine/checkpoints", "mine/checkpoints/120"])
def test_what_is_inside_of_a_run_is_not_the_run(start, inner):
    with pytest.raises(InputError, match=r"Did you mean mine\?$"):
        start(f"--init_from={inner}")


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_run_does_not_replace_the_one_it_starts_from(start, more):
    before = content(Path("mine"))
    Path("link").symlink_to("mine")
    for out_dir in ("mine", "mine/", "link"):
        with pytest.raises(InputError, match="out_dir must not be the run that init_from names"):
            start(f"--out_dir={out_dir}", *more)
    assert content(Path("mine")) == before


def test_a_run_without_a_checkpoint_is_refused_before_anything_is_written(start):
    shutil.rmtree("mine/checkpoints")
    with pytest.raises(InputError, match="mine has no checkpoint yet: train it first"):
        start()
    assert not Path("tuned/config.json").exists()


def test_a_damaged_best_checkpoint_is_left_alone_and_the_newest_taken(start, capsys):
    for path in Path("mine/checkpoints/120").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    assert start() == 0
    assert "using step 140 instead" in capsys.readouterr().err
    assert config_of("tuned")["made_with"]["init_from"]["step"] == 140
    assert Path("mine/checkpoints/120").exists()


@pytest.mark.slow
def test_a_shorter_context_and_a_padded_vocabulary(start):
    """The first positions are kept; tokens that do not exist stay zero."""
    fitting = "--block_size=8", "--vocab_size=64", "--learning_rate=1e-12", "--min_lr=0"
    assert start(*fitting, "--weight_decay=0") == 0
    old, new = params_of("mine", 120), params_of("tuned")
    assert new["wpe"]["embedding"].shape[0] == 8
    assert new["wte"]["embedding"].shape[0] == 64
    np.testing.assert_allclose(new["wpe"]["embedding"], old["wpe"]["embedding"][:8], atol=1e-9)
    np.testing.assert_allclose(new["wte"]["embedding"][:12], old["wte"]["embedding"], atol=1e-9)
    assert not new["wte"]["embedding"][12:].any()
    assert (config_of("tuned")["vocab_size"], config_of("tuned")["known_tokens"]) == (64, 12)
    text = nanogpt_jax.generate(nanogpt_jax.load("tuned"), "the", max_new_tokens=50, top_k=0)
    assert set(text) <= set(load_tokenizer(RUN).chars)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small-fast", "lecture-layernorm"])
def test_a_modern_model_and_one_of_the_lecture(start, preset):
    """`export` takes neither, so this is how they are finetuned."""
    shape = ["--n_embd=16", "--n_head=2", "--n_layer=1", "--batch_size=8"]
    shape += [f"--config={preset}", "--token_noise=0.1"]
    first = *SHAPE, *shape, "--block_size=16", "--max_iters=4", "--eval_interval=4"
    assert train.main([*first, f"--out_dir={preset}"]) == 0
    assert start(f"--init_from={preset}", f"--out_dir={preset}-tuned") == 0
    best = nanogpt_jax.load(preset)
    assert config_of(f"{preset}-tuned")["made_with"]["init_from"]["step"] == best.step
    loaded = nanogpt_jax.load(f"{preset}-tuned")
    assert loaded.config.token_noise == 0  # of training, so as requested now
    kept = {"dropout": best.config.dropout, "token_noise": 0.1}
    assert replace(loaded.config, **kept) == best.config


def test_rotary_positions_have_no_longest_context():
    def adopt(**fields):
        theirs = ModelConfig(block_size=16, vocab_size=12, n_embd=12, n_head=2, **fields)
        source = nanogpt_jax.Source("mine", Path("mine"), theirs, CharTokenizer("abc"))
        config = TrainConfig(model=ModelConfig(block_size=32), init_from="mine")
        return adopt_shape(config, source).model.block_size

    assert adopt(positions="rotary") == 32
    with pytest.raises(InputError, match="block_size must be at most 16 with the weights of mine"):
        adopt()


@pytest.mark.slow
def test_four_devices_start_like_one(start):
    same = "--learning_rate=1e-12", "--min_lr=0", "--weight_decay=0", "--vocab_size=16"
    assert start(*same) == 0
    for mesh in ("data=2,tensor=2", "data=1,fsdp=4"):
        assert start(*same, f"--mesh={mesh}", f"--out_dir={mesh}") == 0
        jax.tree.map(np.testing.assert_array_equal, params_of(mesh, 2), params_of("tuned", 2))
        assert (
            config_of(mesh)["made_with"]["init_from"]
            == config_of("tuned")["made_with"]["init_from"]
        )
