"""What this machine is and can do, how its processes join, and what a model asks of it."""

# ruff: noqa: F401 (what other packages import)

from nanogpt_jax.hardware.chips import Chip, find_chip
from nanogpt_jax.hardware.devices import (
    Machine,
    choose,
    choose_compute,
    choose_training,
    describe,
    memory_levers,
    warn_of_unused_chip,
)
from nanogpt_jax.hardware.estimate import amount, duration, run_flops, run_line, updates_within
from nanogpt_jax.hardware.flops import (
    forward_flops_per_token,
    headline_params,
    is_float32,
    n_params,
    parts,
    size_in_words,
    steps_per_call,
    train_flops_per_token,
)
from nanogpt_jax.hardware.memory import check_sampling_memory, estimate_memory, needed_bytes
from nanogpt_jax.hardware.processes import ALONE, Processes, join_processes, use_compile_cache
