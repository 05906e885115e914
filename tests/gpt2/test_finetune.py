"""Train, export, fine-tune and sample, as a user types the commands."""

import json

import pytest

from nanogpt_jax.corpora import load_tokenizer
from nanogpt_jax.run.plots import read_metrics

VERSE = (
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    "First Citizen:\nYou are all resolved rather to die than to famish?\n\n"
)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("finetune")]
SHAPE = ("--config=tiny", "--block_size=16", "--eval_interval=20", "--mesh=data=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder that already has Shakespeare's text."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "data" / "shakespeare_char").mkdir(parents=True)
    (folder / "data" / "shakespeare_char" / "input.txt").write_text(VERSE * 60)
    return folder


@pytest.fixture
def command(run, home):
    """Run a script there; it must succeed."""

    def succeed(*argv):
        result = run(*argv, cwd=home)
        assert result.returncode == 0, result.stderr
        return result

    return succeed


@pytest.fixture
def exported(home, command, run, book):
    """A model of byte pairs, trained on a text of one's own and exported."""
    if not (home / "exported").exists():
        flags = (f"--dataset={book}", "--tokenizer=bpe", "--vocab_size=320", "--out_dir=own")
        command("train.py", *SHAPE, *flags, "--bias", "--activation=gelu_tanh")
        command("-m", "nanogpt_jax", "export", "own", "exported")
    return home / "exported"


def test_a_run_with_its_own_byte_pairs_keeps_them_and_logs_bits_per_byte(home, exported, command):
    tokenizer = load_tokenizer(home / "own")
    assert tokenizer.vocab_size <= 320
    config = json.loads((home / "own" / "config.json").read_text())
    assert (config["vocab_size"], config["tokenizer"]) == (320, "bpe")
    evaluated = [row for row in read_metrics(home / "own") if "val_loss" in row]
    for row in evaluated:
        # a token is more than a byte, so it has more bits than a byte
        assert 0 < row["val_bits_per_byte"] < row["val_loss"] / 0.6931
    assert evaluated[-1]["val_bits_per_byte"] < evaluated[0]["val_bits_per_byte"]
    text = command("sample.py", "--out_dir=own", "--num_samples=1", "--start=🎭 the cat").stdout
    assert text.startswith("🎭 the cat")


def test_an_exported_model_is_finetuned_on_shakespeare_from_the_command_line(
    home, exported, command
):
    before = command(
        "train.py", "--eval_only", "--init_from=exported", "--dataset=shakespeare",
        "--block_size=16", "--mesh=data=1",
    )  # fmt: skip
    assert not (home / "out").exists(), "an evaluation writes nothing"
    assert "exported: val loss" in before.stdout
    argv = (*SHAPE, "--init_from=exported", "--dataset=shakespeare", "--max_iters=40")
    trained = command("train.py", *argv, "--learning_rate=3e-3", "--out_dir=out/fine")
    tokenizers = [load_tokenizer(folder) for folder in (home / "out" / "fine", exported)]
    assert tokenizers[0].to_json() == tokenizers[1].to_json()
    rows = [row for row in read_metrics(home / "out" / "fine") if "val_loss" in row]
    assert f"val loss {rows[0]['val_loss']:.4f}" in before.stdout, (
        "training starts from the weights"
    )
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert "\nval_loss: " in trained.stdout
    text = command("sample.py", "--num_samples=2", "--max_new_tokens=60", "--start=Speak").stdout
    assert text.count("Speak") >= 2
    again = command("train.py", *argv, "--learning_rate=3e-3", "--out_dir=out/fine")
    assert "is complete: 40 steps" in again.stdout


def test_an_exported_model_is_sampled_without_a_run_of_its_own(home, exported, command):
    flags = ("--num_samples=1", "--max_new_tokens=40", "--temperature=0", "--start=the cat")
    of_run = command("sample.py", "--out_dir=own", *flags, "--checkpoint=best").stdout
    of_folder = command("sample.py", "--init_from=exported", *flags).stdout
    assert of_folder == of_run
    streamed = command("sample.py", "--init_from=exported", *flags, "--stream").stdout
    assert streamed == of_folder
