"""What a run costs: what is printed, and against published runs."""

from pathlib import Path

import pytest

from nanogpt_jax import corpora
from nanogpt_jax.bench import cost, published
from nanogpt_jax.config import PRESETS, with_vocab_size
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import (
    find_chip,
    forward_flops_per_token,
    headline_params,
    run_flops,
    train_flops_per_token,
)

README = Path(__file__).parents[2] / "nanogpt_jax" / "README.md"


@pytest.fixture
def page(capsys):
    """A function that runs the command and returns what it prints."""

    def run(*argv) -> str:
        cost.main([*argv])
        return capsys.readouterr().out

    return run


def line(text, beginning):
    return next(row for row in text.splitlines() if row.startswith(beginning))


def test_a_model_without_matrix_products_has_no_flops_to_count(page):
    assert "no FLOPs" in page("--config=lecture-bigram")


def test_a_run_in_float32_is_marked_since_its_peaks_are_lower(page):
    for argv in ("--config=lecture-scaled",), ("--config=shakespeare", "--dtype=float32"):
        assert "multiplies in float32" in page(*argv)
    assert "multiplies in float32" not in page("--config=shakespeare")


def test_the_table_of_chips_is_arithmetic(page):
    """Hours from FLOPs and peak, kilowatt hours and dollars from hours."""
    rows = page("--config", "gpt2", "--mfu", "0.5")
    config = with_vocab_size(PRESETS["gpt2"])
    total = sum(run_flops(config, 2**62))
    h100 = find_chip("H100")
    hours = total / (0.5 * h100.flops) / 3600
    name, peak, days, unit, kwh, dollars = line(rows, "H100").split()
    assert (name, peak, unit) == ("H100", "989.4", "days")
    assert float(days) == pytest.approx(hours / 24, rel=0.06)
    assert float(kwh) == pytest.approx(hours * 0.7, rel=0.06)
    assert float(dollars) == pytest.approx(hours * h100.dollars_per_hour, rel=0.06)
    assert line(rows, "TPU v5e").split()[-2] == "-"  # its power is not published


def test_a_chip_too_small_is_marked(page):
    rows = page("--config=gpt2-xl")
    assert "does not fit" in line(rows, "T4")
    assert "does not fit" not in line(rows, "H200")


def test_evaluation_is_listed_apart_and_reads_the_datasets_split(page, tmp_path, book, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def evaluations(*argv):
        return line(page("--config=small", *argv), "its evaluations")

    assert "tiny Shakespeare's 111,540" in evaluations()
    assert "since book.txt is not prepared here" in evaluations("--dataset=book.txt")
    corpora.prepare(corpora.Request(str(book), tmp_path / "data"))
    assert "600 tokens" in evaluations("--dataset=book.txt")
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "val.bin").write_bytes(bytes(2 * 4321))
    assert "4,321 tokens" in evaluations("--dataset=bins")


def test_six_n_is_next_to_the_count(page):
    text = line(page("--config=shakespeare"), "a token of training")
    n = 10_646_784
    counted = train_flops_per_token(with_vocab_size(PRESETS["shakespeare"]).model)
    assert f"{counted:,} FLOPs" in text
    assert f"6 N = {6 * n:,}" in text
    assert f"{6 * n / counted - 1:+.1%}" in text


def test_every_preset_has_its_page():
    for name, preset in PRESETS.items():
        config = cost.CostConfig(**vars(with_vocab_size(preset)))
        text = str(cost.cost_lines(config))
        assert all(chip in text for chip in cost.TABLE) or name == "lecture-bigram"


@pytest.mark.parametrize("mfu", ["0", "1.5", "nan", "-1"])
def test_an_impossible_mfu_is_refused(mfu):
    with pytest.raises(InputError, match=r"^mfu must be "):
        cost.main([f"--mfu={mfu}"])


def test_references_are_computed_from_their_configurations(page):
    rows = page("--reference")
    total, rule, counted, ratio = line(rows, "GPT-3 175B").split()[5:9]
    assert (total, ratio) == ("3.14e23", "1.03")
    assert float(rule) == pytest.approx(6 * 175e9 * 300e9, rel=0.01)
    assert float(counted) == pytest.approx(3.23e23, rel=0.005)  # attention's products on top
    for name, flops in ("GPT-1", 8.6e19), ("GPT-2 1.5B", 1.5e21), ("GPT-4", 2.1e25):
        assert float(line(rows, name).split(")")[1].split()[2]) == pytest.approx(flops, rel=0.05)
    assert line(rows, "a day of an RTX 3070 Ti").split()[9] == "1.88e18"
    assert line(rows, "GPT-1").split()[3] == "~1e11"  # OpenAI: 100 epochs of about 1e9 words
    gpt3 = next(run for run in published.RUNS if run.name.startswith("GPT-3 175B"))
    assert headline_params(gpt3.model) == pytest.approx(174.6e9, rel=0.001)


def test_the_lectures_quarter_of_an_hour_is_put_into_proportion():
    text = " ".join(README.read_text("utf-8").split())
    config = with_vocab_size(PRESETS["lecture-scaled"])
    train = 5000 * 64 * 256 * train_flops_per_token(config.model)
    evaluate = 11 * 400 * 64 * 256 * forward_flops_per_token(config.model)
    total, tf32, float32 = train + evaluate, 900 * 156e12, 900 * 19.5e12
    assert f"needs {total:.1e} FLOPs".replace("+", "") in text
    assert f"{total / tf32:.0%}".replace("%", " %") + f" of the {tf32:.1e}".replace("+", "") in text
    assert (
        f"{total / float32:.0%}".replace("%", " %") + " of what it can do in plain float32" in text
    )
