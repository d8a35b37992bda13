"""Activations between the projections of an MLP; each implements `ops.projection.Activation`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loratune.ops import layer
from loratune.ops.measure import Measure


@dataclass(frozen=True)
class SwiGlu:
    """silu(gate) · up of stacked columns [gate, up]."""

    kind: str = "silu"
    gated: bool = True

    def forward(self, x: Tensor, pad_columns: int, measure: Measure | None) -> Tensor:
        """(N, 2 m) -> (N, m + pad_columns)."""
        return layer.swiglu(x, pad_columns, measure)

    def backward(self, x: Tensor, d_out: Tensor, pad_columns: int, measure: Measure | None) -> tuple[Tensor, Tensor]:
        """Gradient of x, (N, 2 m + pad_columns), and the activation recomputed, (N, m)."""
        return layer.swiglu_backward(x, d_out, pad_columns, measure)
