"""What the chip can do: the type of its arithmetic and the kernel of its attention.

The places that ask which platform this is are here; all else is told.
"""

import logging
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanogpt_jax.config import ComputeConfig, ModelConfig, TrainConfig
from nanogpt_jax.errors import InputError
from nanogpt_jax.model import Compute

# What tells of a chip, whether JAX can use it or not. Source: jax/_src/hardware_utils.py.
NVIDIA_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")  # the second in containers, then WSL2's
GOOGLE, TPUS = "0x1ae0", {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
SPLASH_BLOCK = 128  # the splash kernel works on pieces of the context of this many positions


def choose(
    config: ComputeConfig, model: ModelConfig, device, mesh: Mesh | None = None
) -> tuple[Compute, str]:
    """Return what a device shall do, and why, in words for the log.

    Args:
        device: one of `jax.devices()`, or of a topology that is only compiled for.

    Raises:
        InputError: what was asked for by name cannot be.
    """
    if model.architecture != "gpt":
        return _as_in_the_lecture(config, model, mesh)
    dtype, reason = _choose_dtype(config.dtype, device)
    attention, attention_reason = _choose_attention(config.attention, model, dtype, device)
    compute = Compute(jnp.dtype(dtype), attention, config.remat, config.loss_chunks, mesh)
    return compute, f"{dtype} ({reason}); attention by {attention} ({attention_reason})"


def _as_in_the_lecture(
    config: ComputeConfig, model: ModelConfig, mesh: Mesh | None
) -> tuple[Compute, str]:
    for name, only in ("dtype", "float32"), ("attention", "xla"), ("remat", False):
        asked = getattr(config, name)
        if asked not in (only, "auto"):
            raise InputError(
                f"{name} must be {only} for architecture {model.architecture}, a step of the "
                f"lecture, but is {asked}"
            )
    compute = Compute(loss_chunks=config.loss_chunks, mesh=mesh)
    return compute, "float32, and attention written out, as in the lecture"


def describe(mesh: Mesh) -> str:
    """Return a mesh in words: "cpu", "gpu: NVIDIA H200", "8 x tpu: TPU v5 lite (data 8)"."""
    device = mesh.devices.flat[0]
    kind = "" if device.device_kind == device.platform else f": {device.device_kind}"
    count = f"{mesh.size} x " if mesh.size > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{count}{device.platform}{kind}" + (f" ({axes})" if axes else "")


def warn_of_unused_chip(root: Path = Path("/")) -> None:
    """Say so on standard error where a GPU or TPU seems to be there, but JAX computes on the CPU.

    To be called before JAX looks for devices itself. Nothing is said where JAX_PLATFORMS names the
    platform, or CUDA_VISIBLE_DEVICES hides the GPU: then it is meant so.

    Args:
        root: of the file system that is looked at.
    """
    if jax.config.jax_platforms:
        return
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not is_hidden and any((root / name).exists() for name in NVIDIA_FILES):
        chip, extra = "an NVIDIA GPU", "'.[cuda12]' or '.[cuda13]', as its driver needs,"
    elif any(_pci_id(device) in TPUS for device in root.glob("sys/bus/pci/devices/*")):
        chip, extra = "a TPU", "'.[tpu]'"
    else:
        return
    # JAX says as much, but not what to do; what else went wrong it shall say.
    logging.getLogger("jax._src.xla_bridge").addFilter(
        lambda record: "may be present" not in record.getMessage()
    )
    if jax.default_backend() == "cpu":
        print(
            f"*** {chip} seems to be here, but JAX computes on the CPU: pip install -e {extra} "
            "in this environment lets it use the chip; JAX_PLATFORMS=cpu in front says that the "
            "CPU is meant ***",
            file=sys.stderr,
        )


def _pci_id(device: Path) -> str:
    """Return the number of a device of Google's, which makes network cards too; "" of others."""
    try:
        is_googles = (device / "vendor").read_text().strip() == GOOGLE
        return (device / "device").read_text().strip() if is_googles else ""
    except OSError:
        return ""


def memory_bytes(device) -> int | None:
    """Return the memory that programs can have on a device; None where nothing tells."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_levers(config: TrainConfig, compute: Compute) -> str:
    """Return what a user can do about a training step that needs too much memory."""
    is_gpt = config.model.architecture == "gpt"
    levers = [
        (config.batch_size > 1, "a smaller --batch_size with more --gradient_accumulation_steps"),
        (is_gpt and not compute.remat, "--remat"),
        (is_gpt and compute.dtype == jnp.float32, "a --dtype of 16 bits"),
        (compute.loss_chunks == 1 < config.model.block_size, "--loss_chunks"),
        (True, "a smaller model"),
    ]
    *most, last = [text for applies, text in levers if applies]
    return f"take {', '.join(most)}, or {last}" if most else f"take {last}"


def _capability(device) -> float:
    """Return an NVIDIA GPU's compute capability, like 7.5 for a T4; 0 for all else."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # not a GPU; AMD's are named, like gfx942
        return 0.0


def _choose_dtype(asked: str, device) -> tuple[str, str]:
    if asked != "auto":
        return asked, "as asked"
    if device.platform == "tpu":
        return "bfloat16", "a TPU's own type"
    if device.platform != "gpu":
        return "float32", f"the fastest on a {device.platform}"
    capability = _capability(device)
    if capability >= 8.0:
        return "bfloat16", f"compute capability {capability} has it"
    if capability:
        why = f"compute capability {capability} has no bfloat16"
        return "float32", f"{why}; --dtype float16 is faster here"
    return "float32", "this GPU is not NVIDIA's; try --dtype bfloat16"


def _choose_attention(asked: str, model: ModelConfig, dtype: str, device) -> tuple[str, str]:
    if asked == "xla":
        return "xla", "as asked"
    if asked == "auto":
        wanted = {"gpu": "cudnn", "tpu": "splash"}.get(device.platform)
        if wanted is None:
            return "xla", f"the only one on a {device.platform}"
        lacking = _lacking(wanted, model, dtype, device)
        return ("xla", f"{wanted} needs {lacking}") if lacking else (wanted, "made for this chip")
    if lacking := _lacking(asked, model, dtype, device):
        raise InputError(
            f"attention {asked} needs {lacking}; --attention auto takes what fits here"
        )
    return asked, "as asked"


def _lacking(kernel: str, model: ModelConfig, dtype: str, device) -> str | None:
    """Return what a kernel needs and does not have here; None if it can serve."""
    head_size = model.n_embd // model.n_head
    capability = _capability(device)
    platform = {"cudnn": "gpu", "splash": "tpu"}[kernel]
    largest = 256 if capability >= 9.0 else 128
    if device.platform != platform:
        return f"a {platform.upper()}, but this is a {device.platform}"
    if model.dropout > 0:
        return f"a dropout of 0, but it is {model.dropout}"
    if kernel == "splash":
        if device.device_kind in ("TPU v2", "TPU v3"):
            return "a TPU v4 or newer"
        if dtype == "float16":
            return "bfloat16 or float32, but this is float16"
        if model.block_size % SPLASH_BLOCK:
            return f"a multiple of {SPLASH_BLOCK} as block_size, but it is {model.block_size}"
        return None
    if capability < 8.0:
        return f"compute capability 8.0, but this is {capability or 'not an NVIDIA GPU'}"
    if dtype == "float32":
        return "a type of 16 bits, but this is float32"
    if head_size % 8 or head_size > largest:
        return f"a head size up to {largest} that is a multiple of 8, but it is {head_size}"
    return None
