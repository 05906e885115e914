"""GPU programs: read from a text, and from NVIDIA's compiler, which needs no GPU, if installed."""

import importlib.util
import re

import jax
import pytest

from nanogpt_jax.bench import program

HAS_CUDA = any(
    importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin")
)
needs_compiler = pytest.mark.skipif(not HAS_CUDA, reason="NVIDIA's compiler is not installed")
needs_text = pytest.mark.skipif(
    not HAS_CUDA or jax.__version_info__ < (0, 10), reason="this JAX shows no GPU program"
)
TEXT = """
%fused (a: bf16[6,4], b: bf16[4,5]) -> f32[6,5] {
  %a = bf16[6,4]{1,0} parameter(0)
  %b = bf16[4,5]{1,0} parameter(1)
  ROOT %dot.1 = f32[6,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/head/dot_general"}
}
%body (p: f32[3,6,4]) -> f32[3,6,5] {
  %p = f32[3,6,4]{2,1,0} parameter(0)
  %w = f32[3,4,5]{2,1,0} parameter(1)
  %call.2 = (f32[3,6,5]{2,1,0}, s8[1024]{0}) custom-call(%p, %w), custom_call_target="__cublas$lt$matmul", backend_config={"dot_dimension_numbers":{"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}
  %fwd = (bf16[2,2]{1,0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"
  %bwd = (bf16[2,2]{1,0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %known = (s32[]) while(%p), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"8"}}
  WAITS
}
"""  # noqa: E501
ALL_WAITS = """%unknown = (s32[]) while(%p), condition=%c, body=%b
  %branch = f32[2]{0} conditional(%i, %p, %p), branch_computations={%x, %y}
  %out = token[] outfeed(%p)"""


def test_products_have_their_types_and_flops():
    assert [*program.products(TEXT)] == [
        ("bf16 x bf16 -> f32", 2 * 6 * 4 * 5),
        ("f32 x f32 -> f32", 3 * 2 * 6 * 4 * 5),
    ]
    assert program.product_lines(TEXT) == [
        "f32 x f32 -> f32: 75.0% in 1",
        "bf16 x bf16 -> f32: 25.0% in 1",
    ]


def test_fused_attention_is_counted():
    assert program.fused_attention_calls(TEXT) == (1, 1)


def test_what_waits_for_the_host_is_named():
    assert program.waits(TEXT) == []
    found = program.waits(TEXT.replace("WAITS", ALL_WAITS))
    assert found == ["1 x a loop of unknown length", "1 x a branch", "1 x a transfer"]


def report(run, preset, target, *flags):
    """Return what --compile_for prints of the training step and of sampling, as lines of each."""
    result = run("train.py", f"--config={preset}", f"--compile_for={target}", *flags, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return [part.splitlines() for part in result.stdout.split("\nsampling, ")]


# nanoGPT's batch of gpt2 does not fit on a T4, which has no fused attention.
FLAGS = {("gpt2", "t4"): ["--batch_size=4", "--gradient_accumulation_steps=120"]}


@needs_text
@pytest.mark.slow
@pytest.mark.parametrize("target", ["t4", "h100"])
@pytest.mark.parametrize("preset", ["small", "shakespeare", "shakespeare-fast", "gpt2"])
def test_the_presets_fit_multiply_in_16_bits_and_wait_for_nothing(run, preset, target):
    training, sampling = report(run, preset, target, *FLAGS.get((preset, target), []))
    kind = {"t4": "f16", "h100": "bf16"}[target]
    assert any(line.startswith("memory") and line.endswith("fits") for line in training)
    types = {types for line in training for types in re.findall(r"(\w+ x \w+) ->", line)}
    # Muon makes matrices orthogonal in float32, for digits that 16 bits do not have.
    allowed = {"f32 x f32"} if preset == "shakespeare-fast" else set()
    assert f"{kind} x {kind}" in types
    assert types - {f"{kind} x {kind}"} <= allowed
    for lines in training, sampling:
        assert "waits for the host none" in lines
    n_layer = {"small": 4, "gpt2": 12}.get(preset, 0) if target == "h100" else 0
    assert f"fused attention    {n_layer} calls forward, {n_layer} backward" in training


@needs_text
@pytest.mark.slow
def test_several_gpus_of_a_host_share_the_batch(run):
    training, _ = report(run, "tiny", "4xa100")
    assert "tiny on 4xa100: 4 x gpu: A100 40GB (data 4): bfloat16" in training[0]


@needs_text
@pytest.mark.slow
def test_what_does_not_fit_has_exit_code_1_and_advice(run):
    result = run("train.py", "--config=gpt2", "--n_layer=3", "--compile_for=rtx4060",
                 "--batch_size=64", timeout=900)  # fmt: skip
    assert result.returncode == 1
    assert "does not fit" in result.stdout
    assert "try a smaller --batch_size" in result.stdout


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "shakespeare"])
def test_what_colab_has_compiles_for_a_t4(run, preset):
    """Its jax 0.7 shows no program."""
    result = run("train.py", f"--config={preset}", "--compile_for=t4", timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "float16" in result.stdout
    assert "GiB: fits" in result.stdout
