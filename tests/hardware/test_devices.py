"""The dtype and the attention kernel, chosen for devices that this machine does not have."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nanogpt_jax.config import ComputeConfig, ModelConfig, TrainConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.hardware import devices
from nanogpt_jax.hardware.devices import choose_compute, describe, memory_levers
from nanogpt_jax.model import Compute
from nanogpt_jax.sharding import make_mesh


def gpu(device_kind, compute_capability):
    return SimpleNamespace(
        platform="gpu", device_kind=device_kind, compute_capability=compute_capability
    )


def tpu(device_kind):
    return SimpleNamespace(platform="tpu", device_kind=device_kind)


def model(head_size=64, **fields):
    """A model of GPT-2's shape, except for these fields."""
    return ModelConfig(vocab_size=50304, n_embd=12 * head_size, **fields)


T4 = gpu("Tesla T4", "7.5")
A100 = gpu("NVIDIA A100-SXM4-40GB", "8.0")
L4 = gpu("NVIDIA L4", "8.9")
H100 = gpu("NVIDIA H100 80GB HBM3", "9.0")
H200 = gpu("NVIDIA H200", "9.0")
MI300X = gpu("AMD Instinct MI300X", "gfx942")
V5E = tpu("TPU v5 lite")
GPT2 = model()


def chosen(device, model=GPT2, **requested):
    compute, _ = choose_compute(ComputeConfig(**requested), model, device)
    return compute.dtype.name, compute.attention


def reason(device, model=GPT2, **requested):
    return choose_compute(ComputeConfig(**requested), model, device)[1]


@pytest.mark.parametrize("device", [A100, L4, H100, H200], ids=lambda device: device.device_kind)
def test_nvidia_gpus_from_ampere_on_compute_in_bfloat16_with_cudnn(device):
    assert chosen(device) == ("bfloat16", "cudnn")


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_a_tpu_computes_in_bfloat16_with_splash(kind):
    assert chosen(tpu(kind)) == ("bfloat16", "splash")


def test_a_t4_computes_in_float32_and_the_reason_suggests_what_is_faster():
    assert chosen(T4) == ("float32", "xla")
    assert "7.5" in reason(T4)
    assert "--dtype float16" in reason(T4)
    assert chosen(T4, dtype="float16") == ("float16", "xla")


def test_a_cpu_computes_in_float32():
    assert chosen(jax.devices()[0]) == ("float32", "xla")
    assert chosen(jax.devices()[0], dtype="bfloat16") == ("bfloat16", "xla")


def test_a_gpu_of_another_maker_computes_in_float32():
    assert chosen(MI300X) == ("float32", "xla")
    assert chosen(MI300X, dtype="bfloat16") == ("bfloat16", "xla")


@pytest.mark.parametrize(
    ("device", "model", "requested", "because"),
    [
        (A100, model(dropout=0.1), {}, "dropout"),
        (A100, model(head_size=60), {}, "60"),
        (A100, model(head_size=136), {}, "136"),
        (H100, model(head_size=264), {}, "264"),
        (H100, GPT2, {"dtype": "float32"}, "float32"),
        (V5E, model(dropout=0.1), {}, "dropout"),
        (V5E, model(block_size=250), {}, "250"),
        (V5E, GPT2, {"dtype": "float16"}, "float16"),
        (tpu("TPU v2"), GPT2, {}, "v4"),
        (tpu("TPU v3"), GPT2, {}, "v4"),
    ],
    ids=lambda part: getattr(part, "device_kind", None),
)
def test_a_kernel_that_cannot_be_used_is_not_chosen_and_the_reason_says_why(
    device, model, requested, because
):
    assert chosen(device, model, **requested)[1] == "xla"
    attention_reason = reason(device, model, **requested).partition(";")[2]
    assert because in attention_reason


def test_hopper_takes_larger_heads():
    assert chosen(H100, model(head_size=136))[1] == "cudnn"
    assert chosen(H100, model(head_size=256))[1] == "cudnn"


@pytest.mark.parametrize(
    ("device", "requested", "lacking"),
    [
        (T4, {"attention": "cudnn", "dtype": "float16"}, "capability 8.0, but this is 7.5"),
        (MI300X, {"attention": "cudnn", "dtype": "bfloat16"}, "not an NVIDIA GPU"),
        (jax.devices()[0], {"attention": "cudnn"}, "a GPU, but this is a cpu"),
        (A100, {"attention": "cudnn", "dtype": "float32"}, "a 16-bit dtype, but this is float32"),
        (V5E, {"attention": "cudnn"}, "a GPU, but this is a tpu"),
        (A100, {"attention": "splash"}, "a TPU, but this is a gpu"),
        (V5E, {"attention": "splash", "dtype": "float16"}, "but this is float16"),
        (tpu("TPU v3"), {"attention": "splash"}, "TPU v4 or newer"),
    ],
    ids=lambda part: getattr(part, "device_kind", None),
)
def test_requesting_an_impossible_kernel_is_an_error(device, requested, lacking):
    with pytest.raises(InputError, match=lacking):
        chosen(device, **requested)


