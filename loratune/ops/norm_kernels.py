# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the norms in `ops.layer`, for bfloat16 and float16 on a GPU.

Each twin is one launch that reads its inputs once and writes its outputs once, so the memory bandwidth is its bound.
Sums are in float32. Features that a layer does not use are compiled away: they are constants of the kernel.
torch.compile makes the same norms, but costs ten seconds at the start of a run
(docs/lab/2026-11-24-single-adapter.md).

Arguments are those of the references, and tests compare the two in Triton's interpreter on a CPU. This module is
imported on GPUs only, because Triton is not installed elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.dispatch import unit_stride
from loratune.ops.layer import IDENTITY, NormSpec
from loratune.ops.measure import Measure
from loratune.ops.measure_kernels import measure_arguments, scaled, store_statistics, warps

_KINDS = ("none", "rms", "layer")
_LAYER = tl.constexpr(2)
_WEIGHT, _BIAS, _OFFSET, _ROUND = tl.constexpr(4), tl.constexpr(8), tl.constexpr(16), tl.constexpr(32)
"""A norm's form is a constant of the kernel: its kind plus these flags."""
_SHORT, _ELEMENTS = 512, 4096
"""Elements of the longest row that shares a program with other rows, such as a head; elements of such a program."""


def form_of(spec: NormSpec) -> int:
    """Kind and flags of a norm as one number, which is a constant of the kernels."""
    flags = (
        spec.weight is not None,
        spec.bias is not None,
        spec.offset != 0,
        spec.kind == "rms" and spec.round_first,
    )
    return _KINDS.index(spec.kind) + sum(4 << i for i, flag in enumerate(flags) if flag)


@triton.jit
def _tile(rows, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column indices of this program's tile, and a mask: (BLOCK,), or (ROWS, BLOCK) for several rows."""
    if ROWS == 1:
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        inside = column < d
    else:
        row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < d)
    return row, column, inside


@triton.jit
def _mean(x, d, ROWS: tl.constexpr):
    """Mean of each row of a tile that is zero outside the mask."""
    if ROWS == 1:
        mean = tl.sum(x) / d
    else:
        mean = (tl.sum(x, 1) / d)[:, None]
    return mean


@triton.jit
def _unit(x, inside, d, eps, FORM: tl.constexpr, ROWS: tl.constexpr):
    """Rows divided by their root mean square, centred first in a LayerNorm, and the factor 1 / rms."""
    if FORM & 3 == _LAYER:
        x = tl.where(inside, x - _mean(x, d, ROWS), 0.0)
    inverse = tl.rsqrt(_mean(x * x, d, ROWS) + eps)
    return x * inverse, inverse


@triton.jit
def load_weight(weight_ptr, at, mask, offset, FORM: tl.constexpr):
    """Weight of a norm plus its offset, float32; 1 without a weight."""
    if _WEIGHT & FORM:
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        if _OFFSET & FORM:
            weight = weight.to(tl.float32) + offset
            if _ROUND & FORM:
                weight = weight.to(weight_ptr.dtype.element_ty)
        weight = weight.to(tl.float32)
    else:
        weight = 1.0
    return weight


@triton.jit
def weighted(unit, weight, kind: tl.constexpr, FORM: tl.constexpr):
    """Unit rows times the weight, float32; rounded to dtype `kind` before if the form says so."""
    if _ROUND & FORM:
        unit = unit.to(kind).to(tl.float32)
    if _WEIGHT & FORM:
        unit *= weight
    return unit


@triton.jit
def _biased(x, bias_ptr, column, d, FORM: tl.constexpr):
    if _BIAS & FORM:
        x += tl.load(bias_ptr + column, mask=column < d, other=0.0).to(tl.float32)
    return x


