"""Published specifications of chips that GPTs are trained on. No JAX."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """What a manufacturer publishes about a chip, or about the part that JAX calls a device."""

    name: str
    pattern: str  # matches JAX's `device_kind`
    flops: float  # FLOP/s of dense 16-bit products, summed in 32 bits
    memory_bytes: float
    bandwidth: float  # of the memory, bytes/s
    watts: float | None = None  # of the board under full load; Google publishes none for TPUs
    dollars_per_hour: float | None = None  # rented; None: not offered, or not looked up


GB, GiB = 10**9, 2**30
# Each pattern is anchored at the end: laptop chips and slices of a chip extend the chip's name and
# are slower. Sources: NVIDIA's data sheets and architecture whitepapers (dense rates, without
# sparsity; watts too), cloud.google.com/tpu/docs. Dollars are on-demand list prices of one chip as
# of 2026, for orders of magnitude only: Google Cloud for T4 and L4 (without their host) and TPUs,
# in the USA; GPU clouds (RunPod, Lambda), which differ by half, for the rest.
CHIPS = (
    Chip("T4", r"\bT4$", 65e12, 16 * GB, 320e9, 70, 0.35),
    Chip("RTX 3070 Ti", r"RTX 3070 Ti$", 43.5e12, 8 * GB, 608e9, 290),
    Chip("RTX 4090", r"RTX 4090$", 165.2e12, 24 * GB, 1008e9, 450, 0.60),
    Chip("L4", r"\bL4$", 121e12, 24 * GB, 300e9, 72, 0.56),
    Chip("A100 80GB", r"\bA100.*80GB( PCIe)?$", 312e12, 80 * GB, 2039e9, 400, 1.99),
    Chip("A100 40GB", r"\bA100.*40GB$", 312e12, 40 * GB, 1555e9, 400, 1.99),
    Chip("H100 PCIe", r"\bH100 PCIe$", 756e12, 80 * GB, 2000e9, 350, 2.80),
    Chip("H100", r"\bH100 80GB HBM3$", 989.4e12, 80 * GB, 3350e9, 700, 3.99),
    Chip("H200", r"\bH200$", 989.4e12, 141 * GB, 4800e9, 700, 4.59),
    Chip("TPU v2", r"TPU v2$", 22.5e12, 8 * GiB, 350e9),  # of v2 and v3, a core is a device
    Chip("TPU v3", r"TPU v3$", 61.5e12, 16 * GiB, 450e9),
    Chip("TPU v4", r"TPU v4$", 275e12, 32 * GiB, 1228e9),
    Chip("TPU v5e", r"TPU v5( lite|e)$", 197e12, 16 * GiB, 819e9, None, 1.20),
    Chip("TPU v5p", r"TPU v5p?$", 459e12, 95 * GiB, 2765e9),
    Chip("TPU v6e", r"TPU v6( lite|e)$", 918e12, 32 * GiB, 1640e9, None, 2.70),
)


def chip_named(name: str) -> Chip:
    return next(chip for chip in CHIPS if chip.name == name)


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a JAX `device_kind`, or None if it is not in the table."""
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_kind)), None)
