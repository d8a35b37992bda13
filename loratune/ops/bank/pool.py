"""Weights of many adapters in three flat tensors, and the segments of the current row.

The tensors are float32 masters, their gradients and, on a GPU, working copies in the compute dtype. B is stored
transposed, so that both factors are (r, width) matrices of contiguous rows. A slot's weights are one slice of the
pool, so clipping, updating, saving and clearing a slot are one call each.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loratune.ops.frozen import FrozenWeight


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of a row, which belong to one slot."""

    slot: int
    start: int
    stop: int
    key: int | None = None
    """`ops.dropout.dropout_key` of the slot's seed and step; None for no dropout."""
    position: int = 0
    """Number of the first token within the slot's own step; dropout depends on it."""


@dataclass(frozen=True)
class SlotWeights:
    """One slot's low-rank weights at one layer: views of the pool."""

    A: Tensor
    """(r, d_in)"""
    B: Tensor
    """(r, d_out), the transpose of lora_B"""
    dA: Tensor
    dB: Tensor
    scaling: float


@dataclass
class BankLayer:
    """One linear layer's entry in the pool."""

    index: int
    """Row in the pool's tables."""
    salt: int
    """`ops.dropout.layer_salt`"""
    d_in: int
    d_out: int
    parts: dict[int, SlotWeights] = field(default_factory=dict)
    """Slot -> its weights here; slots that do not adapt this layer are missing."""


class BankPool:
    """Weights of all slots, and the segments of the current row."""

    def __init__(
        self, starts: Sequence[int], layers: int, max_rank: int, dtype: torch.dtype, like: FrozenWeight
    ) -> None:
        """Allocates a pool of zeros.

        Args:
            starts: (slots + 1,) start of each slot's slice of the flat tensors, and their length.
            layers: number of layers with an entry.
            max_rank: largest rank of any slot at any layer.
            dtype: dtype of the masters.
            like: a frozen weight on the device and in the compute dtype of the layers.
        """
        self.starts, self.max_rank, self.device = list(starts), max_rank, like.device
        self.master = torch.zeros(starts[-1], dtype=dtype, device=like.device)
        self.gradient = torch.zeros_like(self.master)
        self.dropout = [0.0] * (len(starts) - 1)
        self.segments: tuple[Segment, ...] = ()
        self.entry = torch.empty(0, device=like.device, requires_grad=True)
        """Tensor without elements, an input of every layer. It makes autograd run the backward of the first layer,
        whose other input needs no gradient."""
        self.tables: Any = None
        """`ops.bank.kernels.BankTables`, the twins of the products; None where the reference runs."""
        if like.device.type == "cuda" and like.dtype in (torch.bfloat16, torch.float16):
            kernels = importlib.import_module("loratune.ops.bank.kernels")  # imports Triton
            self.tables = kernels.BankTables(self, layers, like.dtype)

    def slot(self, flat: Tensor, slot: int) -> Tensor:
        """The slice of a flat tensor that belongs to `slot`."""
        return flat[self.starts[slot] : self.starts[slot + 1]]

    def refresh(self) -> None:
        """Copies the masters to the working copies, if there are any: one launch."""
        if self.tables is not None:
            self.tables.work.copy_(self.master)
