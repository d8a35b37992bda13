"""NVIDIA's cards by name: the names that drivers report and those people write, with memory and rates.

A name is split into words, and a card fits if all words that identify it are there and no word contradicts it. So
"L4" never means an L40S, and "RTX 4090 Laptop" is another card than "RTX 4090". The same words in any order and
spelling are one name: "NVIDIA A100-SXM4-80GB", "a100 80 GB".

Figures are those of NVIDIA's data sheets and whitepapers: dense products in bfloat16 (float16 before Ampere) with
float32 sums, and bandwidth of the memory. Memory is what programs can allocate, a little less than the name says.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass

from loratune.errors import ConfigError, nearest

_NOISE = frozenset(
    ("nvidia", "geforce", "tesla", "quadro", "rtx", "gtx", "gpu", "graphics", "card", "generation", "edition")
)
_SIZE = re.compile(r"(\d+)gb")


@dataclass(frozen=True)
class Card:
    """One kind of card."""

    name: str
    gib: float
    """Memory that programs can allocate."""
    teraflops: float
    """Dense products with float32 sums, by the data sheet; 0 if they have no tensor cores."""
    terabytes: float
    """Memory traffic per second."""
    host_gigabytes: float
    """Copies to or from pinned host memory per second, each way."""
    words: frozenset[str]
    """All of these identify the card."""
    allowed: Set[str]
    """Further words that do not contradict it."""


def _card(name: str, gib: float, teraflops: float, terabytes: float, host: float = 22, allowed: str = "") -> Card:
    """A card whose memory in the name, if any, need not be given."""
    words = words_of(name) - _NOISE | words_of(name) & {"quadro"}  # "RTX 6000" alone may be any of three cards
    sizes = {word for word in words if _SIZE.fullmatch(word)}
    return Card(
        f"NVIDIA {name}", gib, teraflops, terabytes, host, frozenset(words - sizes), {*allowed.split(), *sizes}
    )


def words_of(text: str) -> set[str]:
    """The words of a device's name: lower case, "rtx4090ti" taken apart, "80 GiB" put together."""
    text = re.sub(r"(\d+)\s*gi?b?\b", r" \1gb ", text.lower())
    text = re.sub(r"\b(rtx|gtx|pro)(?=a?\d)", r"\1 ", text)
    text = re.sub(r"(?<=\b\d{4})(ti|super|laptop|ada|d)\b", r" \1", text)
    return set(re.findall(r"[a-z0-9]+", text))


