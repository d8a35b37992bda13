"""A frozen weight, in whichever form it is held: what a LoRA layer needs of W, and nothing else.

A LoRA layer multiplies with W once forward and once backward and never changes it, so W need not be a matrix of
floating-point numbers: it may be 4-bit codes that become a matrix for the length of one product (`precision.nf4`), or
8-bit numbers that the product takes as they are (`precision.fp8`). Every form answers the same three questions.

Both products can be added `onto` a tensor of their shape and dtype, such as the low-rank part of the layer: where the
form can, inside the product, so that the total is rounded once. Added to a product that has been rounded already,
most of what is smaller than half a unit in its last place is lost. A CPU sums so; on an H100 cuBLAS was seen to round
the product first after all (benchmarks/NOTES.md, 25 November), and only a border (`precision.projection`) avoids it
there.
The result may take the place of `onto`, which must not be read afterwards. A bias comes last: added to `onto` first,
it would round it away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from loratune.ops.products import mm


class Frozen(Protocol):
    """W, (d_out, d_in), that never receives a gradient."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes into the products and comes out of them."""

    @property
    def device(self) -> torch.device:
        """Where the weight is held."""

    def forward(self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """x Wᵀ + b, (N, d_in) -> (N, d_out), added to `onto` if there is one; see above."""

    def d_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """dy W, the gradient of x, (N, d_out) -> (N, d_in), added to `onto` if there is one."""

    def dense(self) -> Tensor:
        """W itself in `dtype`, (d_out, d_in): the tensor that is held, or one made now. Not to be written to."""


@dataclass(frozen=True)
class Dense:
    """A weight held as a matrix of floating-point numbers."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the matrix."""
        return self.weight.device

    def forward(self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """x Wᵀ + b; (N, d_in) -> (N, d_out)."""
        if onto is None:
            return mm(x, self.weight.T) if bias is None else linear(x, self.weight, bias)
        onto.addmm_(x, self.weight.T)
        return onto if bias is None else onto.add_(bias)

    def d_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """dy W; (N, d_out) -> (N, d_in)."""
        return mm(dy, self.weight) if onto is None else onto.addmm_(dy, self.weight)

    def dense(self) -> Tensor:
        """The matrix."""
        return self.weight


def frozen_linear(x: Tensor, frozen: Frozen, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b as one autograd node; (..., d_in) -> (..., d_out). Keeps nothing of x or W for the backward."""
    x = x.to(frozen.dtype)
    bias = None if bias is None else bias.to(frozen.dtype)
    if torch.is_grad_enabled():
        out: Tensor = _FrozenLinear.apply(x, frozen, bias)  # type: ignore[no-untyped-call]
        return out
    return frozen.forward(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], frozen.shape[0])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, bias: Tensor | None) -> Tensor:
        ctx.frozen, ctx.x_shape = frozen, x.shape
        return frozen.forward(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], frozen.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows = dy.reshape(-1, dy.shape[-1])
        dx = ctx.frozen.d_input(rows).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return dx, None, rows.sum(0) if ctx.needs_input_grad[2] else None
