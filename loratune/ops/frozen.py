"""Contract of a frozen weight: the products that a LoRA layer needs from W in any form in memory.

A LoRA layer multiplies with W once forward and once backward and never changes it. W can therefore be a matrix, 4-bit
codes that become a matrix for the length of one product (`precision.nf4`), 8-bit numbers that are multiplied directly
(`precision.fp8`), or a shard that is gathered for the product. Layers, fused layers and banks use this contract only.

Both products can be added onto a tensor of their shape and dtype, usually the low-rank part of the layer. Where the
form allows, the sum is taken inside the product, so that the total is rounded once. Adding to a product that is
rounded already loses most of an update smaller than half a unit in its last place. A CPU sums inside the product; on
an H100, cuBLAS was seen to round the product first, and only the augmented weight (`precision.projection`) avoids it.

The result may reuse the memory of `onto`, so `onto` must not be read afterwards. A bias is added last. Added to
`onto` first, it could round small values of `onto` to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from loratune.ops.products import MatrixProduct, mm
from loratune.ops.shape import own_shape


class FrozenWeight(Protocol):
    """W, (d_out, d_in); never receives a gradient and is never written to."""

    @property
    def precision(self) -> str:
        """Name of its precision in `loratune.tables.PRECISIONS`, or "dense"."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype: of the products' operands and results."""

    @property
    def device(self) -> torch.device:
        """Device that holds the weight."""

    @property
    def nbytes(self) -> int:
        """Bytes held, without tensors that are shared with other weights."""

    def forward(
        self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None, mm: MatrixProduct = mm
    ) -> Tensor:
        """x Wᵀ + b, (N, d_in) -> (N, d_out), added to `onto` if given.

        `mm` multiplies dense matrices; a forward passes its chosen kernels (`ops.products`).
        """

    def d_input(self, dy: Tensor, onto: Tensor | None = None, mm: MatrixProduct = mm) -> Tensor:
        """dy W, the gradient of x, (N, d_out) -> (N, d_in), added to `onto` if given."""

    def dense(self) -> Tensor:
        """W in the compute dtype, (d_out, d_in): the tensor held, or one made now. Read-only."""

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenWeight:
        """The same weight on another device or for another compute dtype."""


@dataclass(frozen=True)
class DenseWeight:
    """A weight held as a matrix of floating-point numbers, of any strides."""

    precision: ClassVar[str] = "dense"
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the matrix."""
        return self.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.weight.nbytes

    def forward(
        self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None, mm: MatrixProduct = mm
    ) -> Tensor:
        """x Wᵀ + b; (N, d_in) -> (N, d_out)."""
        if onto is None:
            return mm(x, self.weight.T) if bias is None else linear(x, self.weight, bias)
        onto.addmm_(x, self.weight.T)
        return onto if bias is None else onto.add_(bias)

    def d_input(self, dy: Tensor, onto: Tensor | None = None, mm: MatrixProduct = mm) -> Tensor:
        """dy W; (N, d_out) -> (N, d_in)."""
        return mm(dy, self.weight) if onto is None else onto.addmm_(dy, self.weight)

    def dense(self) -> Tensor:
        """The matrix."""
        return self.weight

    def to(self, device: torch.device, dtype: torch.dtype) -> DenseWeight:
        """The matrix on another device or in another dtype."""
        return DenseWeight(self.weight.to(device, dtype))


def frozen_linear(x: Tensor, frozen: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b as one autograd node; (..., d_in) -> (..., d_out). Saves neither x nor W for the backward."""
    x = x.to(frozen.dtype)
    bias = None if bias is None else bias.to(frozen.dtype)
    if torch.is_grad_enabled():
        out: Tensor = _FrozenLinear.apply(x, frozen, bias)  # type: ignore[no-untyped-call]
        return out
    return frozen.forward(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], frozen.shape[0])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.frozen, ctx.x_shape = frozen, x.shape
        rows = frozen.forward(x.reshape(-1, x.shape[-1]), bias)
        return own_shape(rows, (*x.shape[:-1], frozen.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = dy.reshape(-1, dy.shape[-1])
        dx = ctx.frozen.d_input(rows).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return dx, None, rows.sum(0) if ctx.needs_input_grad[2] else None
