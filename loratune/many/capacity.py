"""Number of jobs that train at once, and number of tokens in their shared row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from loratune.memory.devices import free_bytes

_SATURATED = {"cpu": 2048, "cuda": 4096}
"""Tokens in a row from which the base's products need the same time per token."""


def row_tokens(device: torch.device, tokens_per_row: Iterable[int]) -> int:
    """Tokens in a shared row: enough to saturate the device, and at least as many as in a row of any job.

    Args:
        tokens_per_row: `tokens_per_row` of each job.
    """
    own = list(tokens_per_row)
    return max(max(own), min(sum(own), _SATURATED.get(device.type, 2048)))


def slots_that_fit(model: PreTrainedModel, sizes: Iterable[int], tokens: int) -> int:
    """Number of adapters that can train at once in the free memory; at least one.

    A slot takes 16 bytes for each parameter of the largest adapter (master, gradient and two moments, float32), and
    on a GPU a working copy of 2. The estimate reserves the activations of one row without recomputation, about 17
    values of the hidden size per token and layer (Korthikanti et al. 2022, arXiv:2205.05198), and a tenth of the
    rest.

    Args:
        sizes: parameters of each adapter, see `many.bank.Bank.size_of`.
        tokens: tokens in a shared row.
    """
    sizes = list(sizes)
    config = model.config.get_text_config()
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    free = free_bytes(model.device) - 17 * tokens * width * layers * model.dtype.itemsize
    return max(1, min(len(sizes), int(0.9 * free) // (18 * max(sizes))))
