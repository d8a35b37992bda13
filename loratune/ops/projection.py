"""Several frozen linear maps of one input with their adapters, as one product each way.

    y = x Wᵀ + b + (x Aᵀ) Bᵀ        W, A and B of all members side by side, B zero between members that differ

The forward and the gradients are plain functions without autograd: `ops.block` puts them into its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.ops.frozen import Frozen


@dataclass(frozen=True)
class Projection:
    """Frozen linear maps of one input, stacked, and working copies of their adapters.

    Member i has the rows `rows[i]` of the weight and the columns `ranks[i]` of `lora_B`, which is zero elsewhere.
    """

    frozen: Frozen
    """(D, d_in)"""
    bias: Tensor | None
    """(D,)"""
    lora_A: Tensor | None
    """(R, d_in), compute dtype; None if no member has an adapter."""
    lora_B: Tensor | None
    """(D, R), compute dtype, the scaling multiplied in."""
    rows: Sequence[slice]
    ranks: Sequence[slice]
    scalings: Sequence[float]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, d_in) -> outputs of all members (N, D), and x Aᵀ (N, R)."""
        y = self.frozen.forward(x, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y, None
        inner = x @ self.lora_A.T
        return y.addmm_(inner, self.lora_B.T), inner

    def d_inner(self, dy: Tensor) -> Tensor | None:
        """(N, D) -> gradient of x Aᵀ, (N, R)."""
        return None if self.lora_B is None else dy @ self.lora_B

    def d_input(self, dy: Tensor, d_inner: Tensor | None) -> Tensor:
        """Gradient of the input, (N, d_in)."""
        dx = self.frozen.d_input(dy)
        if d_inner is not None and self.lora_A is not None:
            dx.addmm_(d_inner, self.lora_A)
        return dx

    def d_adapters(self, dy: Tensor, d_inner: Tensor | None, x: Tensor, inner: Tensor | None) -> list[Tensor]:
        """Gradients of the masters: A, B of the first member with an adapter, then of the next."""
        if d_inner is None or inner is None:
            return []
        dA = _product(d_inner.T, x)
        gradients = []
        for rows, ranks, scaling in zip(self.rows, self.ranks, self.scalings, strict=True):
            dB = _product(dy[:, rows].T, inner[:, ranks])
            gradients += [dA[ranks], dB if scaling == 1.0 else dB.mul_(scaling)]
        return gradients


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the masters' precision: summed and returned in float32 where the operands have less."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    product = a @ b
    return product if product.dtype == torch.float64 else product.float()
