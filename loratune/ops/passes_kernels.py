# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `ops.passes`, for bfloat16 and float16 on a GPU; imported only where Triton is installed.

A program takes several rows where they are short, as those of a norm of each head are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.passes import KINDS, Kind

_ELEMENTS = 4096
"""That a program takes of short rows."""
_COLUMNS = 2048
"""That a program takes of a row of activations."""


@triton.jit
def _norm(x_ptr, weight_ptr, out_ptr, rows, d, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, inside = row[:, None] * d + column[None, :], (row < rows)[:, None] & (column < d)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < d, other=0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / d + eps)
    unit = (x * inverse[:, None]).to(weight.dtype).to(tl.float32)
    tl.store(out_ptr + at, (unit * weight.to(tl.float32)[None, :]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    d_out_ptr, x_ptr, weight_ptr, d_x_ptr, rows, d, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, inside = row[:, None] * d + column[None, :], (row < rows)[:, None] & (column < d)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    d_unit = tl.load(d_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    d_unit *= tl.load(weight_ptr + column, mask=column < d, other=0.0).to(tl.float32)[None, :]
    inverse = tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
    unit = x * inverse
    d_x = inverse * (d_unit - unit * (tl.sum(d_unit * unit, 1) / d)[:, None])
    tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)


def _sizes(rows: int, d: int) -> tuple[tuple[int], dict[str, int]]:
    block = triton.next_power_of_2(d)
    each = max(1, min(_ELEMENTS // block, triton.next_power_of_2(rows)))
    warps = 4 if block * each <= 4096 else 8 if block * each <= 8192 else 16
    return (triton.cdiv(rows, each),), {"ROWS": each, "BLOCK": block, "num_warps": warps}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `ops.passes.norm`."""
    x = x.contiguous()
    grid, sizes = _sizes(*x.shape)
    out = torch.empty_like(x)
    _norm[grid](x, weight, out, *x.shape, eps, **sizes)
    return out


def norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `ops.passes.norm_backward`."""
    d_out, x = d_out.contiguous(), x.contiguous()
    grid, sizes = _sizes(*x.shape)
    d_x = torch.empty_like(x)
    _norm_backward[grid](d_out, x, weight, d_x, *x.shape, eps, **sizes)
    return d_x


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """The activation of x and its slope, float32."""
    if KIND == 0:
        sigmoid = tl.sigmoid(x)
        active = x * sigmoid
        slope = sigmoid + active * (1 - sigmoid)
    elif KIND == 1:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        active = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        turn: tl.constexpr = 0.7978845608028654
        tanh = 2 * tl.sigmoid(2 * turn * (x + 0.044715 * x * x * x)) - 1
        active = 0.5 * x * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * turn * (1 + 0.134145 * x * x)
    return active, slope


@triton.jit
def _gated(
    gate_ptr, up_ptr, out_ptr, width, gate_row, up_row, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    active, _ = _activated(gate, KIND)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * width + column, (active.to(kind).to(tl.float32) * up).to(kind), mask=inside)


@triton.jit
def _gated_backward(
    d_out_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, width, d_out_row, gate_row, up_row,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    d_out = tl.load(d_out_ptr + row * d_out_row + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    active, slope = _activated(gate, KIND)
    kind = d_gate_ptr.dtype.element_ty
    tl.store(d_gate_ptr + row * width + column, (d_out * up * slope).to(kind), mask=inside)
    tl.store(d_up_ptr + row * width + column, (d_out * active).to(kind), mask=inside)


def gated_product(gate: Tensor, up: Tensor, kind: Kind) -> Tensor:
    """As `ops.passes.gated_product`."""
    gate, up = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gated[(gate.shape[0], triton.cdiv(gate.shape[1], _COLUMNS))](
        gate, up, out, gate.shape[1], gate.stride(0), up.stride(0), KIND=KINDS.index(kind), BLOCK=_COLUMNS
    )
    return out


def gated_backward(d_out: Tensor, gate: Tensor, up: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """As `ops.passes.gated_backward`."""
    d_out, gate, up = _rows(d_out), _rows(gate), _rows(up)
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _gated_backward[(gate.shape[0], triton.cdiv(gate.shape[1], _COLUMNS))](
        d_out, gate, up, d_gate, d_up, gate.shape[1], d_out.stride(0), gate.stride(0), up.stride(0),
        KIND=KINDS.index(kind), BLOCK=_COLUMNS,
    )  # fmt: skip
    return d_gate, d_up


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