_SXM = "sxm sxm2 sxm3 sxm4 sxm5 sxm6 hbm2 hbm2e hbm3 hbm3e pg509 pg506 hgx dgx"
_PRO = "blackwell workstation server max q"
CARDS: tuple[Card, ...] = (
    _card("GB300", 276, 2500, 8.0, 200, _SXM),
    _card("B300", 268, 2250, 8.0, 50, f"{_SXM} ac"),
    _card("GB200", 185, 2500, 8.0, 200, _SXM),
    _card("B200", 178, 2250, 8.0, 50, _SXM),
    _card("GH200 96GB", 95, 989, 4.0, 200, f"{_SXM} 480gb"),
    _card("GH200 144GB", 141, 989, 4.9, 200, f"{_SXM} 144g"),
    _card("H200", 139.8, 989, 4.8, 50, f"{_SXM} 141gb"),
    _card("H200 NVL", 139.8, 835, 4.8, 50, "141gb"),
    _card("H100 80GB", 79.1, 989, 3.35, 50, _SXM),
    _card("H100 PCIe", 79.1, 756, 2.0, 45, "80gb"),
    _card("H100 NVL", 93.1, 835, 3.9, 45, "94gb"),
    _card("H800", 79.1, 989, 3.35, 50, f"{_SXM} 80gb pcie"),
    _card("H20", 95.0, 148, 4.0, 50, f"{_SXM} 96gb"),
    _card("H20 141GB", 139.8, 148, 4.8, 50, f"{_SXM} 3e"),
    _card("A100 80GB", 79.2, 312, 2.0, 22, f"{_SXM} pcie pci e"),
    _card("A100 40GB", 39.4, 312, 1.55, 22, f"{_SXM} pcie pci e"),
    _card("A800 80GB", 79.2, 312, 2.0, 22, f"{_SXM} pcie"),
    _card("A800 40GB", 39.4, 312, 1.55, 22, "active"),
    _card("A40", 44.4, 150, 0.696, 22, "48gb pcie"),
    _card("A30", 23.5, 165, 0.933, 22, "24gb pcie"),
    _card("A16", 14.5, 18, 0.2, 22, "16gb"),
    _card("A10", 22.2, 125, 0.6, 22, "24gb pcie"),
    _card("A10G", 22.2, 70, 0.6, 22, "24gb"),
    _card("A2", 14.5, 18, 0.2, 11, "16gb"),
    _card("L40S", 44.4, 362, 0.86, 22, "48gb"),
    _card("L40G", 22.5, 181, 0.86, 22, "24gb"),
    _card("L40", 44.4, 181, 0.86, 22, "48gb"),
    _card("L20", 44.4, 119, 0.86, 22, "48gb"),
    _card("L4", 22.5, 121, 0.3, 22, "24gb"),
    _card("L2", 22.5, 96, 0.3, 22, "24gb"),
    _card("T4", 14.6, 65, 0.32, 11, "16gb"),
    _card("T4G", 14.6, 65, 0.32, 11, "16gb"),
    _card("V100 16GB", 15.7, 125, 0.9, 11, f"{_SXM} pcie fhhl dgxs ls"),
    _card("V100 32GB", 31.7, 125, 0.9, 11, f"{_SXM} pcie fhhl dgxs ls"),
    _card("V100S 32GB", 31.7, 130, 1.13, 11, "pcie"),
    _card("P100 16GB", 15.9, 0, 0.73, 11, f"{_SXM} pcie"),
    _card("P40", 23.8, 0, 0.35, 11, "24gb"),
    _card("RTX PRO 6000", 94.9, 503, 1.79, 45, f"96gb {_PRO}"),
    _card("RTX PRO 5000 48GB", 47.3, 258, 1.34, 45, _PRO),
    _card("RTX PRO 5000 72GB", 71.0, 258, 1.34, 45, _PRO),
    _card("RTX PRO 4500", 31.3, 211, 0.9, 45, f"32gb {_PRO}"),
    _card("RTX PRO 4000", 23.4, 147, 0.67, 45, f"24gb sff {_PRO}"),
    _card("RTX PRO 2000", 15.5, 68, 0.29, 22, f"16gb {_PRO}"),
    _card("RTX 6000 Ada", 47.4, 364, 0.96, 22, "48gb"),
    _card("RTX 5880 Ada", 47.4, 277, 0.96, 22, "48gb"),
    _card("RTX 5000 Ada", 31.3, 261, 0.58, 22, "32gb laptop"),
    _card("RTX 4500 Ada", 23.4, 158, 0.43, 22, "24gb"),
    _card("RTX 4000 Ada", 19.5, 107, 0.36, 22, "20gb"),
    _card("RTX 4000 SFF Ada", 19.5, 77, 0.28, 22, "20gb"),
    _card("RTX 2000 Ada", 15.5, 48, 0.22, 11, "16gb"),
    _card("RTX A6000", 47.4, 155, 0.77, 22, "48gb"),
    _card("RTX A5500", 23.5, 136, 0.77, 22, "24gb"),
    _card("RTX A5000", 23.5, 111, 0.77, 22, "24gb"),
    _card("RTX A4500", 19.5, 95, 0.64, 22, "20gb"),
    _card("RTX A4000", 15.6, 77, 0.45, 22, "16gb"),
    _card("RTX A2000 12GB", 11.6, 32, 0.29, 22),
    _card("RTX A2000 6GB", 5.7, 32, 0.29, 22),
    _card("RTX A1000", 7.7, 27, 0.19, 11, "8gb"),
    _card("RTX A400", 3.7, 11, 0.1, 11, "4gb"),
    _card("Quadro RTX 8000", 47.4, 130, 0.67, 11, "48gb"),
    _card("Quadro RTX 6000", 23.6, 130, 0.67, 11, "24gb"),
    _card("Quadro RTX 5000", 15.7, 89, 0.45, 11, "16gb"),
    _card("Quadro RTX 4000", 7.8, 57, 0.42, 11, "8gb"),
    _card("TITAN RTX", 23.6, 65, 0.67, 11, "24gb"),
    _card("TITAN V", 11.8, 110, 0.65, 11, "12gb"),
    _card("RTX 5090", 31.3, 209, 1.79, 45, "32gb d"),
    _card("RTX 5080", 15.5, 113, 0.96, 45, "16gb"),
    _card("RTX 5070 Ti", 15.5, 88, 0.9, 45, "16gb"),
    _card("RTX 5070", 11.5, 62, 0.67, 45, "12gb"),
    _card("RTX 5060 Ti 16GB", 15.5, 47, 0.45, 22),
    _card("RTX 5060 Ti 8GB", 7.6, 47, 0.45, 22),
    _card("RTX 5060", 7.6, 38, 0.45, 22, "8gb"),
    _card("RTX 5050", 7.6, 26, 0.32, 22, "8gb"),
    _card("RTX 5090 Laptop", 23.5, 63, 0.9, 22, "24gb"),
    _card("RTX 5080 Laptop", 15.5, 46, 0.9, 22, "16gb"),
    _card("RTX 5070 Ti Laptop", 11.5, 35, 0.67, 22, "12gb"),
    _card("RTX 5070 Laptop", 7.6, 28, 0.38, 22, "8gb"),
    _card("RTX 5060 Laptop", 7.6, 20, 0.38, 22, "8gb"),
    _card("RTX 4090", 23.6, 165, 1.01, 22, "24gb"),
    _card("RTX 4090 D", 23.6, 147, 1.01, 22, "24gb"),
    _card("RTX 4080 SUPER", 15.6, 104, 0.74, 22, "16gb"),
    _card("RTX 4080", 15.6, 97, 0.72, 22, "16gb"),
    _card("RTX 4070 Ti SUPER", 15.6, 88, 0.67, 22, "16gb"),
    _card("RTX 4070 Ti", 11.6, 80, 0.5, 22, "12gb"),
    _card("RTX 4070 SUPER", 11.6, 71, 0.5, 22, "12gb"),
    _card("RTX 4070", 11.6, 58, 0.5, 22, "12gb"),
    _card("RTX 4060 Ti 8GB", 7.6, 44, 0.29, 11),
    _card("RTX 4060 Ti 16GB", 15.6, 44, 0.29, 11),
    _card("RTX 4060", 7.6, 30, 0.27, 11, "8gb"),
    _card("RTX 4090 Laptop", 15.6, 66, 0.58, 22, "16gb"),
    _card("RTX 4080 Laptop", 11.6, 50, 0.43, 22, "12gb"),
    _card("RTX 4070 Laptop", 7.6, 31, 0.26, 11, "8gb"),
    _card("RTX 4060 Laptop", 7.6, 23, 0.26, 11, "8gb"),
    _card("RTX 4050 Laptop", 5.7, 18, 0.22, 11, "6gb"),
    _card("RTX 3090 Ti", 23.6, 80, 1.01, 22, "24gb"),
    _card("RTX 3090", 23.6, 71, 0.94, 22, "24gb"),
    _card("RTX 3080 Ti", 11.6, 68, 0.91, 22, "12gb"),
    _card("RTX 3080 10GB", 9.6, 60, 0.76, 22),
    _card("RTX 3080 12GB", 11.6, 61, 0.91, 22),
    _card("RTX 3070 Ti", 7.6, 43, 0.61, 22, "8gb"),
    _card("RTX 3070", 7.6, 41, 0.45, 22, "8gb"),
    _card("RTX 3060 Ti", 7.6, 32, 0.45, 22, "8gb"),
    _card("RTX 3060 12GB", 11.6, 25, 0.36, 22),
    _card("RTX 3060 8GB", 7.6, 25, 0.24, 22),
    _card("RTX 3050 8GB", 7.6, 18, 0.22, 11),
    _card("RTX 3050 6GB", 5.7, 13, 0.17, 11),
    _card("RTX 3080 Ti Laptop", 15.6, 47, 0.51, 22, "16gb"),
    _card("RTX 3080 Laptop 16GB", 15.6, 38, 0.45, 22),
    _card("RTX 3080 Laptop 8GB", 7.6, 38, 0.45, 22),
    _card("RTX 3070 Laptop", 7.6, 32, 0.45, 22, "8gb"),
    _card("RTX 3060 Laptop", 5.7, 26, 0.34, 22, "6gb"),
    _card("RTX 2080 Ti", 10.6, 54, 0.62, 11, "11gb"),
    _card("RTX 2080 SUPER", 7.6, 45, 0.5, 11, "8gb"),
    _card("RTX 2080", 7.6, 40, 0.45, 11, "8gb"),
    _card("RTX 2070 SUPER", 7.6, 36, 0.45, 11, "8gb"),
    _card("RTX 2070", 7.6, 30, 0.45, 11, "8gb"),
    _card("RTX 2060 SUPER", 7.6, 29, 0.45, 11, "8gb"),
    _card("RTX 2060 6GB", 5.7, 26, 0.34, 11),
    _card("RTX 2060 12GB", 11.6, 29, 0.34, 11),
    _card("GTX 1660 Ti", 5.7, 0, 0.29, 11, "6gb"),
    _card("GTX 1660 SUPER", 5.7, 0, 0.34, 11, "6gb"),
    _card("GTX 1660", 5.7, 0, 0.19, 11, "6gb"),
    _card("GTX 1080 Ti", 10.8, 0, 0.48, 11, "11gb"),
    _card("GTX 1080", 7.9, 0, 0.32, 11, "8gb"),
    _card("GTX 1070", 7.9, 0, 0.26, 11, "8gb"),
    _card("GB10", 119, 125, 0.27, 50, "128gb spark dgx"),
    _card("Jetson AGX Thor", 122, 250, 0.27, 50, "128gb t5000"),
    _card("Jetson AGX Orin", 61, 85, 0.2, 50, "64gb"),
)
"""Newest and largest first; of two sizes of one card, the usual one first."""

