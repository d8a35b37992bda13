"""Names of cards: drivers' and people's spellings mean one card each, and other makers are refused by name."""

from __future__ import annotations

import pytest

from loratune.errors import ConfigError
from loratune.memory.cards import CARDS, card_of
from loratune.memory.devices import CPU, named

GIB = 1 << 30
SPELLINGS = {
    "NVIDIA H100 80GB": ["H100", "NVIDIA H100 80GB HBM3", "h100-sxm5-80gb", "H100 SXM"],
    "NVIDIA H100 PCIe": ["NVIDIA H100 PCIe", "h100 pcie 80GB"],
    "NVIDIA H100 NVL": ["NVIDIA H100 NVL"],
    "NVIDIA H200": ["H200", "NVIDIA H200"],
    "NVIDIA H20": ["H20", "NVIDIA H20"],
    "NVIDIA B200": ["NVIDIA B200"],
    "NVIDIA A100 80GB": ["A100", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "a100 80 GiB"],
    "NVIDIA A100 40GB": ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "A100-40G"],
    "NVIDIA A10": ["A10", "NVIDIA A10"],
    "NVIDIA A10G": ["NVIDIA A10G"],
    "NVIDIA L4": ["L4", "NVIDIA L4"],
    "NVIDIA L40": ["NVIDIA L40"],
    "NVIDIA L40S": ["NVIDIA L40S"],
    "NVIDIA T4": ["T4", "Tesla T4"],
    "NVIDIA V100 32GB": ["Tesla V100-SXM2-32GB"],
    "NVIDIA RTX 4090": ["NVIDIA GeForce RTX 4090", "rtx4090", "4090", "GeForce RTX 4090 24GB"],
    "NVIDIA RTX 4090 Laptop": ["NVIDIA GeForce RTX 4090 Laptop GPU"],
    "NVIDIA RTX 4070 Ti SUPER": ["4070ti super", "NVIDIA GeForce RTX 4070 Ti SUPER"],
    "NVIDIA RTX 3060 12GB": ["NVIDIA GeForce RTX 3060"],
    "NVIDIA RTX A6000": ["NVIDIA RTX A6000", "a6000", "rtxa6000"],
    "NVIDIA RTX 6000 Ada": ["NVIDIA RTX 6000 Ada Generation"],
    "NVIDIA Quadro RTX 6000": ["Quadro RTX 6000"],
    "NVIDIA RTX PRO 6000": ["NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"],
    "NVIDIA GB10": ["NVIDIA GB10"],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_card_has_many_spellings_and_none_means_another(name: str) -> None:
    assert {named(spelling).name for spelling in SPELLINGS[name]} == {name}


def test_every_name_of_the_table_means_its_own_card() -> None:
    for card in CARDS:
        assert card_of(card.name) == card, card.name
        assert 0.85 * (size := float(card.gib)) <= size < 300
        assert card.teraflops >= 0 < card.terabytes


@pytest.mark.parametrize(
    ("text", "bytes_held"),
    [("24", 24 * GIB), ("24GiB", 24 * GIB), ("24G", 24 * GIB), ("24 GB", 24 * 10**9), ("11.5", 23 * GIB // 2)],
)
def test_a_size_alone_has_memory_and_no_rates(text: str, bytes_held: int) -> None:
    device = named(text)
    assert (device.memory_bytes, device.flops) == (bytes_held, 0.0)


def test_the_cpu_can_be_named() -> None:
    assert named("CPU") == CPU


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MI300X", '"MI300X": AMD devices are not supported'),
        ("AMD Instinct MI250X", "AMD devices"),
        ("Radeon RX 7900 XTX", "AMD devices"),
        ("Apple M3 Max", "Apple devices are not supported"),
        ("M2 Ultra", "Apple devices"),
        ("Intel Arc A770", "Intel devices"),
        ("8x H100", "a run uses one GPU"),
        ("RTX 6000", "Did you mean RTX PRO 6000, RTX 6000 Ada or Quadro RTX 6000"),
        ("4090 Ti", "Did you mean RTX 4090, RTX 4090 D or RTX 4090 Laptop"),
        ("A100 20GB", "Did you mean A100 80GB or A100 40GB"),
        ("H1000", '"H100 80GB"'),
        ("0", "less than 1 MiB"),
        ("5000000", "neither a size such as 24GiB nor a known device"),
    ],
)
def test_other_names_are_refused_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        named(text)
    assert message in str(error.value)
