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

from loratune.errors import ConfigError, nearest
from loratune.units import bytes_of

_REACHED = 0.66
"""Share of the data sheet's dense bf16 rate that frozen products reach, as measured on an H200."""
_GIB = 1 << 30


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


def _known(name: str, gib: float, sheet_tflops: float, terabytes: float, host_gigabytes: float) -> DeviceSpec:
    memory = int(gib * _GIB)
    return DeviceSpec(name, memory, sheet_tflops * _REACHED * 1e12, terabytes * 0.85e12, host_gigabytes * 1e9)


_KNOWN = (
    _known("NVIDIA H200", 139.8, 989, 4.8, 50),
    _known("NVIDIA H100 80GB", 79.1, 989, 3.35, 50),
    _known("NVIDIA A100 80GB", 79.2, 312, 2.0, 22),
    _known("NVIDIA A100 40GB", 39.4, 312, 1.55, 22),
    _known("NVIDIA L40S", 44.4, 362, 0.86, 22),
    _known("NVIDIA L4", 22.5, 121, 0.3, 22),
    _known("NVIDIA A10G", 22.2, 70, 0.6, 22),
    _known("NVIDIA RTX 5090", 31.3, 209, 1.79, 45),
    _known("NVIDIA RTX 4090", 23.6, 165, 1.01, 22),
    _known("NVIDIA RTX 3090", 23.6, 71, 0.94, 22),
    _known("NVIDIA T4", 14.6, 65, 0.32, 11),
)


def named(text: str) -> DeviceSpec:
    """A device by part of its name ("H100", "rtx 4090"), or by its size alone ("24GiB").

    Raises: ConfigError: neither a size nor a known name.
    """
    words = text.lower().split()
    found = [device for device in _KNOWN if all(word in device.name.lower() for word in words)]
    if found:
        return found[0]
    try:
        memory = bytes_of(text)
    except ValueError:
        names = [device.name.removeprefix("NVIDIA ") for device in _KNOWN]
        hint = nearest(text, names) or f" Known are {', '.join(names)}"
        raise ConfigError(f'--gpu "{text}" is neither a size such as 24GiB nor a known device.{hint}') from None
    return DeviceSpec(text, memory, 0.0, 0.0, 0.0)


def present(device: torch.device) -> DeviceSpec:
    """This device. Its memory is free memory plus memory of this process; its rates are found by its name."""
    if device.type != "cuda":
        return DeviceSpec("CPU", 0, 0.0, 0.0, 0.0)
    name = torch.cuda.get_device_name(device)
    known = next((other for other in _KNOWN if other.name.lower() in name.lower()), None)
    free, _ = torch.cuda.mem_get_info(device)
    memory = free + torch.cuda.memory_reserved(device)
    if known is None:
        return DeviceSpec(name, memory, 0.0, 0.0, 0.0)
    return DeviceSpec(name, memory, known.flops, known.bytes_per_second, known.host_bytes_per_second)


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
