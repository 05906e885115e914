"""Dtype and attention kernel, chosen for devices that are not here; warnings of unused chips."""

import logging
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nanogpt_jax import sharding
from nanogpt_jax.config import (
    PRESETS,
    ComputeConfig,
    ModelConfig,
    TrainConfig,
    with_vocab_size,
)
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.hardware import devices, memory
from nanogpt_jax.hardware.devices import (
    choose_compute,
    choose_training,
    describe,
    memory_levers,
)
from nanogpt_jax.model import Compute


def gpu(device_kind, compute_capability):
    return SimpleNamespace(
        platform="gpu", device_kind=device_kind, compute_capability=compute_capability
    )


def tpu(device_kind):
    return SimpleNamespace(platform="tpu", device_kind=device_kind)


def model(head_size=64, **fields):
    """GPT-2's shape, but for these fields."""
    return ModelConfig(vocab_size=50304, n_embd=12 * head_size, **fields)


P100, V100 = gpu("Tesla P100-PCIE-16GB", "6.0"), gpu("Tesla V100-SXM2-16GB", "7.0")
T4 = gpu("Tesla T4", "7.5")
A100 = gpu("NVIDIA A100-SXM4-40GB", "8.0")
L4 = gpu("NVIDIA L4", "8.9")
H100 = gpu("NVIDIA H100 80GB HBM3", "9.0")
H200 = gpu("NVIDIA H200", "9.0")
MI300X = gpu("AMD Instinct MI300X", "gfx942")
V5E = tpu("TPU v5 lite")
GPT2 = model()


CPU = SimpleNamespace(platform="cpu", device_kind="cpu", memory_stats=lambda: None)


def chosen(device, model=GPT2, **requested):
    """Return (dtype, kernel, reason) for a device."""
    compute, reason = choose_compute(ComputeConfig(**requested), model, device)
    return compute.dtype.name, compute.attention, reason


