"""A norm and a gated activation for layers of any architecture, each one pass forward and one backward.

Written as modules they are five to ten, with what lies in between kept for the backward, in float32 where a norm is
concerned. Here only the arguments are kept. Layers of Llama's kind have passes that do more at once (`ops.layer`).

The formulas are plain PyTorch, which is what a CPU runs; on a GPU in half precision the twins in `ops.passes_kernels`
run. Sums are taken in float32 (float64 for float64), outputs have the inputs' dtype. Gelu: Hendrycks and Gimpel 2016,
arXiv:1606.08415; gated: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from loratune.ops.dispatch import half_on_gpu, wide, with_kernel

Kind = Literal["silu", "gelu", "gelu_tanh"]
KINDS: tuple[Kind, ...] = ("silu", "gelu", "gelu_tanh")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of (..., d).

    A weight of x's dtype multiplies what has been rounded to it, as Llama does; one in float32 what has not, as Gemma
    does.
    """
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def gated(gate: Tensor, up: Tensor, kind: Kind) -> Tensor:
    """activation(gate) * up, (..., m) each."""
    out: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return out


def activation(x: Tensor, kind: Kind) -> Tensor:
    """The activation by itself."""
    if kind == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@with_kernel(half_on_gpu, "ops.passes_kernels")
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(N, d) -> (N, d)."""
    x32 = wide(x)
    unit = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(_rounding(x, weight))
    return (weight * unit).to(x.dtype)


@with_kernel(half_on_gpu, "ops.passes_kernels")
def norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of x, (N, d)."""
    x32 = wide(x)
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    unit, d_unit = x32 * inverse, wide(d_out) * wide(weight)
    return (inverse * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))).to(x.dtype)


@with_kernel(half_on_gpu, "ops.passes_kernels")
def gated_product(gate: Tensor, up: Tensor, kind: Kind) -> Tensor:
    """(N, m) -> (N, m); rows may lie apart."""
    return activation(wide(gate), kind).to(gate.dtype) * up


@with_kernel(half_on_gpu, "ops.passes_kernels")
def gated_backward(d_out: Tensor, gate: Tensor, up: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (N, m) each."""
    g, d = wide(gate), wide(d_out)
    active = activation(g, kind)
    if kind == "silu":
        sigmoid = torch.sigmoid(g)
        slope = sigmoid + active * (1 - sigmoid)
    elif kind == "gelu":
        below = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        slope = below + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    else:
        turn = math.sqrt(2 / math.pi)
        tanh = torch.tanh(turn * (g + 0.044715 * g**3))
        slope = 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh * tanh) * turn * (1 + 3 * 0.044715 * g * g)
    return (d * wide(up) * slope).to(gate.dtype), (d * active).to(up.dtype)


def _rounding(x: Tensor, weight: Tensor) -> torch.dtype:
    return x.dtype if weight.dtype == x.dtype else wide(x).dtype


class _Layout:
    """The rows of a tensor in the order in which they lie in memory: heads may have changed places with tokens."""

    def __init__(self, x: Tensor) -> None:
        strides = x.stride()
        self._order = [*sorted(range(x.dim() - 1), key=lambda place: -strides[place]), x.dim() - 1]
        self._back = [self._order.index(place) for place in range(x.dim())]
        self._shape = [x.shape[place] for place in self._order]

    def rows(self, x: Tensor) -> Tensor:
        """(N, d); a copy only where x is not laid out like the tensor that the layout is of."""
        return x.permute(self._order).reshape(-1, x.shape[-1])

    def whole(self, rows: Tensor) -> Tensor:
        """(N, d), contiguous, in the shape and the layout of the tensor."""
        return rows.view(self._shape).permute(self._back)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        if x.is_meta:  # where bytes are counted, and the formula's own would be too
            return torch.empty_like(x)
        layout = _Layout(x)
        return layout.whole(norm(layout.rows(x), weight, eps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if x.is_meta:
            return torch.empty_like(d_out), None, None
        layout = _Layout(x)
        return layout.whole(norm_backward(layout.rows(d_out), layout.rows(x), weight, ctx.eps)), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: Kind) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        if gate.is_meta:
            return torch.empty_like(gate, memory_format=torch.contiguous_format)
        width = gate.shape[-1]
        return gated_product(gate.reshape(-1, width), up.reshape(-1, width), kind).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if gate.is_meta:
            return torch.empty_like(d_out), torch.empty_like(d_out), None
        rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (d_out, gate, up)]
        d_gate, d_up = gated_backward(rows[0], rows[1], rows[2], ctx.kind)
        return d_gate.view(gate.shape), d_up.view(up.shape), None
