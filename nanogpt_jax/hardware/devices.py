"""What this machine will do: the mesh, the dtype, the attention kernel, and whether it fits.

Every decision that depends on the platform is made here. JAX is imported when one is.
"""

import logging
import os
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nanogpt_jax.config import ComputeConfig, ModelConfig, TrainConfig, replace_fields
from nanogpt_jax.errors import InputError, RunError
from nanogpt_jax.hardware import chips, memory
from nanogpt_jax.hardware.processes import ALONE, Processes, use_compile_cache

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.stages import Compiled

    from nanogpt_jax.model import Compute

CUDA_EXTRA, TPU_EXTRA = "'.[cuda12]' or '.[cuda13]'", "'.[tpu]'"
# With either, XLA cannot find its cuDNN kernels again: https://github.com/openxla/xla/pull/46500
DETERMINISTIC = "xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops"
SPLASH_BLOCK = 128  # the splash kernel works on blocks of this many positions


class Machine(NamedTuple):
    """The devices of a run, and how they compute."""

    mesh: "Mesh"
    compute: "Compute"
    device: str  # in words: "cpu", "8 x tpu: TPU v5 lite (data 8)"
    reason: str  # why this dtype and kernel
    description: str  # all of this, and which devices are idle, for the log
    memory_bytes: int | None  # that a program can use on each device; None: unknown
    chip: chips.Chip | None  # None: not in the table

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s that the maker publishes for all devices together; None: unknown chip."""
        return self.mesh.size * self.chip.flops if self.chip else None

    def check_fits(self, step: "Compiled", config: TrainConfig) -> str:
        """Return a line about the memory that a step needs; raise RunError if a device has less."""
        needed, limit = memory.needed_bytes(step), self.memory_bytes
        of_limit = f" of {limit / 2**20:,.0f}" if limit else ""
        line = f"a step needs {needed / 2**20:,.0f}{of_limit} MiB on each device"
        if limit and needed > limit:
            raise RunError(f"{line}: {memory_levers(config, self.compute)}")
        return line


def choose(config: TrainConfig, processes: Processes = ALONE) -> Machine:
    """Choose what a run computes on, and how.

    Call it before anything else makes JAX look for devices: it turns the compile cache on, and
    warns if a chip is present that JAX does not use. Raises InputError if the machine cannot do
    what was requested by name, or surely cannot hold the model.
    """
    import jax

    from nanogpt_jax.sharding import choose_sizes, make_mesh

    use_compile_cache(config.compile_cache, processes.count)
    warn_of_unused_chip()
    if jax.process_count() != processes.count:
        raise InputError(
            f"this is one of the {jax.process_count()} hosts of a TPU pod: start the command on "
            "each of them, with --coordinator_address auto"
        )
    n_devices, device = jax.device_count(), jax.local_devices()[0]
    mesh = make_mesh(choose_sizes(config, n_devices, use_all=processes.count > 1))
    limit = memory.memory_bytes(device)
    compute, reason = choose_training(config, device, mesh, limit, processes)
    sizes = memory.estimate_memory(replace_fields(config, {"gradient_accumulation_steps": 1}))
    needed = sum(sizes.values()) - sizes["activations"]  # at the very least
    n_parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    advice = "a smaller --n_layer or --n_embd, or more devices with --mesh fsdp=-1"
    memory.check_memory(config.model, needed, limit, n_parts, advice)
    description = f"jax {jax.__version__} on {describe(mesh)}: {reason}"
    if idle := n_devices - mesh.size:
        why = "--mesh says so" if config.compute.mesh else "they do not divide --batch_size"
        description += f"\n{idle} of {n_devices} devices are idle: {why}"
    chip = chips.find_chip(device.device_kind)
    return Machine(mesh, compute, describe(mesh), reason, description, limit, chip)


def choose_training(
    config: TrainConfig, device, mesh: "Mesh", limit: float | None, processes: Processes = ALONE
) -> "tuple[Compute, str]":
    """Return what `choose_compute` does, with the loss in as few pieces as fit into the memory."""
    compute, reason = choose_compute(config.compute, config.model, device, mesh)
    if config.compute.loss_chunks or limit is None:
        return compute, reason
    names = {"dtype": np.dtype(compute.dtype).name, "attention": compute.attention}
    n_chunks = memory.fewest_loss_chunks(replace_fields(config, names), limit, mesh.shape)
    n_chunks = processes.max(n_chunks)  # all must compile the same program
    if n_chunks > 1:
        reason += f"; the loss in {n_chunks} pieces, to save memory"
    return compute._replace(loss_chunks=n_chunks), reason


def choose_compute(
    config: ComputeConfig, model: ModelConfig, device, mesh: "Mesh | None" = None
) -> "tuple[Compute, str]":
    """Return how a device computes a model, and why, in words for the log.

    Raises InputError if a dtype or a kernel requested by name is impossible here.
    """
    from nanogpt_jax.model import Compute

    if model.architecture != "gpt":
        for name, only in ("dtype", "float32"), ("attention", "xla"), ("remat", False):
            if (requested := getattr(config, name)) not in (only, "auto"):
                raise InputError(
                    f"{name} must be {only} for architecture {model.architecture}, one of the "
                    f"lecture's models, got {requested}: leave --{name} out"
                )
        reason = "float32, and attention written out, as in the lecture"
        return Compute(loss_chunks=config.loss_chunks or 1, mesh=mesh), reason
    dtype, dtype_reason = _choose_dtype(config.dtype, device)
    attention, reason = _choose_attention(config.attention, model, dtype, device)
    compute = Compute(np.dtype(dtype), attention, config.remat, config.loss_chunks or 1, mesh)
    return compute, f"{dtype} ({dtype_reason}); attention by {attention} ({reason})"


def _choose_dtype(requested: str, device) -> tuple[str, str]:
    if requested != "auto":
        return requested, "as requested"
    if device.platform == "tpu":
        return "bfloat16", "a TPU's native type"
    if device.platform != "gpu":
        return "float32", f"the fastest on a {device.platform}"
    if not (capability := _capability(device)):
        return "float32", "not an NVIDIA GPU; try --dtype bfloat16"
    name = f"compute capability {capability}"
    if capability >= 8.0:
        return "bfloat16", f"{name} has it"
    if capability >= 7.0:
        return "float16", f"{name} has no bfloat16; the loss is scaled"
    return "float32", f"{name} has no units for 16-bit products"


def _choose_attention(requested: str, model: ModelConfig, dtype: str, device) -> tuple[str, str]:
    if requested == "auto":
        kernel = {"gpu": "cudnn", "tpu": "splash"}.get(device.platform)
        if kernel is None:
            return "xla", f"the only one on a {device.platform}"
        lacking = _lacking(kernel, model, dtype, device)
        return ("xla", f"{kernel} needs {lacking}") if lacking else (kernel, "made for this chip")
    if requested != "xla" and (lacking := _lacking(requested, model, dtype, device)):
        raise InputError(
            f"attention {requested} needs {lacking}; --attention auto chooses what works here"
        )
    return requested, "as requested"


def _lacking(kernel: str, model: ModelConfig, dtype: str, device) -> str | None:
    """Return what a kernel needs and does not have here; None if it can be used."""
    platform = {"cudnn": "gpu", "splash": "tpu"}[kernel]
    if device.platform != platform:
        return f"a {platform.upper()}, but this is a {device.platform}"
    if model.dropout > 0:
        return f"a dropout of 0, but it is {model.dropout}"
    if model.attention_window:
        return f"an attention_window of 0, but it is {model.attention_window}"
    if kernel == "splash":
        if device.device_kind in ("TPU v2", "TPU v3"):
            return "a TPU v4 or newer"
        if dtype == "float16":
            return "bfloat16 or float32, but this is float16"
        if model.block_size % SPLASH_BLOCK:
            return f"a multiple of {SPLASH_BLOCK} as block_size, but it is {model.block_size}"
        return None
    capability, head_size = _capability(device), model.n_embd // model.n_head
    largest = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return f"compute capability 8.0, but this is {capability or 'not an NVIDIA GPU'}"
    if dtype == "float32":
        return "a 16-bit dtype, but this is float32"
    flags = (flag.partition("=") for flag in os.environ.get("XLA_FLAGS", "").split())
    values = {name: value for name, _, value in flags}  # the last of a name counts, as in XLA
    for flag in DETERMINISTIC:
        if values.get(f"--{flag}") in ("", "true", "1"):  # without a value it is on
            return f"XLA_FLAGS without --{flag}, under which XLA fails to run it"
    if head_size % 8 or head_size > largest:
        return f"a head size up to {largest} that is a multiple of 8, but it is {head_size}"
    return None


def _capability(device) -> float:
    """Return an NVIDIA GPU's compute capability, like 7.5 for a T4; 0 for anything else."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):  # not a GPU; AMD's are named, like gfx942
        return 0.0