def test_the_defaults_of_each_device():
    """NVIDIA from Ampere on and TPUs compute in bfloat16, with a kernel of their own; the two
    generations before have units for float16."""
    expected = {
        ("bfloat16", "cudnn"): [A100, L4, H100, H200],
        ("bfloat16", "splash"): map(tpu, ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"]),
        ("float16", "xla"): [V100, T4],
        ("float32", "xla"): [P100, MI300X, CPU],
    }
    for way, devices_of_it in expected.items():
        for device in devices_of_it:
            assert chosen(device)[:2] == way, device
    assert "7.5" in chosen(T4)[2]
    assert "the loss is scaled" in chosen(T4)[2]


def test_a_kernel_that_does_not_fit_is_left_out_and_the_reason_says_why():
    for device, shape, requested, because in [
        (A100, model(dropout=0.1), {}, "dropout"),
        (A100, model(head_size=60), {}, "60"),
        (A100, model(head_size=136), {}, "136"),
        (H100, model(head_size=264), {}, "264"),
        (H100, GPT2, {"dtype": "float32"}, "float32"),
        (H100, model(attention_window=64), {}, "attention_window of 0, but it is 64"),
        (V5E, model(dropout=0.1), {}, "dropout"),
        (V5E, model(block_size=250), {}, "250"),
        (V5E, GPT2, {"dtype": "float16"}, "float16"),
        (tpu("TPU v2"), GPT2, {}, "v4"),
        (tpu("TPU v3"), GPT2, {}, "v4"),
    ]:
        _, attention, reason = chosen(device, shape, **requested)
        assert attention == "xla"
        assert because in reason.partition(";")[2]


def test_sums_in_a_fixed_order_do_without_cudnn(monkeypatch):
    """XLA cannot run cuDNN's backward pass so: IndexError, raw_hash_map, seen on an H100."""
    for flags, kernel in [
        ("--xla_gpu_deterministic_ops=true", "xla"),
        ("--xla_dump_to=x --xla_gpu_exclude_nondeterministic_ops", "xla"),
        ("--xla_gpu_deterministic_ops=false", "cudnn"),
        ("--xla_gpu_deterministic_ops --xla_gpu_deterministic_ops=false", "cudnn"),
    ]:
        monkeypatch.setenv("XLA_FLAGS", flags)
        assert chosen(H100)[1] == kernel
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops")
    with pytest.raises(InputError, match="XLA_FLAGS without --xla_gpu_deterministic_ops"):
        chosen(H100, attention="cudnn")


def test_a_large_head_fits_from_hopper_on():
    for head_size in 136, 256:
        assert chosen(H100, model(head_size=head_size))[1] == "cudnn"


def test_a_kernel_requested_by_name_that_cannot_be_used_is_refused():
    for device, requested, lacking in [
        (T4, {"attention": "cudnn", "dtype": "float16"}, "capability 8.0, but this is 7.5"),
        (MI300X, {"attention": "cudnn", "dtype": "bfloat16"}, "not an NVIDIA GPU"),
        (CPU, {"attention": "cudnn"}, "a GPU, but this is a cpu"),
        (A100, {"attention": "cudnn", "dtype": "float32"}, "16-bit dtype, but this is float32"),
        (V5E, {"attention": "cudnn"}, "a GPU, but this is a tpu"),
        (A100, {"attention": "splash"}, "a TPU, but this is a gpu"),
        (V5E, {"attention": "splash", "dtype": "float16"}, "but this is float16"),
        (tpu("TPU v3"), {"attention": "splash"}, "TPU v4 or newer"),
    ]:
        with pytest.raises(InputError, match=f"{lacking}.*--attention auto"):
            chosen(device, **requested)


def test_what_is_requested_by_name_and_possible_is_used():
    for device, requested, expected in [
        (T4, {"dtype": "float32"}, ("float32", "xla")),
        (CPU, {"dtype": "bfloat16"}, ("bfloat16", "xla")),
        (MI300X, {"dtype": "bfloat16"}, ("bfloat16", "xla")),
        (A100, {"attention": "cudnn", "dtype": "float16"}, ("float16", "cudnn")),
        (A100, {"attention": "xla"}, ("bfloat16", "xla")),
        (V5E, {"attention": "splash", "dtype": "float32"}, ("float32", "splash")),
        (V5E, {"attention": "xla", "dtype": "float32"}, ("float32", "xla")),
        (H200, {"dtype": "float32"}, ("float32", "xla")),
    ]:
        *way, reason = chosen(device, **requested)
        assert tuple(way) == expected
        assert "as requested" in reason


def test_the_rest_of_the_request_is_passed_on():
    mesh = sharding.make_mesh((4, 1, 1))
    compute, _ = choose_compute(ComputeConfig(remat=True, loss_chunks=8), GPT2, CPU, mesh)
    assert (compute.remat, compute.loss_chunks, compute.mesh) == (True, 8, mesh)


def test_the_loss_is_computed_in_as_few_pieces_as_fit_the_memory():
    """By estimate, with a tenth to spare: of gpt2 in batches of 16, all logits take 6.6 GB."""
    gpt2, mesh = PRESETS["gpt2"], sharding.make_mesh()
    few, mid = (choose_training(gpt2, A100, mesh, gib * 2**30)[0] for gib in (40, 12))
    assert (few.loss_chunks, mid.loss_chunks) == (1, 2)
    compute, reason = choose_training(gpt2, A100, mesh, 8.5 * 2**30)
    assert compute.loss_chunks == 8
    assert "the loss in 8 pieces, to save memory" in reason
    requested = replace(gpt2, compute=ComputeConfig(loss_chunks=2))
    for limit in 40 * 2**30, None:
        assert choose_training(requested, A100, mesh, limit)[0].loss_chunks == 2
    assert choose_training(gpt2, A100, mesh, None)[0].loss_chunks == 1  # unknown
    four = sharding.make_mesh((4, 1, 1))
    assert choose_training(gpt2, A100, four, 8 * 2**30)[0].loss_chunks == 1
    odd = replace(gpt2, model=replace(gpt2.model, block_size=1022))
    assert choose_training(odd, A100, mesh, 1)[0].loss_chunks == 2  # 4 does not divide it


def test_only_what_can_help_is_advised_against_too_little_memory():
    """Not what is done already, or what a step of the lecture does not have."""
    levers = memory_levers(TrainConfig(), Compute())
    for word in "--batch_size", "--gradient_accum", "--remat", "--loss_chunks", "--dtype bfloat16":
        assert word in levers
    compute = Compute(jnp.dtype("bfloat16"), remat=True, loss_chunks=8)
    assert memory_levers(TrainConfig(batch_size=1), compute) == "try a smaller model"
    lecture = ModelConfig(architecture="bigram", bias=True, n_layer=1, n_head=1)
    assert "--remat" not in memory_levers(TrainConfig(model=lecture), Compute())


def test_idle_devices_and_a_step_that_does_not_fit_are_reported(monkeypatch):
    requested = []
    monkeypatch.setattr(devices, "use_compile_cache", lambda *args: requested.append(args))
    config = with_vocab_size(replace(PRESETS["tiny"], batch_size=6))
    machine = devices.choose(config)
    assert requested == [("", 1)]
    assert machine.device == "3 x cpu (data 3)"
    assert "1 of 4 devices are idle: they do not divide --batch_size" in machine.description
    assert machine.description.startswith(f"jax {jax.__version__} on 3 x cpu (data 3): float32")
    sizes = SimpleNamespace(
        argument_size_in_bytes=2**30, output_size_in_bytes=0, temp_size_in_bytes=0,
        alias_size_in_bytes=0, peak_memory_in_bytes=0,
    )  # fmt: skip
    step = SimpleNamespace(memory_analysis=lambda: sizes)
    fitting = machine._replace(memory_bytes=2**30).check_fits(step, config)
    assert fitting == "a step needs 1,024 of 1,024 MiB on each device"
    with pytest.raises(RunError, match="1,024 of 512 MiB on each device: try a smaller --batch"):
        machine._replace(memory_bytes=2**29).check_fits(step, config)


@pytest.mark.parametrize(
    ("version", "group", "limits", "expected"),
    [
        ("0::", "/", {"memory.max": "1500"}, 1500),  # as Docker shows it inside
        ("0::", "/job/step", {"job/memory.max": "1700", "job/step/memory.max": "max"}, 1700),
        ("4:memory:", "/docker/12", {"memory/memory.limit_in_bytes": "1600"}, 1600),
        ("4:memory:", "/job", {"memory/job/memory.limit_in_bytes": "1800"}, 1800),
        ("0::", "/job:1", {"memory.max": "max", "another/memory.max": "9"}, None),
    ],
)
def test_the_memory_of_a_container_is_what_it_may_use(
    tmp_path, monkeypatch, version, group, limits, expected
):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUP_FILES", tmp_path / "fs")
    unlimited = memory.memory_bytes(CPU)
    (tmp_path / "cgroup").write_text(f"3:cpu:/\n{version}{group}\n")
    for name, limit in limits.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    assert memory.memory_bytes(CPU) == (expected or unlimited)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 2000))  # by ulimit -v 1
    assert memory.memory_bytes(CPU) == 1000


