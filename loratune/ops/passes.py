"""Norms and gated activations as autograd functions, for layers of any architecture that are not fused as a whole.

transformers writes each as five to ten operators, and autograd saves their intermediate results, in float32 for a
norm. Here each is one pass forward and one backward (`ops.layer`, the passes of fused layers), and only the arguments
are saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.ops import layer
from loratune.ops.layer import ActivationKind, NormSpec
from loratune.ops.shape import own_shape


def norm(x: Tensor, spec: NormSpec) -> Tensor:
    """The norm over the last dimension of x, (..., d). The result has the memory layout of x."""
    out: Tensor = _Norm.apply(x, spec)  # type: ignore[no-untyped-call]
    return out


def gated(gate: Tensor, up: Tensor, kind: ActivationKind) -> Tensor:
    """activation(gate) * up, (..., m) each."""
    out: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return out


class MemoryOrder:
    """The order of a tensor's dimensions in memory, where heads and tokens may be swapped."""

    def __init__(self, x: Tensor) -> None:
        strides = x.stride()
        self._order = [*sorted(range(x.dim() - 1), key=lambda dim: -strides[dim]), x.dim() - 1]
        self._back = [self._order.index(dim) for dim in range(x.dim())]
        self._shape = [x.shape[dim] for dim in self._order]

    def rows(self, x: Tensor) -> Tensor:
        """(..., d) -> (N, d), rows in this order; a copy only if x has another order."""
        return x.permute(self._order).reshape(-1, x.shape[-1])

    def restored(self, rows: Tensor) -> Tensor:
        """(N, d), contiguous -> (..., d), a view in the original order of dimensions."""
        return rows.view(self._shape).permute(self._back)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: NormSpec) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spec = spec
        if x.is_meta:  # this device counts memory, and the temporaries of the reference must not count
            return torch.empty_like(x)
        order = MemoryOrder(x)
        return own_shape(order.restored(layer.norm(order.rows(x), spec)), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if x.is_meta:
            return torch.empty_like(d_out), None
        order = MemoryOrder(x)
        return order.restored(layer.post_norm_backward(order.rows(d_out), order.rows(x), ctx.spec)), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: ActivationKind) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        if gate.is_meta:
            return torch.empty_like(gate, memory_format=torch.contiguous_format)
        width = gate.shape[-1]
        rows = layer.gated_product(gate.reshape(-1, width), up.reshape(-1, width), kind)
        return own_shape(rows, gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if gate.is_meta:
            return torch.empty_like(d_out), torch.empty_like(d_out), None
        rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (d_out, gate, up)]
        d_gate, d_up = layer.gated_product_backward(rows[0], rows[1], rows[2], ctx.kind)
        return d_gate.view(gate.shape), d_up.view(up.shape), None
