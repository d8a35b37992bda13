"""How many jobs train at once, and how many tokens their shared row has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

_SATURATED = {"cpu": 2048, "cuda": 4096}
"""Tokens in a row beyond which the base's products do not get faster per token."""


def row_tokens(device: torch.device, tokens_per_row: Iterable[int]) -> int:
    """Tokens in a shared row: enough to saturate the device, and at least as many as in a row of any job.

    Args:
        tokens_per_row: of each job.
    """
    own = list(tokens_per_row)
    return max(max(own), min(sum(own), _SATURATED.get(device.type, 2048)))


def slots_that_fit(model: PreTrainedModel, sizes: Iterable[int], tokens: int) -> int:
    """How many of the adapters train at once in the free memory; at least one.

    A slot takes 16 bytes for each parameter of the largest adapter (master, gradient and two moments, float32), and
    on a GPU a working copy of 2. The estimate reserves the activations of one row without recomputation, about 17
    values of the hidden size per token and layer (Korthikanti et al. 2022, arXiv:2205.05198), and a tenth of the
    rest.

    Args:
        sizes: parameters of each adapter, see `many.bank.Bank.size_of`.
        tokens: in a shared row.
    """
    sizes = list(sizes)
    config = model.config.get_text_config()
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    free = free_bytes(model.device) - 17 * tokens * width * layers * model.dtype.itemsize
    return max(1, min(len(sizes), int(0.9 * free) // (18 * max(sizes))))


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
