"""The table of chips, asked with the names that JAX gives to devices."""

import pytest

from nanogpt_jax.hardware import chips

CHIP_OF = {
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 3070 Ti": "RTX 3070 Ti",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA L4": "L4",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
    "TPU v2": "TPU v2",
    "TPU v3": "TPU v3",
    "TPU v4": "TPU v4",
    "TPU v5 lite": "TPU v5e",
    "TPU v5e": "TPU v5e",
    "TPU v5": "TPU v5p",
    "TPU v5p": "TPU v5p",
    "TPU v6 lite": "TPU v6e",
    "TPU v6e": "TPU v6e",
}
UNKNOWN = [
    "cpu",
    "NVIDIA L40S",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3070 Ti Laptop GPU",
    "NVIDIA H200 NVL",
    "NVIDIA GH200 480GB",
    "TPU v4 lite",
]


@pytest.mark.parametrize(("device_kind", "name"), CHIP_OF.items())
def test_a_device_kind_finds_its_chip(device_kind, name):
    assert chips.find(device_kind).name == name


@pytest.mark.parametrize("device_kind", UNKNOWN)
def test_a_chip_that_is_not_in_the_table_gets_no_figures(device_kind):
    """Also those whose name begins like one that is: they are slower."""
    assert chips.find(device_kind) is None


def test_every_chip_of_the_table_is_asked_for_here():
    assert {chip.name for chip in chips.CHIPS} == set(CHIP_OF.values())


def test_a_core_has_half_a_chips_rate_where_jax_counts_cores():
    assert chips.find("TPU v3").device_flops == 61.5e12
    assert chips.find("TPU v4").device_flops == 275e12
