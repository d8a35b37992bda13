# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the activations in `ops.layer`, gated or not, for bfloat16 and float16 on a GPU.

Each is one launch that reads its inputs once and writes its outputs once; the memory bandwidth is its bound. A gate
and its factor may be halves of one tensor or two tensors: kernels take two pointers and two row strides.
torch.compile splits a pass that writes two halves of one buffer into several (docs/lab/2026-11-24-single-adapter.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.dispatch import unit_stride
from loratune.ops.layer import ACTIVATIONS, ActivationKind
from loratune.ops.measure import PIECES, Measure
from loratune.ops.measure_kernels import measure_arguments, scaled, store_statistics, warps


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """The activation of x and its derivative, float32."""
    if KIND == 0:
        sigmoid = tl.sigmoid(x)
        active = x * sigmoid
        slope = sigmoid + active * (1 - sigmoid)
    elif KIND == 1:
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        active = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        factor: tl.constexpr = 0.7978845608028654
        tanh = 2 * tl.sigmoid(2 * factor * (x + 0.044715 * x * x * x)) - 1
        active = 0.5 * x * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * factor * (1 + 0.134145 * x * x)
    return active, slope


@triton.jit
def _activation(
    x_ptr, up_ptr, out_ptr, width, x_row, up_row, pad,
    KIND: tl.constexpr, GATED: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """activation(x), times up if GATED. A program takes BLOCK columns of a row; moves 2 bytes for each element of x,
    up and out."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    active, _ = _activated(x, KIND)
    out = active.to(kind)
    if GATED:
        up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        out = (out.to(tl.float32) * up).to(kind)
    out_ptr += row * (width + pad)
    tl.store(out_ptr + column, out, mask=inside)
    if MEASURE > 0:
        value = scaled(out, out_ptr, column, inside, False)
        store_statistics(
            out_ptr + width, tl.max(tl.abs(value)), tl.sum(value * value), tl.program_id(1), tl.num_programs(1)
        )


@triton.jit
def _activation_backward(
    d_out_ptr, x_ptr, up_ptr, d_x_ptr, d_up_ptr, out_ptr, scale_ptr, width, out_row, x_row, up_row, d_row,
    KIND: tl.constexpr, GATED: tl.constexpr, OUT: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x, and of up if GATED, and the result of `_activation` again. A program takes BLOCK columns of a
    row; moves 2 bytes for each element of d_out, x, up, d_x, d_up and out."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    kind = d_x_ptr.dtype.element_ty
    d_out = tl.load(d_out_ptr + row * out_row + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    active, slope = _activated(x, KIND)
    out = active.to(kind)
    d_x_ptr += row * d_row
    if GATED:
        up = tl.load(up_ptr + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        out = (out.to(tl.float32) * up).to(kind)
        d_x = (d_out * up * slope).to(kind)
        d_up = (d_out * active).to(kind)
        tl.store(d_up_ptr + row * d_row + column, d_up, mask=inside)
    else:
        d_x = (d_out * slope).to(kind)
    tl.store(d_x_ptr + column, d_x, mask=inside)
    if OUT:
        tl.store(out_ptr + row * width + column, out, mask=inside)
    if MEASURE > 0:
        a = scaled(d_x, scale_ptr, column, inside, MEASURE == 2)
        largest, squares, columns = tl.abs(a), a * a, width
        if GATED:
            b = scaled(d_up, scale_ptr, width + column, inside, MEASURE == 2)
            largest, squares, columns = tl.maximum(largest, tl.abs(b)), squares + b * b, 2 * width
        store_statistics(d_x_ptr + columns, tl.max(largest), tl.sum(squares), tl.program_id(1), tl.num_programs(1))


def _columns(width: int) -> dict[str, int]:
    """Columns of one program and its warps. At most `PIECES` programs write a row, one measure each."""
    block = max(2048 if width <= 8192 else 4096, int(triton.next_power_of_2(triton.cdiv(width, PIECES))))
    return {"BLOCK": block, "num_warps": warps(block)}


def _launch_activation(
    x: Tensor, up: Tensor | None, kind: ActivationKind, pad: int, measure: Measure | None
) -> Tensor:
    (rows, width), sizes = x.shape, _columns(x.shape[1])
    out, up_rows = x.new_empty(rows, width + pad), x if up is None else up
    _activation[(rows, triton.cdiv(width, sizes["BLOCK"]))](
        x, up_rows, out, width, x.stride(0), up_rows.stride(0), pad, KIND=ACTIVATIONS.index(kind),
        GATED=up is not None, MEASURE=measure_arguments(measure, x)[1], **sizes,
    )  # fmt: skip
    return out


def _launch_activation_backward(
    d_out: Tensor,
    x: Tensor,
    up: Tensor | None,
    gradients: tuple[Tensor, Tensor],
    out: Tensor | None,
    kind: ActivationKind,
    measure: Measure | None,
) -> None:
    """Fills the gradients of x and up, which have one row stride, and `out`."""
    (rows, width), sizes, d_out = x.shape, _columns(x.shape[1]), unit_stride(d_out)
    (d_x, d_up), up_rows = gradients, x if up is None else up
    column_scale, measured = measure_arguments(measure, x)
    _activation_backward[(rows, triton.cdiv(width, sizes["BLOCK"]))](
        d_out, x, up_rows, d_x, d_up, d_x if out is None else out, column_scale, width, d_out.stride(0), x.stride(0),
        up_rows.stride(0), d_x.stride(0), KIND=ACTIVATIONS.index(kind), GATED=up is not None, OUT=out is not None,
        MEASURE=measured, **sizes,
    )  # fmt: skip


def gated(gate_up: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """As `ops.layer.gated`."""
    gate, up = unit_stride(gate_up).chunk(2, -1)
    return _launch_activation(gate, up, kind, pad, measure)


def gated_backward(
    gate_up: Tensor, d_out: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.gated_backward`."""
    gate, up = unit_stride(gate_up).chunk(2, -1)
    (rows, width), d_gate_up = gate.shape, gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] + pad)
    out = gate_up.new_empty(rows, width)
    parts = d_gate_up[:, :width], d_gate_up[:, width : 2 * width]
    _launch_activation_backward(d_out, gate, up, parts, out, kind, measure)
    return d_gate_up, out


def gated_product(gate: Tensor, up: Tensor, kind: ActivationKind) -> Tensor:
    """As `ops.layer.gated_product`."""
    return _launch_activation(unit_stride(gate), unit_stride(up), kind, 0, None)


def gated_product_backward(d_out: Tensor, gate: Tensor, up: Tensor, kind: ActivationKind) -> tuple[Tensor, Tensor]:
    """As `ops.layer.gated_product_backward`."""
    gate, up = unit_stride(gate), unit_stride(up)
    parts = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch_activation_backward(d_out, gate, up, parts, None, kind, None)
    return parts


def activation(x: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """As `ops.layer.activation`."""
    return _launch_activation(unit_stride(x), None, kind, pad, measure)


def activation_backward(
    x: Tensor, d_out: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.activation_backward`."""
    d_x, out = x.new_empty(x.shape[0], x.shape[1] + pad), x.new_empty(x.shape)
    _launch_activation_backward(d_out, unit_stride(x), None, (d_x, d_x), out, kind, measure)
    return d_x, out
