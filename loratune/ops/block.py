"""A decoder layer with LoRA as two autograd nodes, one before attention and one behind it.

    before:  x -> norm -> [q k v] -> (norm of each head) -> rotation
    behind:  x + o(attention) = h,   h + down(swiglu([gate up](norm(h))))

Written as modules, one such layer is about a hundred autograd nodes. What is gained here: projections that read the
same input are one product, W, A and B of all of them side by side; the gradient of that input gathers in one buffer;
norms and activations are recomputed in the pass that computes their gradient instead of being kept; and there is
almost nothing left for the host to do. What is kept for the backward is the residual stream, q k v, attention's
output, its sum with the residual stream, and gate and up.

The gradients are written by hand, and the modules that they stand in for are their reference (tests/ops/test_block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.ops import layer
from loratune.ops.projection import Projection


@dataclass(frozen=True)
class Heads:
    """How the stacked output of the first projections divides into heads, and what happens to them."""

    query: int
    key_value: int
    dim: int
    norm: Tensor | None
    """(query + key_value, head_dim), weights of the norms of query and key heads, or None."""
    norm_eps: float


@dataclass(frozen=True)
class Before:
    """What is fixed about the node before attention."""

    projection: Projection
    norm: Tensor
    eps: float
    heads: Heads


@dataclass(frozen=True)
class Behind:
    """What is fixed about the node behind attention."""

    output: Projection
    gate_up: Projection
    down: Projection
    norm: Tensor
    eps: float


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, parts: Before, adapters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual stream to query, key and value.

    Args:
        x: (T, d).
        cos, sin: (T, head_dim) of the positions.
        adapters: the masters, A and B of each member in order; they receive the gradients.
    Returns: x itself, to be carried past attention, and q, k, v as (T, heads, head_dim).
    """
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _Before.apply(x, cos, sin, parts, *adapters)  # type: ignore[no-untyped-call]
    return out


def behind_attention(x: Tensor, attended: Tensor, parts: Behind, adapters: Sequence[Tensor]) -> Tensor:
    """Residual stream (T, d) and attention's output (T, heads * head_dim) to the next residual stream (T, d)."""
    out: Tensor = _Behind.apply(x, attended, parts, *adapters)  # type: ignore[no-untyped-call]
    return out


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, parts: Before, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        heads = parts.heads
        y, inner = parts.projection.forward(layer.rms_norm(x, parts.norm, parts.eps))
        y = y.view(x.shape[0], -1, heads.dim)
        turned = layer.rotate(y, cos, sin, heads.query + heads.key_value, heads.norm, heads.norm_eps)
        ctx.save_for_backward(x, cos, sin, inner, y if heads.norm is not None else None)
        ctx.parts = parts
        query, key, value = turned.split([heads.query, heads.key_value, heads.key_value], 1)
        return x.view_as(x), query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> tuple[Any, ...]:
        x, cos, sin, inner, unturned = ctx.saved_tensors
        parts: Before = ctx.parts
        heads = parts.heads
        dy = layer.rotate_backward(d_query, d_key, d_value, cos, sin, unturned, heads.norm, heads.norm_eps).flatten(1)
        d_inner = parts.projection.d_inner(dy)
        below: Tensor | None = None
        if ctx.needs_input_grad[0]:
            d_normed = parts.projection.d_input(dy, d_inner)
            below, normed = layer.rms_norm_backward(d_normed, d_x, x, parts.norm, parts.eps)
        else:
            normed = layer.rms_norm(x, parts.norm, parts.eps)
        return below, None, None, None, *parts.projection.d_adapters(dy, d_inner, normed, inner)


class _Behind(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, attended: Tensor, parts: Behind, *adapters: Tensor) -> Tensor:
        y, inner_o = parts.output.forward(attended)
        h, normed = layer.add_rms_norm(x, y, parts.norm, parts.eps)
        gate_up, inner_gu = parts.gate_up.forward(normed)
        out, inner_d = parts.down.forward(layer.swiglu(gate_up))
        ctx.save_for_backward(attended, h, gate_up, inner_o, inner_gu, inner_d)
        ctx.parts = parts
        return out.add_(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        attended, h, gate_up, inner_o, inner_gu, inner_d = ctx.saved_tensors
        parts: Behind = ctx.parts
        d_inner = parts.down.d_inner(dy)
        d_gate_up, active = layer.swiglu_backward(gate_up, parts.down.d_input(dy, d_inner))
        of_down = parts.down.d_adapters(dy, d_inner, active, inner_d)
        del active
        d_inner = parts.gate_up.d_inner(d_gate_up)
        d_h, normed = layer.rms_norm_backward(parts.gate_up.d_input(d_gate_up, d_inner), dy, h, parts.norm, parts.eps)
        of_gate_up = parts.gate_up.d_adapters(d_gate_up, d_inner, normed, inner_gu)
        del d_gate_up, normed
        d_inner = parts.output.d_inner(d_h)
        d_attended = parts.output.d_input(d_h, d_inner) if ctx.needs_input_grad[1] else None
        of_output = parts.output.d_adapters(d_h, d_inner, attended, inner_o)
        return d_h, d_attended, None, *of_output, *of_gate_up, *of_down
