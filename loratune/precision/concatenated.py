"""Frozen weights one below the other, each with its own memory and its own product.

The default of `WeightFormat.join`. It costs a launch and a copy for each member, and works for every precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.ops.frozen import FrozenWeight
from loratune.ops.products import MatrixProduct, mm


@dataclass(frozen=True)
class Concatenated:
    """The rows of several weights that read the same input; implements `ops.frozen.FrozenWeight`."""

    weights: tuple[FrozenWeight, ...]

    @property
    def precision(self) -> str:
        """Precision of all members."""
        return self.weights[0].precision

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out of all members, d_in)"""
        return sum(weight.shape[0] for weight in self.weights), self.weights[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of all members."""
        return self.weights[0].device

    @property
    def nbytes(self) -> int:
        """Bytes held by all members."""
        return sum(weight.nbytes for weight in self.weights)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None, mm: MatrixProduct = mm
    ) -> Tensor:
        """x Wᵀ + b; (N, d_in) -> (N, d_out)."""
        sizes = [weight.shape[0] for weight in self.weights]
        biases = [None] * len(sizes) if bias is None else list(bias.split(sizes))
        bases = [None] * len(sizes) if onto is None else [part.contiguous() for part in onto.split(sizes, 1)]
        members = zip(self.weights, biases, bases, strict=True)
        return torch.cat([weight.forward(x, b, base, mm) for weight, b, base in members], 1)

    def d_input(self, dy: Tensor, onto: Tensor | None = None, mm: MatrixProduct = mm) -> Tensor:
        """dy W; (N, d_out) -> (N, d_in). Partial sums of the members are rounded to the compute dtype."""
        for weight, part in zip(self.weights, dy.split([w.shape[0] for w in self.weights], 1), strict=True):
            onto = weight.d_input(part, onto, mm)
        assert onto is not None
        return onto

    def dense(self) -> Tensor:
        """(d_out, d_in), made now."""
        return torch.cat([weight.dense() for weight in self.weights])

    def to(self, device: torch.device, dtype: torch.dtype) -> Concatenated:
        """The same weights on another device or for another compute dtype."""
        return Concatenated(tuple(weight.to(device, dtype) for weight in self.weights))