def describe(mesh: "Mesh") -> str:
    """Return a mesh in words: "cpu", "gpu: NVIDIA H200", "8 x tpu: TPU v5 lite (data 8)"."""
    device = mesh.devices.flat[0]
    kind = "" if device.device_kind == device.platform else f": {device.device_kind}"
    count = f"{mesh.size} x " if mesh.size > 1 else ""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{count}{device.platform}{kind}" + (f" ({axes})" if axes else "")


def memory_levers(config: TrainConfig, compute: "Compute") -> str:
    """Return what a user can do about a training step that needs too much memory."""
    is_gpt = config.model.architecture == "gpt"
    levers = [
        (config.batch_size > 1, "a smaller --batch_size with more --gradient_accumulation_steps"),
        (is_gpt and not compute.remat, "--remat"),
        (is_gpt and np.dtype(compute.dtype) == "float32", "--dtype bfloat16"),
        (compute.loss_chunks < 8 <= config.model.block_size, "--loss_chunks 8"),
    ]
    texts = [f"{text}, " for applies, text in levers if applies]
    return f"try {''.join(texts)}{'or ' if texts else ''}a smaller model"


def warn_of_unused_chip() -> None:
    """Make JAX look for devices, and say what to do if it warns of a chip that it cannot use.

    Raises InputError if JAX_PLATFORMS requires one that it cannot use.
    """
    import jax

    logging.getLogger("jax._src.xla_bridge").addFilter(_add_remedy)
    try:
        jax.default_backend()
    except (AssertionError, RuntimeError):  # the first if JAX knows CUDA and finds nothing of it
        if not (requested := jax.config.jax_platforms):
            raise
        extra = {"cuda": CUDA_EXTRA, "gpu": CUDA_EXTRA, "tpu": TPU_EXTRA}.get(requested)
        remedy = f"pip install -e {extra} for one" if extra else "JAX knows cpu, cuda and tpu"
        raise InputError(
            "JAX_PLATFORMS must name a device that JAX can use in this environment, got "
            f"{requested}: {remedy}, or leave the variable out and JAX takes what it finds"
        ) from None


def _add_remedy(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if "may be present" not in message and "failed to initialize" not in message:
        return True
    extra = TPU_EXTRA
    if "TPU" not in message:
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden deliberately
            return False
        extra = f"{CUDA_EXTRA}, as its driver needs,"
    record.args = None
    record.msg = (
        f"*** {message} pip install -e {extra} in this environment lets JAX use it; "
        "JAX_PLATFORMS=cpu in front of the command says that you want the CPU ***"
    )
    return True
