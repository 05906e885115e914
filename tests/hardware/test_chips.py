"""The table of chips, looked up by the names that JAX gives to devices."""

from nanogpt_jax.hardware.chips import CHIPS, find_chip

CHIP_OF = {
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 3070 Ti": "RTX 3070 Ti",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA L4": "L4",
    "Tesla P100-PCIE-16GB": "P100",
    "Tesla V100-SXM2-16GB": "V100",
    "NVIDIA GeForce RTX 3060": "RTX 3060",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4060": "RTX 4060",
    "NVIDIA GeForce RTX 4080": "RTX 4080",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA A10G": "A10G",
    "NVIDIA L40S": "L40S",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "AMD Instinct MI300X": "MI300X",
    "TPU7x": "TPU v7x",
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
    "NVIDIA L40",
    "NVIDIA A10",
    "NVIDIA GeForce RTX 3060 Ti",
    "NVIDIA GeForce RTX 4080 SUPER",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3070 Ti Laptop GPU",
    "NVIDIA H200 NVL",
    "NVIDIA GH200 480GB",
    "TPU v4 lite",
]


def test_a_device_kind_finds_its_chip():
    assert {kind: find_chip(kind).name for kind in CHIP_OF} == CHIP_OF


def test_a_chip_that_is_not_in_the_table_is_not_found():
    """This includes slower chips whose name extends the name of one that is."""
    assert [kind for kind in UNKNOWN if find_chip(kind)] == []


def test_every_chip_of_the_table_is_looked_up_here():
    assert {chip.name for chip in CHIPS} == set(CHIP_OF.values())


def test_a_core_has_half_a_chips_rate_where_jax_counts_cores():
    assert find_chip("TPU v3").flops == 123e12 / 2
    assert find_chip("TPU v4").flops == 275e12


def test_a_chip_is_named_as_people_write_it():
    for name, written in {
        "RTX 4090": ["rtx4090", "RTX 4090", "rtx 4090"],
        "A100 40GB": ["a100", "A100 40GB", "a10040gb"],
        "H100": ["h100", "H100"],
    }.items():
        assert {find_chip(text).name for text in written} == {name}
    assert find_chip("h1000") is None
    assert [find_chip(chip.name) for chip in CHIPS] == [*CHIPS]
