# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the gated activations in `ops.gates`. A program takes one row; memory bandwidth is the bound."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.activation_kernels import _activated
from loratune.ops.dispatch import unit_stride
from loratune.ops.gates import GateFormula
from loratune.ops.layer import ACTIVATIONS


@triton.jit
def _halves(row_ptr, width, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of a row of 2 width elements, float32."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)
        pairs = tl.load(row_ptr + both, mask=both < 2 * width, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)
        gate = tl.load(row_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        up = tl.load(row_ptr + width + column, mask=column < width, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _inputs(
    hidden_ptr, bias_ptr, experts_ptr, row, width, hidden_row,
    INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gate and up of a row, with the bias of its expert."""
    gate, up = _halves(hidden_ptr + row * hidden_row, width, INTERLEAVED, BLOCK)
    if BIAS:
        expert = tl.load(experts_ptr + row).to(tl.int64)
        more_gate, more_up = _halves(bias_ptr + expert * 2 * width, width, INTERLEAVED, BLOCK)
        gate, up = gate + more_gate, up + more_up
    return gate, up


@triton.jit
def _limited(gate, up, limit, shift, LIMITED: tl.constexpr):
    """The gate below its limit and the factor of the activation; not-a-number stays."""
    if LIMITED:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up + shift


@triton.jit
def _gated_rows(
    hidden_ptr, bias_ptr, experts_ptr, out_ptr, width, hidden_row, alpha, limit, shift,
    KIND: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The formula of one row; moves 2 bytes for each element of hidden and out."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gate, up = _inputs(hidden_ptr, bias_ptr, experts_ptr, row, width, hidden_row, INTERLEAVED, BIAS, BLOCK)
    gate, up = _limited(gate, up, limit, shift, LIMITED)
    active, _ = _activated(gate * alpha, KIND)
    out = active / alpha * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _gated_rows_backward(
    hidden_ptr, bias_ptr, experts_ptr, d_active_ptr, factors_ptr, d_hidden_ptr, d_factors_ptr, active_ptr,
    width, hidden_row, d_row, alpha, limit, shift,
    KIND: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, LIMITED: tl.constexpr, ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one row of hidden and of its factor, and the result again if ACTIVE."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    kind = d_hidden_ptr.dtype.element_ty
    inside = column < width
    gate, up = _inputs(hidden_ptr, bias_ptr, experts_ptr, row, width, hidden_row, INTERLEAVED, BIAS, BLOCK)
    below, times = _limited(gate, up, limit, shift, LIMITED)
    active, slope = _activated(below * alpha, KIND)
    active = active / alpha
    out = (active * times).to(kind)
    d = tl.load(d_active_ptr + row * d_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_factors_ptr + row, tl.sum(tl.where(inside, d * out.to(tl.float32), 0.0), 0))
    if ACTIVE:
        tl.store(active_ptr + row * width + column, out, mask=inside)
    factor = tl.load(factors_ptr + row).to(tl.float32)
    d_gate, d_up = d * times * slope * factor, d * active * factor
    if LIMITED:
        d_gate = tl.where(gate > limit, 0.0, d_gate)
        d_up = tl.where(tl.abs(up) > limit, 0.0, d_up)
    d_hidden_ptr += row * 2 * width
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)
        tl.store(d_hidden_ptr + both, tl.interleave(d_gate, d_up).to(kind), mask=both < 2 * width)
    else:
        tl.store(d_hidden_ptr + column, d_gate.to(kind), mask=inside)
        tl.store(d_hidden_ptr + width + column, d_up.to(kind), mask=inside)


def _constants(formula: GateFormula, bias: Tensor | None, width: int) -> dict[str, object]:
    block = triton.next_power_of_2(max(16, width))
    return {
        "KIND": ACTIVATIONS.index(formula.kind), "INTERLEAVED": formula.interleaved, "BIAS": bias is not None,
        "LIMITED": formula.limit is not None, "BLOCK": block, "num_warps": min(16, max(4, block // 512)),
    }  # fmt: skip


def gated_rows(hidden: Tensor, formula: GateFormula, bias: Tensor | None, experts: Tensor) -> Tensor:
    """See `ops.gates.gated_rows`."""
    hidden, (rows, width) = unit_stride(hidden), (hidden.shape[0], hidden.shape[1] // 2)
    out = hidden.new_empty(rows, width)
    _gated_rows[(rows,)](
        hidden, None if bias is None else bias.contiguous(), experts, out, width, hidden.stride(0),
        formula.alpha, formula.limit or 0.0, formula.shift, **_constants(formula, bias, width),
    )  # fmt: skip
    return out


def gated_rows_backward(
    hidden: Tensor,
    formula: GateFormula,
    bias: Tensor | None,
    experts: Tensor,
    d_active: Tensor,
    factors: Tensor,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ops.gates.gated_rows_backward`."""
    hidden, d_active, factors = unit_stride(hidden), unit_stride(d_active), factors.contiguous()
    (rows, width), d_factors = d_active.shape, hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    d_hidden = hidden.new_empty(rows, 2 * width)
    _gated_rows_backward[(rows,)](
        hidden, None if bias is None else bias.contiguous(), experts, d_active, factors, d_hidden, d_factors,
        d_hidden if active is None else active, width, hidden.stride(0), d_active.stride(0),
        formula.alpha, formula.limit or 0.0, formula.shift, ACTIVE=active is not None,
        **_constants(formula, bias, width),
    )  # fmt: skip
    return d_hidden, d_factors
