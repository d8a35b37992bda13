# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the passes in `ops.layer` and of the softmax in `ops.logprobs`, for bfloat16 and float16 on a GPU.

Each is one read of its inputs and one write of its outputs; sums are in float32. torch.compile was tried first: it
does the norms as well, but splits what writes to two halves of one buffer (gate and up, rotated heads and values)
into several passes, and costs ten seconds at the start of a run (benchmarks/NOTES.md). Shapes and meaning of the
arguments are those of the reference, which is also what they are tested against, in Triton's interpreter on a CPU.
This module is imported only where there is a GPU, since Triton is not installed elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.measure import PIECES, Measure
from loratune.ops.measure_kernels import leave, scaled

_PLAIN, _SCALED = 1, 2


def _asked(measure: Measure | None, unused: Tensor) -> tuple[Tensor, int]:
    """What the kernels are told of a measure: its scale, or any tensor, and the kind."""
    if measure is None or measure.scale is None:
        return unused, 0 if measure is None else _PLAIN
    return measure.scale, _SCALED


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 4096 else 16


@triton.jit
def _rms_norm(
    x_ptr, y_ptr, weight_ptr, total_ptr, out_ptr, d, pad, eps,
    ADD: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * d
    column = tl.arange(0, BLOCK)
    inside = column < d
    x = tl.load(x_ptr + at + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + at + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at + column, x, mask=inside)
        x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x) / d + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    unit = (x * inverse).to(out_ptr.dtype.element_ty).to(tl.float32)
    out_ptr += row * (d + pad)
    out = (unit * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, out, mask=inside)
    if MEASURE > 0:
        value = scaled(out, out_ptr, column, inside, False)
        leave(out_ptr + d, tl.max(tl.abs(value)), tl.sum(value * value), 0, 1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """As `ops.layer.rms_norm`."""
    rows, d = x.shape
    x, out = x.contiguous(), x.new_empty(rows, d + pad)
    block = triton.next_power_of_2(d)
    _rms_norm[(rows,)](
        x, x, weight, out, out, d, pad, eps, ADD=False, MEASURE=_asked(measure, x)[1], BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.add_rms_norm`."""
    rows, d = x.shape
    x, y = x.contiguous(), y.contiguous()
    total, out = torch.empty_like(x), x.new_empty(rows, d + pad)
    block = triton.next_power_of_2(d)
    _rms_norm[(rows,)](
        x, y, weight, total, out, d, pad, eps, ADD=True, MEASURE=_asked(measure, x)[1], BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return total, out


@triton.jit
def _rms_norm_backward(
    d_out_ptr, d_residual_ptr, x_ptr, weight_ptr, d_x_ptr, out_ptr, scale_ptr, d, residual_row, pad, eps,
    MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * d
    column = tl.arange(0, BLOCK)
    inside = column < d
    x = tl.load(x_ptr + at + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    d_unit = tl.load(d_out_ptr + at + column, mask=inside, other=0.0).to(tl.float32) * weight
    d_residual = tl.load(d_residual_ptr + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x) / d + eps)
    unit = x * inverse
    d_x = (inverse * (d_unit - unit * (tl.sum(d_unit * unit) / d)) + d_residual).to(d_x_ptr.dtype.element_ty)
    d_x_ptr += row * (d + pad)
    tl.store(d_x_ptr + column, d_x, mask=inside)
    if MEASURE > 0:
        value = scaled(d_x, scale_ptr, column, inside, MEASURE == 2)
        leave(d_x_ptr + d, tl.max(tl.abs(value)), tl.sum(value * value), 0, 1)
    tl.store(out_ptr + at + column, unit.to(out_ptr.dtype.element_ty).to(tl.float32) * weight, mask=inside)


def rms_norm_backward(
    d_out: Tensor,
    d_residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    pad: int = 0,
    measure: Measure | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.rms_norm_backward`."""
    rows, d = x.shape
    d_out, x = d_out.contiguous(), x.contiguous()
    d_residual = d_residual if d_residual.stride(1) == 1 else d_residual.contiguous()
    d_x, out = x.new_empty(rows, d + pad), torch.empty_like(x)
    block = triton.next_power_of_2(d)
    scale, kind = _asked(measure, x)
    _rms_norm_backward[(rows,)](
        d_out, d_residual, x, weight, d_x, out, scale, d, d_residual.stride(0), pad, eps, MEASURE=kind, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return d_x, out


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, width, pad, MEASURE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    out_ptr += row * (width + pad)
    out = (silu * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, out, mask=inside)
    if MEASURE > 0:
        value = scaled(out, out_ptr, column, inside, False)
        leave(out_ptr + width, tl.max(tl.abs(value)), tl.sum(value * value), tl.program_id(1), tl.num_programs(1))


@triton.jit
def _swiglu_backward(
    gate_up_ptr, d_out_ptr, d_gate_up_ptr, out_ptr, scale_ptr, width, pad,
    MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(out_ptr + row * width + column, silu.to(out_ptr.dtype.element_ty).to(tl.float32) * up, mask=inside)
    d_gate_up_ptr += row * (2 * width + pad)
    d_gate = (d_out * up * (sigmoid + silu * (1 - sigmoid))).to(d_gate_up_ptr.dtype.element_ty)
    d_up = (d_out * silu).to(d_gate_up_ptr.dtype.element_ty)
    tl.store(d_gate_up_ptr + column, d_gate, mask=inside)
    tl.store(d_gate_up_ptr + width + column, d_up, mask=inside)
    if MEASURE > 0:
        a = scaled(d_gate, scale_ptr, column, inside, MEASURE == 2)
        b = scaled(d_up, scale_ptr, width + column, inside, MEASURE == 2)
        largest, squares = tl.max(tl.maximum(tl.abs(a), tl.abs(b))), tl.sum(a * a + b * b)
        leave(d_gate_up_ptr + 2 * width, largest, squares, tl.program_id(1), tl.num_programs(1))


def _swiglu_block(width: int) -> int:
    """Columns that a program takes; `PIECES` of them suffice for a row."""
    return max(2048 if width <= 8192 else 4096, int(triton.next_power_of_2(triton.cdiv(width, PIECES))))


def swiglu(gate_up: Tensor, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """As `ops.layer.swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up, out = gate_up.contiguous(), gate_up.new_empty(rows, width + pad)
    block = _swiglu_block(width)
    _swiglu[(rows, triton.cdiv(width, block))](
        gate_up, out, width, pad, MEASURE=_asked(measure, out)[1], BLOCK=block, num_warps=_warps(block)
    )
    return out


def swiglu_backward(
    gate_up: Tensor, d_out: Tensor, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.swiglu_backward`."""
    rows, width = d_out.shape
    gate_up, d_out = gate_up.contiguous(), d_out.contiguous()
    d_gate_up, out = gate_up.new_empty(rows, 2 * width + pad), torch.empty_like(d_out)
    (scale, kind), block = _asked(measure, out), _swiglu_block(width)
    _swiglu_backward[(rows, triton.cdiv(width, block))](
        gate_up, d_out, d_gate_up, out, scale, width, pad, MEASURE=kind, BLOCK=block, num_warps=_warps(block)
    )
    return d_gate_up, out


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, heads, rotated, eps,
    NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, j = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, HALF)[None, :]
    inside = head < heads
    at = (token * heads + head) * 2 * HALF + j
    a0 = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b0 = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    a, b = a0, b0
    if NORM:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        normed = head < rotated
        weight_a = tl.load(weight_ptr + head * 2 * HALF + j, mask=normed, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + head * 2 * HALF + HALF + j, mask=normed, other=0.0).to(tl.float32)
        kind = out_ptr.dtype.element_ty
        a = ((a * inverse).to(kind).to(tl.float32) * weight_a).to(kind).to(tl.float32)
        b = ((b * inverse).to(kind).to(tl.float32) * weight_b).to(kind).to(tl.float32)
    angle = token * 2 * HALF + j
    cos_a, cos_b = tl.load(cos_ptr + angle).to(tl.float32), tl.load(cos_ptr + angle + HALF).to(tl.float32)
    sin_a, sin_b = tl.load(sin_ptr + angle).to(tl.float32), tl.load(sin_ptr + angle + HALF).to(tl.float32)
    tl.store(out_ptr + at, tl.where(head < rotated, a * cos_a - b * sin_a, a0), mask=inside)
    tl.store(out_ptr + at + HALF, tl.where(head < rotated, b * cos_b + a * sin_b, b0), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotated: int, weight: Tensor | None, eps: float) -> Tensor:
    """As `ops.layer.rotate`, for halves of a power of two; without a norm in place, where only what turns is read."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out, (tokens, heads, dim) = x if weight is None else torch.empty_like(x), x.shape
    block = max(1, 1024 // dim)
    _rotate[(tokens, triton.cdiv(rotated if weight is None else heads, block))](
        x, cos, sin, x if weight is None else weight, out, heads, rotated, eps,
        NORM=weight is not None, HEADS=block, HALF=dim // 2,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_backward(
    d_query_ptr, d_key_ptr, d_value_ptr, cos_ptr, sin_ptr, x_ptr, weight_ptr, out_ptr, scale_ptr,
    queries, keys, query_token, query_head, key_token, key_head, value_token, value_head, pad, eps,
    NORM: tl.constexpr, MEASURE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, j = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, HALF)[None, :]
    head = head.to(tl.int64)  # heads may lie a whole row apart
    rotated = queries + keys
    heads = rotated + keys
    inside = head < heads
    query_at = d_query_ptr + token * query_token + head * query_head + j
    key_at = d_key_ptr + token * key_token + (head - queries) * key_head + j
    value_at = d_value_ptr + token * value_token + (head - rotated) * value_head + j
    # One load of three places: three loads, each masked, would wait for one another.
    from_at = tl.where(head < queries, query_at, tl.where(head < rotated, key_at, value_at))
    a0 = tl.load(from_at, mask=inside, other=0.0).to(tl.float32)
    b0 = tl.load(from_at + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = token * 2 * HALF + j
    cos_a, cos_b = tl.load(cos_ptr + angle).to(tl.float32), tl.load(cos_ptr + angle + HALF).to(tl.float32)
    sin_a, sin_b = tl.load(sin_ptr + angle).to(tl.float32), tl.load(sin_ptr + angle + HALF).to(tl.float32)
    a, b = a0 * cos_a + b0 * sin_b, b0 * cos_b - a0 * sin_a
    at = (token * heads + head) * 2 * HALF + j
    if NORM:
        x_a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x_b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        normed = head < rotated
        weight_a = tl.load(weight_ptr + head * 2 * HALF + j, mask=normed, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + head * 2 * HALF + HALF + j, mask=normed, other=0.0).to(tl.float32)
        inverse = tl.rsqrt((tl.sum(x_a * x_a, 1) + tl.sum(x_b * x_b, 1)) / (2 * HALF) + eps)[:, None]
        x_a, x_b, a, b = x_a * inverse, x_b * inverse, a * weight_a, b * weight_b
        mean = ((tl.sum(a * x_a, 1) + tl.sum(b * x_b, 1)) / (2 * HALF))[:, None]
        a, b = inverse * (a - x_a * mean), inverse * (b - x_b * mean)
    out_ptr += token * (heads * 2 * HALF + pad)
    column = head * 2 * HALF + j
    a = tl.where(head < rotated, a, a0).to(out_ptr.dtype.element_ty)
    b = tl.where(head < rotated, b, b0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, a, mask=inside)
    tl.store(out_ptr + column + HALF, b, mask=inside)
    if MEASURE > 0:
        there = inside & (j < HALF)
        a = scaled(a, scale_ptr, column, there, MEASURE == 2)
        b = scaled(b, scale_ptr, column + HALF, there, MEASURE == 2)
        largest, squares = tl.max(tl.maximum(tl.abs(a), tl.abs(b))), tl.sum(a * a + b * b)
        leave(out_ptr + heads * 2 * HALF, largest, squares, tl.program_id(1), tl.num_programs(1))


def rotate_backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    eps: float,
    pad: int = 0,
    measure: Measure | None = None,
) -> Tensor:
    """As `ops.layer.rotate_backward`, for halves of a power of two."""
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (d_query, d_key, d_value)]
    strides = [stride for part in parts for stride in part.stride()[:2]]
    (tokens, queries, dim), keys = parts[0].shape, parts[1].shape[1]
    out = d_query.new_empty(tokens, (queries + 2 * keys) * dim + pad)
    scale, kind = _asked(measure, out)
    block = max(1, 2048 // dim)
    if kind:  # as many programs as leave a measure each
        block = max(block, triton.next_power_of_2(triton.cdiv(queries + 2 * keys, PIECES)))
    _rotate_backward[(tokens, triton.cdiv(queries + 2 * keys, block))](
        *parts, cos.contiguous(), sin.contiguous(), out if x is None else x, out if weight is None else weight, out,
        scale, queries, keys, *strides, pad, eps, NORM=weight is not None, MEASURE=kind, HEADS=block, HALF=dim // 2,
    )  # fmt: skip
    return out
