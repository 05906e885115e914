"""train.py --compile_for, with the TPU's own compiler. Most of it runs only where that is."""

import importlib.util
import re

import pytest

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="the tpu extra is not installed")


def figures(result) -> dict[str, str]:
    """The lines printed, by their first words; all is well."""
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^([a-zA-Z ]+[a-z])  +(.+)$", result.stdout, re.MULTILINE)
    return dict(lines) | {"first": result.stdout.splitlines()[0]}


def number(text: str) -> float:
    """The number a figure begins with."""
    return float(text.split()[0].replace(",", ""))


@pytest.mark.skipif(HAS_COMPILER, reason="the tpu extra is installed")
def test_without_the_compiler_the_error_says_what_to_install(run):
    result = run("train.py", "--config=tiny", "--compile_for=v5e:2x2")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "pip install -e '.[tpu]'" in line
    assert not result.stdout


@pytest.mark.parametrize("topology", ["v5e:4", "h100:2x2"])
def test_what_is_no_topology_is_answered_with_an_example(run, topology):
    result = run("train.py", "--config=tiny", f"--compile_for={topology}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "compile_for must look like v5e:4x4" in line


def test_v4_is_refused_since_the_compiler_takes_its_cores_apart(run):
    result = run("train.py", "--config=tiny", "--compile_for=v4:2x2x1")
    assert result.returncode == 2
    assert result.stderr.startswith("error: compile_for: v4 cannot be compiled for")


@needs_compiler
@pytest.mark.parametrize("topology", ["v99:2x2", "v5e:3x5"])
def test_a_topology_that_does_not_exist_is_answered_in_one_line(run, topology):
    result = run("train.py", "--config=tiny", f"--compile_for={topology}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"knows no '{topology}'" in line


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e:2x2", "4 x tpu: TPU v5 lite (data 4)"),
        ("v5p:2x2x1", "4 x tpu: TPU v5 (data 4)"),
        ("v5e:1x1", "tpu: TPU v5 lite"),
    ],
)
def test_a_small_model_fits_and_leaves_nothing_behind(run, tmp_path, topology, words):
    printed = figures(run("train.py", "--config=tiny", f"--compile_for={topology}"))
    assert words in printed["first"]
    assert "bfloat16" in printed["first"]
    assert printed["memory a device"].endswith("fits")
    assert printed.keys() >= {"compiled in", "FLOPs a step", "bytes at least", "roofline"}
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_chips_that_do_not_divide_the_batch_stay_idle(run):
    """Three of four chips are no rectangle, which JAX's own make_mesh asks for."""
    printed = figures(run("train.py", "--config=tiny", "--batch_size=6", "--compile_for=v5e:2x2"))
    assert "3 x tpu: TPU v5 lite (data 3)" in printed["first"]


@needs_compiler
@pytest.mark.slow
def test_remat_takes_less_memory(run):
    shape = "--config=gpt2", "--n_layer=3", "--vocab_size=512", "--compile_for=v5e:1x1"
    plain, remat = (
        number(figures(run("train.py", *shape, *more))["memory a device"])
        for more in ([], ["--remat"])
    )
    assert remat < 0.8 * plain


@needs_compiler
@pytest.mark.slow
def test_shakespeare_on_four_chips(run):
    printed = figures(run("train.py", "--config=shakespeare", "--compile_for=v5e:2x2", timeout=900))
    assert "attention by xla (splash needs a dropout of 0" in printed["first"]
    assert "of 16 GiB: fits" in printed["memory a device"]
    assert number(printed["memory a device"]) < 2


@needs_compiler
@pytest.mark.slow
def test_gpt2_on_sixteen_chips(run):
    printed = figures(run("train.py", "--config=gpt2", "--compile_for=v5e:4x4", timeout=900))
    assert "16 x tpu: TPU v5 lite (data 16)" in printed["first"]
    assert "attention by splash" in printed["first"]
    assert "of 16 GiB: fits" in printed["memory a device"]
    forward = 12 * (24 * 768**2 + 4 * 1024 * 768) + 2 * 768 * 50304  # FLOPs a token
    tokens = 480 * 1024
    assert number(printed["FLOPs a step"]) == pytest.approx(3 * forward * tokens / 16, rel=5e-3)
    step_ms, tokens_per_s = re.search(
        r"([\d.]+) ms a step, ([\d,]+) t", printed["roofline"]
    ).groups()
    expected = 1000 * tokens / float(step_ms)
    assert float(tokens_per_s.replace(",", "")) == pytest.approx(expected, rel=1e-3)


@needs_compiler
@pytest.mark.slow
def test_what_cannot_fit_is_said_with_what_would_need_less(run):
    shape = "--config=gpt2-xl", "--batch_size=4", "--gradient_accumulation_steps=1"
    result = run("train.py", *shape, "--compile_for=v5e:2x2", timeout=900)
    assert result.returncode == 1
    assert "does not fit" in result.stdout
    assert "--remat" in result.stdout
    assert "Traceback" not in result.stderr


@needs_compiler
@pytest.mark.slow
def test_gpt2_xl_fits_on_256_chips(run):
    shape = "--config=gpt2-xl", "--batch_size=512", "--gradient_accumulation_steps=1"
    ways = "--mesh=fsdp=-1", "--remat", "--compile_for=v5e:16x16"
    printed = figures(run("train.py", *shape, *ways, timeout=1500))
    assert "256 x tpu: TPU v5 lite (fsdp 256)" in printed["first"]
    assert "of 16 GiB: fits" in printed["memory a device"]