@triton.jit
def _norm(
    x_ptr, y_ptr, total_ptr, out_ptr, weight_ptr, bias_ptr, post_weight_ptr, post_bias_ptr,
    rows, d, pad, eps, offset, post_eps, post_offset, scale,
    FORM: tl.constexpr, POST: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, OUT: tl.constexpr,
    MEASURE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Residual sum and norm: total = x + scale * norm(y; POST), out = norm(total; FORM).

    A program takes one row of d elements, or ROWS short ones. Moves 2 d bytes for each of x, y, total and out that
    is used.
    """
    row, column, inside = _tile(rows, d, ROWS, BLOCK)
    at = row * d + column
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if POST > 0:
            y, _ = _unit(y, inside, d, post_eps, POST, ROWS)
            post_weight = load_weight(post_weight_ptr, column, column < d, post_offset, POST)
            y = _biased(weighted(y, post_weight, kind, POST), post_bias_ptr, column, d, POST)
            y = y.to(kind).to(tl.float32)
        if SCALE:
            y = (y * scale).to(kind).to(tl.float32)
        total = (x + y).to(kind)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    if OUT:
        if FORM > 0:
            x, _ = _unit(x, inside, d, eps, FORM, ROWS)
            weight = load_weight(weight_ptr, column, column < d, offset, FORM)
            x = _biased(weighted(x, weight, kind, FORM), bias_ptr, column, d, FORM)
        out = x.to(kind)
        out_ptr += row * (d + pad)
        tl.store(out_ptr + column, out, mask=inside)
        if MEASURE > 0:
            value = scaled(out, out_ptr, column, inside, False)
            store_statistics(out_ptr + d, tl.max(tl.abs(value)), tl.sum(value * value), 0, 1)


def _launch_norm(
    x: Tensor,
    y: Tensor | None,
    post: NormSpec | None,
    spec: NormSpec | None,
    pad: int,
    measure: Measure | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The sum x + scale * norm(y; post), or x if y is None, and its norm.

    Without a `spec`, or with an identity that adds no columns, both results are the sum.
    """
    rows, d = x.shape
    x = x.contiguous()
    y, total = (x, x) if y is None else (y.contiguous(), torch.empty_like(x))
    written = spec is not None and not spec.is_identity(pad, measure)
    out = x.new_empty(rows, d + pad) if written else total
    spec, before = spec or IDENTITY, post or IDENTITY
    grid, sizes = _tiles(rows, d, measure)
    _norm[grid](
        x, y, total, out, *_weights(spec, x), *_weights(before, x), rows, d, pad, spec.eps, spec.offset, before.eps,
        before.offset, scale, FORM=form_of(spec) if written else 0, POST=form_of(before), ADD=total is not x,
        SCALE=scale != 1.0, OUT=written, MEASURE=measure_arguments(measure, x)[1] if written else 0, **sizes,
    )  # fmt: skip
    return total, out


def _weights(spec: NormSpec, unused: Tensor) -> tuple[Tensor, Tensor]:
    return unused if spec.weight is None else spec.weight, unused if spec.bias is None else spec.bias


def _tiles(rows: int, d: int, measure: Measure | None) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes of programs. A program takes one row, or several short ones that are not measured."""
    block = triton.next_power_of_2(d)
    if block > _SHORT or measure is not None:
        return (rows,), {"ROWS": 1, "BLOCK": block, "num_warps": warps(block)}
    each = min(_ELEMENTS // block, triton.next_power_of_2(rows))
    return (triton.cdiv(rows, each),), {"ROWS": each, "BLOCK": block, "num_warps": 4}


def norm(x: Tensor, spec: NormSpec, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """As `ops.layer.norm`."""
    return x if spec.is_identity(pad, measure) else _launch_norm(x, None, None, spec, pad, measure, 1.0)[1]


def add_norm(
    x: Tensor, y: Tensor, spec: NormSpec, pad: int = 0, measure: Measure | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.add_norm`."""
    return _launch_norm(x, y, None, spec, pad, measure, scale)


def post_norm_add(x: Tensor, y: Tensor, post: NormSpec, scale: float = 1.0) -> Tensor:
    """As `ops.layer.post_norm_add`."""
    return _launch_norm(x, y, post, None, 0, None, scale)[0]


def post_norm_add_norm(
    x: Tensor,
    y: Tensor,
    post: NormSpec,
    spec: NormSpec,
    pad: int = 0,
    measure: Measure | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.post_norm_add_norm`."""
    return _launch_norm(x, y, post, spec, pad, measure, scale)


@triton.jit
def _norm_backward(
    d_out_ptr, d_residual_ptr, x_ptr, weight_ptr, bias_ptr, d_x_ptr, out_ptr, scale_ptr,
    rows, d, out_row, residual_row, pad, eps, offset, scale,
    FORM: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, OUT: tl.constexpr, MEASURE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a norm's argument, plus d_residual, and the norm again.

    A program takes one row of d elements, or ROWS short ones. Moves 2 d bytes for each of d_out, d_residual, x, d_x
    and out that is used.
    """
    row, column, inside = _tile(rows, d, ROWS, BLOCK)
    at = row * d + column
    kind = d_x_ptr.dtype.element_ty
    d_x = tl.load(d_out_ptr + row * out_row + column, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        d_x *= scale
    if RESIDUAL:  # loaded before the sums, so that it arrives while they run
        residual = tl.load(d_residual_ptr + row * residual_row + column, mask=inside, other=0.0).to(tl.float32)
    if FORM > 0:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = load_weight(weight_ptr, column, column < d, offset, FORM)
        if _WEIGHT & FORM:
            d_x *= weight
        unit, inverse = _unit(x, inside, d, eps, FORM, ROWS)
        if FORM & 3 == _LAYER:
            d_x -= _mean(d_x, d, ROWS)
        d_x = inverse * (d_x - unit * _mean(d_x * unit, d, ROWS))
    if RESIDUAL:
        d_x += residual
    d_x = d_x.to(kind)
    d_x_ptr += row * (d + pad)
    tl.store(d_x_ptr + column, d_x, mask=inside)
    if MEASURE > 0:
        value = scaled(d_x, scale_ptr, column, inside, MEASURE == 2)
        store_statistics(d_x_ptr + d, tl.max(tl.abs(value)), tl.sum(value * value), 0, 1)
    if OUT:
        out = _biased(weighted(unit, weight, kind, FORM), bias_ptr, column, d, FORM)
        tl.store(out_ptr + at, out.to(kind), mask=inside)


def _launch_norm_backward(
    d_out: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    spec: NormSpec,
    scale: float,
    pad: int,
    measure: Measure | None,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and norm(x) computed again. Without a residual gradient the second result is x, unused."""
    rows, d = d_out.shape
    d_out, x = unit_stride(d_out), x if spec.kind == "none" else x.contiguous()  # an identity does not read x
    residual = d_out if d_residual is None else unit_stride(d_residual)
    written = d_residual is not None and spec.kind != "none"
    d_x, out = d_out.new_empty(rows, d + pad), torch.empty_like(x) if written else x
    column_scale, kind = measure_arguments(measure, x)
    grid, sizes = _tiles(rows, d, measure)
    _norm_backward[grid](
        d_out, residual, x, *_weights(spec, x), d_x, out, column_scale, rows, d, d_out.stride(0), residual.stride(0),
        pad, spec.eps, spec.offset, scale, FORM=form_of(spec), RESIDUAL=d_residual is not None, SCALE=scale != 1.0,
        OUT=written, MEASURE=kind, **sizes,
    )  # fmt: skip
    return d_x, out


def norm_backward(
    d_out: Tensor, d_residual: Tensor, x: Tensor, spec: NormSpec, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.layer.norm_backward`."""
    return _launch_norm_backward(d_out, d_residual, x, spec, 1.0, pad, measure)


def post_norm_backward(
    d_h: Tensor, y: Tensor, post: NormSpec, scale: float = 1.0, pad: int = 0, measure: Measure | None = None
) -> Tensor:
    """As `ops.layer.post_norm_backward`."""
    return _launch_norm_backward(d_h, None, y, post, scale, pad, measure)[0]