_OTHERS = {
    "AMD": r"amd|radeon|instinct|mi\d{2,3}[a-z]?|rx|vega|strix|gfx\d+\w*",
    "Apple": r"apple|mac|macbook|mps|metal|m[1-9]",
    "Intel": r"intel|arc|gaudi\d?|hpu|xpu|xeon|iris|b580|a770",
    "Google": r"google|tpu|v\d[ep]|trillium",
    "Huawei": r"huawei|ascend\w*|npu",
}


def card_of(text: str) -> Card | None:
    """The card that `text` names; None if there is none. Of several sizes of a card, the usual one."""
    given = words_of(text) - {"nvidia"}
    fitting = (card for card in CARDS if card.words <= given and given - card.words <= card.allowed | _NOISE)
    return next(fitting, None)


def refuse_other_makers(text: str) -> None:
    """Raises ConfigError if `text` names a device of another maker."""
    for maker, pattern in _OTHERS.items():
        if any(re.fullmatch(pattern, word) for word in words_of(text)):
            raise ConfigError(
                f'"{text}": {maker} devices are not supported; loratune trains on NVIDIA GPUs and on CPUs'
            )


def cards_like(text: str) -> str:
    """A hint with the names that resemble `text`, or some of the known ones."""
    names = [card.name.removeprefix("NVIDIA ") for card in CARDS]
    models = {word for word in words_of(text) if re.search(r"\d", word) and not _SIZE.fullmatch(word)}
    sharing = [name for name in names if models & words_of(name)]
    if sharing:
        return f" Did you mean {', '.join(sharing[:-1])}{' or ' if sharing[1:] else ''}{sharing[-1]}?"
    lower = {name.lower(): name for name in names}
    close = nearest(text.lower().removeprefix("nvidia "), lower)
    for low, name in lower.items():
        close = close.replace(f'"{low}"', f'"{name}"')
    return close or " Known are for example H100, A100, L4, T4, RTX 5090, RTX 4090 and RTX A6000."
