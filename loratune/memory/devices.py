"""Accelerators and their rates, for estimates of speed, and the free memory of a device.

A step of LoRA is mostly frozen products. Its time is arithmetic divided by a rate, plus traffic divided by a
bandwidth. Rates here are those that large products and copies reach. They were measured on an H200 (docs/lab). For
other devices the data sheet's figure is multiplied by the share that the H200 reaches. Estimates of memory do not use
the rates.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from loratune.errors import ConfigError
from loratune.memory.cards import Card, card_of, cards_like, refuse_other_makers
from loratune.units import bytes_of

_REACHED = 0.66
"""Share of the data sheet's dense bf16 rate that frozen products reach, as measured on an H200."""
_GIB = 1 << 30
_MOST_GIB = 1024.0
"""A larger number without a unit is more likely part of a name."""


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator, or a CPU."""

    name: str
    memory_bytes: int
    """Memory that all programs together can allocate."""
    flops: float
    """Multiplications and additions per second in bf16 products; 0 if unknown."""
    bytes_per_second: float
    """Bandwidth of passes over device memory, reads plus writes."""
    host_bytes_per_second: float
    """Bandwidth of copies to or from pinned host memory, in each direction."""


CPU = DeviceSpec("CPU", 0, 0.0, 0.0, 0.0)


def named(text: str) -> DeviceSpec:
    """A device by its name ("H100", "NVIDIA GeForce RTX 4090"), by its size alone ("24GiB", "24" in GiB), or "cpu".

    Raises: ConfigError: neither a size nor a known name.
    """
    plain = text.strip()
    if plain.lower() == "cpu":
        return CPU
    card = card_of(plain)
    if card is not None:
        return _spec(card.name, int(card.gib * _GIB), card)
    if re.match(r"\d+\s*[x×*]\s*\w", plain):
        raise ConfigError(f'--gpu "{text}": a run uses one GPU; name one')
    if re.fullmatch(r"\d+(\.\d+)?\s*[gG]?", plain) and float(plain.rstrip("gG ")) < _MOST_GIB:
        plain = plain.rstrip("gG ") + "GiB"
    try:
        memory = bytes_of(plain)
    except ValueError:
        refuse_other_makers(text)
        raise ConfigError(
            f'--gpu "{text}" is neither a size such as 24GiB nor a known device.{cards_like(text)}'
        ) from None
    if memory < 1 << 20:
        raise ConfigError(f'--gpu "{text}" is less than 1 MiB')
    return DeviceSpec(text, memory, 0.0, 0.0, 0.0)


def _spec(name: str, memory_bytes: int, card: Card | None) -> DeviceSpec:
    """A device with the rates of a card."""
    if card is None:
        return DeviceSpec(name, memory_bytes, 0.0, 0.0, 0.0)
    flops, traffic = card.teraflops * _REACHED * 1e12, card.terabytes * 0.85e12
    return DeviceSpec(name, memory_bytes, flops, traffic, card.host_gigabytes * 1e9)


def present(device: torch.device) -> DeviceSpec:
    """This device: free memory plus that of this process, and the rates of the card of its name."""
    if device.type != "cuda":
        return CPU
    name = torch.cuda.get_device_name(device)
    free, _ = torch.cuda.mem_get_info(device)
    return _spec(name, free + torch.cuda.memory_reserved(device), card_of(name))


def at_hand() -> DeviceSpec:
    """The first GPU, or the CPU."""
    return present(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU. On a CPU, the available memory that Linux reports, elsewhere half of all memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if available is not None:
            return int(available[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
