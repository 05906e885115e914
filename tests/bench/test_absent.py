"""train.py --compile_for. What needs the TPU's own compiler runs only if it is installed."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from nanogpt_jax.bench import absent
from nanogpt_jax.config import PRESETS, with_vocab_size
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import find_chip, forward_flops_per_token, n_params
from nanogpt_jax.model import Compute

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
HAS_CUDA = any(
    importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")
)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="the tpu extra is not installed")


def figures(result) -> dict[str, str]:
    """The lines printed, by their first words; all is well."""
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^([a-zA-Z ]+[a-z])  +(.+)$", result.stdout, re.MULTILINE)
    return dict(lines) | {"first": result.stdout.splitlines()[0]}


def number(text: str) -> float:
    """The number a figure begins with."""
    return float(text.split()[0].replace(",", ""))


@pytest.fixture
def environment(monkeypatch):
    """Compiling for absent chips changes environment variables; put them back."""
    for name in absent.ENVIRONMENT:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.mark.skipif(HAS_COMPILER, reason="the tpu extra is installed")
def test_without_the_compiler_the_error_says_what_to_install(environment):
    with pytest.raises(InputError, match=r"pip install -e '\.\[tpu\]'"):
        absent.compile_for(PRESETS["tiny"], "v5e:2x2")


@pytest.mark.skipif(HAS_CUDA, reason="NVIDIA's compiler is installed")
def test_without_nvidias_compiler_the_error_says_what_to_install(environment):
    with pytest.raises(InputError, match=r"pip install -e '\.\[cuda13\]'"):
        absent.compile_for(PRESETS["tiny"], "8xrtx4090")
    with pytest.raises(InputError, match=r"pip install -e '\.\[cuda12\]'"):  # CUDA 13 has none
        absent.compile_for(PRESETS["tiny"], "v100")


@pytest.mark.parametrize("target", ["v5e:4", "h100:2x2", "v4:2x2x1", "mi300x", "0xh100", "", "x"])
def test_what_is_no_chip_is_answered_with_examples(target, environment):
    """So is a v4, whose cores the compiler takes apart, and what NVIDIA does not make."""
    words = f"compile_for must be .*like h100 or 8xa100, .*like v5e:4x4 .*, got '{target}'"
    with pytest.raises(InputError, match=words):
        absent.compile_for(PRESETS["tiny"], target)


def test_the_figures_of_a_step_on_devices_that_stand_in_for_tpus(environment, monkeypatch, capsys):
    """The path of --compile_for where no TPU compiler is: on four virtual CPU devices."""
    monkeypatch.setattr(absent, "absent_devices", lambda _: jax.devices())
    monkeypatch.setattr(absent, "find_chip", lambda _: find_chip("TPU v5e"))
    config = dataclasses.replace(PRESETS["tiny"], batch_size=8)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert absent.compile_for(config, "v5e:2x2") == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    lines = capsys.readouterr().out
    assert "tiny on v5e:2x2: 4 x cpu (data 4)" in lines
    assert "GiB of 16 GiB: fits" in lines
    flops = 3 * forward_flops_per_token(with_vocab_size(config).model) * config.tokens_per_iter / 4
    found = re.search(r"FLOPs a step +(\S+) a device", lines)
    assert float(found[1]) == pytest.approx(flops, rel=0.005)
    assert "ms a step" in lines
    assert "bytes accessed" in lines


def test_the_least_bytes_are_weights_per_micro_batch_and_the_optimizer():
    config = with_vocab_size(PRESETS["tiny"])
    n = n_params(config.model)
    one = dataclasses.replace(config, gradient_accumulation_steps=1)
    two = dataclasses.replace(config, gradient_accumulation_steps=2)
    mesh, compute = {"data": 1, "fsdp": 1, "tensor": 1}, Compute(jnp.dtype("float32"))
    assert absent.least_bytes(one, compute, mesh) == 2 * 4 * n + absent.ADAMW_BYTES * n
    assert absent.least_bytes(two, compute, mesh) == 2 * (2 * 4 + 8) * n + absent.ADAMW_BYTES * n
    remat = compute._replace(remat=True)
    assert absent.least_bytes(one, remat, mesh) == 3 * 4 * n + absent.ADAMW_BYTES * n


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v99:2x2", "v5e:3x5"])
def test_a_topology_that_does_not_exist_is_answered_in_one_line(run, topology):
    result = run("train.py", "--config=tiny", f"--compile_for={topology}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"got '{topology}'" in line


@needs_compiler
@pytest.mark.slow
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
@pytest.mark.slow
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
    assert float(tokens_per_s.replace(",", "")) == pytest.approx(expected, rel=5e-3)  # 3 digits


@needs_compiler
@pytest.mark.slow
def test_a_step_that_cannot_fit_is_answered_with_what_needs_less(run):
    shape = "--config=gpt2-xl", "--n_layer=4", "--batch_size=512"
    ways = "--gradient_accumulation_steps=1", "--compile_for=v5e:2x2"
    result = run("train.py", *shape, *ways, timeout=900)
    assert result.returncode == 1
    assert "does not fit" in result.stdout
    assert "--remat" in result.stdout
    assert "Traceback" not in result.stderr


@needs_compiler
@pytest.mark.slow
def test_gpt2_xl_fits_on_256_chips(run):
    """Six of its 48 layers, since all take minutes to compile; each is split over the chips."""
    shape = "--config=gpt2-xl", "--n_layer=6", "--batch_size=512"
    ways = "--gradient_accumulation_steps=1", "--mesh=fsdp=-1", "--remat"
    printed = figures(run("train.py", *shape, *ways, "--compile_for=v5e:16x16", timeout=1500))
    assert "256 x tpu: TPU v5 lite (fsdp 256)" in printed["first"]
    assert "of 16 GiB: fits" in printed["memory a device"]
