"""Published specifications of chips that GPTs are trained on. No JAX."""

import re
from typing import NamedTuple


class Gpu(NamedTuple):
    """What NVIDIA's compiler must know about a GPU to compile for it without one."""

    capability: str
    multiprocessors: int
    shared_kib: int  # shared memory of a multiprocessor
    l2_mib: int
    ghz: float  # boost clock


class Chip(NamedTuple):
    """What a manufacturer publishes about a chip, or about the part that JAX calls a device."""

    name: str
    pattern: str  # matches JAX's `device_kind`
    flops: float  # FLOP/s of dense 16-bit products, summed in 32 bits
    memory_bytes: float
    bandwidth: float  # of the memory, bytes/s
    watts: float | None = None  # of the board under full load; Google publishes none for TPUs
    gpu: Gpu | None = None  # of NVIDIA
    dollars_per_hour: float | None = None  # rented; None: not offered, or not looked up


GB, GiB = 10**9, 2**30
A100, HOPPER = Gpu("8.0", 108, 164, 40, 1.41), Gpu("9.0", 132, 228, 50, 1.98)
H100_PCIE, BLACKWELL = Gpu("9.0", 114, 228, 50, 1.76), Gpu("10.0", 148, 228, 126, 1.97)
GRACE_BLACKWELL = Gpu("10.0", 152, 228, 126, 2.06)
ADA = Gpu("8.9", 128, 100, 72, 2.52)
# Each pattern is anchored at the end: laptop chips and slices of a chip extend the chip's name and
# are slower. Sources: NVIDIA's data sheets and architecture whitepapers (dense rates, without
# sparsity; watts too), AMD's data sheet, cloud.google.com/tpu/docs. Of TPU v2, v3 and v7x a device
# is half a chip; a P100 sums in 16 bits. Dollars are on-demand list prices of one chip as of 2026,
# for orders of magnitude only: Google Cloud for T4 and L4 (without their host) and TPUs, in the
# USA; GPU clouds (RunPod, Lambda), which differ by half, for the rest.
# fmt: off
CHIPS = (
    Chip("P100", r"\bP100-PCIE-16GB$", 18.7e12, 16 * GB, 732e9, 250, Gpu("6.0", 56, 64, 4, 1.33)),
    Chip("V100", r"\bV100-SXM2-16GB$", 125e12, 16 * GB, 900e9, 300, Gpu("7.0", 80, 96, 6, 1.53)),
    Chip("T4", r"\bT4$", 65e12, 16 * GB, 320e9, 70, Gpu("7.5", 40, 64, 4, 1.59), 0.35),
    Chip("RTX 3060", r"RTX 3060$", 25.5e12, 12 * GB, 360e9, 170, Gpu("8.6", 28, 100, 3, 1.78)),
    Chip("RTX 3070 Ti", r"RTX 3070 Ti$", 43.5e12, 8 * GB, 608e9, 290, Gpu("8.6", 48, 100, 4, 1.77)),
    Chip("RTX 3090", r"RTX 3090$", 71e12, 24 * GB, 936e9, 350, Gpu("8.6", 82, 100, 6, 1.70)),
    Chip("RTX 4060", r"RTX 4060$", 30.2e12, 8 * GB, 272e9, 115, Gpu("8.9", 24, 100, 24, 2.46)),
    Chip("RTX 4080", r"RTX 4080$", 97.5e12, 16 * GB, 717e9, 320, Gpu("8.9", 76, 100, 64, 2.51)),
    Chip("RTX 4090", r"RTX 4090$", 165.2e12, 24 * GB, 1008e9, 450, ADA, 0.60),
    Chip("RTX 5090", r"RTX 5090$", 209.5e12, 32 * GB, 1792e9, 575, Gpu("12.0", 170, 100, 96, 2.41)),
    Chip("RTX A6000", r"RTX A6000$", 154.8e12, 48 * GB, 768e9, 300, Gpu("8.6", 84, 100, 6, 1.80)),
    Chip("A10G", r"\bA10G$", 70e12, 24 * GB, 600e9, 300, Gpu("8.6", 80, 100, 6, 1.71)),
    Chip("L4", r"\bL4$", 121e12, 24 * GB, 300e9, 72, Gpu("8.9", 58, 100, 48, 2.04), 0.56),
    Chip("L40S", r"\bL40S$", 362e12, 48 * GB, 864e9, 350, Gpu("8.9", 142, 100, 96, 2.52)),
    Chip("A100 40GB", r"\bA100.*40GB$", 312e12, 40 * GB, 1555e9, 400, A100, 1.99),
    Chip("A100 80GB", r"\bA100.*80GB( PCIe)?$", 312e12, 80 * GB, 2039e9, 400, A100, 1.99),
    Chip("H100", r"\bH100 80GB HBM3$", 989.4e12, 80 * GB, 3350e9, 700, HOPPER, 3.99),
    Chip("H100 PCIe", r"\bH100 PCIe$", 756e12, 80 * GB, 2000e9, 350, H100_PCIE, 2.80),
    Chip("H200", r"\bH200$", 989.4e12, 141 * GB, 4800e9, 700, HOPPER, 4.59),
    Chip("B200", r"NVIDIA B200$", 2250e12, 180 * GB, 8000e9, 1000, BLACKWELL),
    Chip("GB200", r"NVIDIA GB200$", 2500e12, 186 * GB, 8000e9, 1200, GRACE_BLACKWELL),
    Chip("MI300X", r"\bMI300X$", 1307.4e12, 192 * GB, 5300e9, 750),
    Chip("TPU v2", r"TPU v2$", 22.5e12, 8 * GiB, 350e9),
    Chip("TPU v3", r"TPU v3$", 61.5e12, 16 * GiB, 450e9),
    Chip("TPU v4", r"TPU v4$", 275e12, 32 * GiB, 1228e9),
    Chip("TPU v5e", r"TPU v5( lite|e)$", 197e12, 16 * GiB, 819e9, None, None, 1.20),
    Chip("TPU v5p", r"TPU v5p?$", 459e12, 95 * GiB, 2765e9),
    Chip("TPU v6e", r"TPU v6( lite|e)$", 918e12, 32 * GiB, 1640e9, None, None, 2.70),
    Chip("TPU v7x", r"TPU ?v?7x$", 1153.5e12, 96 * GiB, 3690e9),
)
# fmt: on


def find_chip(name: str) -> Chip | None:
    """Return the chip of a JAX `device_kind`, or of a name as people write it; None: unknown.

    "RTX 4090" and "rtx4090" are the same; "a100" is the one with 40 GB.
    """
    names = {chip.name.lower().replace(" ", ""): chip for chip in CHIPS}
    named = (names | {"a100": names["a10040gb"]}).get(name.lower().replace(" ", ""))
    return named or next((chip for chip in CHIPS if re.search(chip.pattern, name)), None)