@pytest.mark.parametrize(
    ("device", "requested", "expected"),
    [
        (A100, {"attention": "cudnn", "dtype": "float16"}, ("float16", "cudnn")),
        (A100, {"attention": "xla"}, ("bfloat16", "xla")),
        (V5E, {"attention": "splash", "dtype": "float32"}, ("float32", "splash")),
        (V5E, {"attention": "xla", "dtype": "float32"}, ("float32", "xla")),
        (H200, {"dtype": "float32"}, ("float32", "xla")),
    ],
    ids=lambda part: getattr(part, "device_kind", None),
)
def test_a_possible_request_is_fulfilled(device, requested, expected):
    assert chosen(device, **requested) == expected
    assert "as requested" in reason(device, **requested)


def test_the_other_fields_are_passed_on():
    mesh = make_mesh((4, 1, 1))
    compute, _ = choose_compute(
        ComputeConfig(remat=True, loss_chunks=8), GPT2, jax.devices()[0], mesh
    )
    assert (compute.remat, compute.loss_chunks, compute.mesh) == (True, 8, mesh)
    assert compute.dtype == jnp.float32


def test_advice_about_too_little_memory_names_only_what_may_help():
    """Not what is set already, nor what a model of the lecture does not have."""
    levers = memory_levers(TrainConfig(), Compute())
    for word in "--batch_size", "--gradient_accum", "--remat", "--loss_chunks", "bfloat16":
        assert word in levers
    compute = Compute(jnp.dtype("bfloat16"), remat=True, loss_chunks=8)
    assert memory_levers(TrainConfig(batch_size=1), compute) == "try a smaller model"
    lecture = ModelConfig(architecture="bigram", bias=True, n_layer=1, n_head=1)
    assert "--remat" not in memory_levers(TrainConfig(model=lecture), Compute())


# A chip that JAX does not use


@pytest.fixture
def root(tmp_path):
    """The root of an empty file system, with no platform forced by the user."""
    forced = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield tmp_path
    jax.config.update("jax_platforms", forced)


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def add_pci_device(root, vendor, device):
    for name, number in ("vendor", vendor), ("device", device):
        write(root / "sys" / "bus" / "pci" / "devices" / f"0000:00:{device}" / name, f"{number}\n")


def warning(root, capsys):
    devices.warn_of_unused_chip(root)
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["nvidia0", "nvidiactl", "dxg"])
def test_an_unused_gpu_is_reported_with_what_to_install(root, capsys, name):
    write(root / "dev" / name)
    (line,) = warning(root, capsys).splitlines()
    assert line.startswith("*** an NVIDIA GPU seems to be present, but JAX computes on the CPU")
    assert "pip install -e '.[cuda12]' or '.[cuda13]'" in line


def test_an_unused_tpu_is_reported_with_what_to_install(root, capsys):
    add_pci_device(root, "0x8086", "0x1237")
    add_pci_device(root, "0x1ae0", "0x0063")
    (line,) = warning(root, capsys).splitlines()
    assert line.startswith("*** a TPU seems to be present, but JAX computes on the CPU")
    assert "pip install -e '.[tpu]'" in line


def test_no_warning_on_a_machine_without_a_chip(root, capsys):
    """Google's network card and disk are no TPUs, nor is an Intel device of the same number."""
    for vendor, device in ("0x1ae0", "0x0042"), ("0x1ae0", "0x001f"), ("0x8086", "0x0063"):
        add_pci_device(root, vendor, device)
    (root / "sys" / "bus" / "pci" / "devices" / "unreadable").mkdir()
    assert warning(root, capsys) == ""


def test_no_warning_if_the_cpu_is_forced_or_the_gpu_hidden(root, capsys, monkeypatch):
    write(root / "dev" / "nvidia0")
    for hidden in "", "-1":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert warning(root, capsys) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert warning(root, capsys)
    jax.config.update("jax_platforms", "cpu")
    assert warning(root, capsys) == ""


def test_no_warning_if_jax_uses_the_chip(root, capsys, monkeypatch):
    write(root / "dev" / "nvidia0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert warning(root, capsys) == ""


SCRIPT = """
import pathlib, sys
import jax
from jax._src import hardware_utils
from nanogpt_jax.hardware import devices
hardware_utils.has_visible_nvidia_gpu = lambda: True  # as on the machine whose root is given
devices.warn_of_unused_chip(pathlib.Path(sys.argv[1]))
jax.devices()
"""


def test_our_warning_replaces_jaxs(tmp_path):
    write(tmp_path / "dev" / "nvidia0")
    free = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    for root, words in (
        (tmp_path, "*** an NVIDIA GPU seems to be present"),
        (tmp_path / "x", "may be"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(root)],
            env=free, capture_output=True, text=True, check=True,
        )  # fmt: skip
        (line,) = done.stderr.splitlines()
        assert words in line


def test_describe_names_the_axes_of_a_mesh():
    assert describe(make_mesh((1, 1, 1))) == "cpu"
    assert describe(make_mesh((4, 1, 1))) == "4 x cpu (data 4)"
    assert describe(make_mesh((1, 2, 2))) == "4 x cpu (fsdp 2, tensor 2)"