# As JAX words it, after it looked for /dev/nvidia0 and the like, and for a TPU's PCI number.
GPU_UNUSED = (
    "An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed."
)
TPU_UNUSED = "A Google TPU may be present on this machine, but libtpu is not installed."


@pytest.fixture
def warning(monkeypatch):
    """A function that returns how a warning of JAX's is printed."""
    logger = logging.getLogger("jax._src.xla_bridge")
    printed = []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    logger.addHandler(handler)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for _ in range(2):  # a second call adds nothing
        devices.warn_of_unused_chip()

    def log(message: str) -> str:
        logger.warning("%s", message)
        return printed.pop() if printed else ""

    yield log
    logger.removeHandler(handler)
    logger.removeFilter(devices._add_remedy)


def test_the_warning_of_a_chip_that_jax_cannot_use_says_what_to_install(warning):
    for message, extra in [
        (GPU_UNUSED, "'.[cuda12]' or '.[cuda13]'"),
        ("CUDA backend failed to initialize: old driver.", "'.[cuda12]' or '.[cuda13]'"),
        (TPU_UNUSED, "'.[tpu]'"),
    ]:
        line = warning(message)
        assert line.startswith(f"*** {message} pip install -e {extra}")
        assert line.count("***") == 2
        assert "JAX_PLATFORMS=cpu" in line
    assert warning("something else") == "something else"


def test_hiding_the_gpu_silences_its_warning(warning, monkeypatch):
    for hidden in "", "-1":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert warning(GPU_UNUSED) == ""
        assert warning(TPU_UNUSED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert warning(GPU_UNUSED)


SCRIPT = """
from jax._src import hardware_utils
from nanogpt_jax.hardware import devices
hardware_utils.has_visible_nvidia_gpu = lambda: True
devices.warn_of_unused_chip()
"""


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ("cuda", r"'\.\[cuda12\]' or"),
        pytest.param("tpu", r"'\.\[tpu\]' for", marks=pytest.mark.slow),
        ("gpus", "JAX knows cpu, cuda and"),
    ],
)
def test_a_device_that_is_required_and_not_there_is_one_line(run, tmp_path, requested, words, book):
    """A container may set JAX_PLATFORMS for another image: JAX answers an AssertionError."""
    flags = "--config=tiny", f"--dataset={book}", f"--out_dir={tmp_path / 'run'}"
    result = run("train.py", *flags, env=os.environ | {"JAX_PLATFORMS": requested})
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert re.search(f"error: JAX_PLATFORMS must .* got {requested}: .*{words}", line)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_jax_warns_of_an_unused_gpu_in_one_line_unless_the_cpu_is_requested():
    free = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    for environment, n_lines in (free, 1), (free | {"JAX_PLATFORMS": "cpu"}, 0):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines = done.stderr.splitlines()
        assert len(lines) == n_lines
        assert all(line.startswith("*** An NVIDIA GPU may be present") for line in lines)


def test_a_mesh_in_words():
    assert describe(sharding.make_mesh((1, 1, 1))) == "cpu"
    assert describe(sharding.make_mesh((4, 1, 1))) == "4 x cpu (data 4)"
    assert describe(sharding.make_mesh((1, 2, 2))) == "4 x cpu (fsdp 2, tensor 2)"
