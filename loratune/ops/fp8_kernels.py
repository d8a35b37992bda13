# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `ops.fp8`: rows to 8 bits in one pass, the transpose of a matrix of bytes, and the small borders.

One program holds a whole row, so that x is read from memory once. To go through wide rows twice, two at a time and
the second time out of the cache, was slower (benchmarks/NOTES.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.fp8 import border_of

if TYPE_CHECKING:
    from loratune.ops.fp8 import Inner

_TILE = 128
_E4M3 = torch.float8_e4m3fn


@triton.jit
def _split_low(v, place, ranks, kind: tl.constexpr, SECOND: tl.constexpr):
    """[hi, lo, hi] of v, or [hi, hi, lo]; `place` is the column of each element in the border."""
    hi = v.to(kind)
    lo = (v - hi.to(tl.float32)).to(kind)
    group = place // ranks
    return tl.where(group == 1 + SECOND, lo.to(tl.float32), hi.to(tl.float32)).to(kind)


@triton.jit
def _quantise(
    x_ptr, columns_ptr, inner_ptr, factor_ptr, out_ptr, scale_ptr, width, stride, inner_stride, ranks, border,
    SCALED: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    kind = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(columns_ptr + column, mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x))
    out_ptr += row * (width + border)
    if BORDER > 1:
        place = tl.arange(0, BORDER)
        v = tl.load(inner_ptr + row * inner_stride + place % ranks, mask=place < 3 * ranks, other=0.0).to(tl.float32)
        v *= tl.load(factor_ptr)
        most = tl.maximum(most, tl.max(tl.abs(v)))
        scale = tl.maximum(most / 448.0, 1e-12)
        tl.store(out_ptr + width + place, _split_low(v / scale, place, ranks, kind, False), mask=place < border)
    else:
        scale = tl.maximum(most / 448.0, 1e-12)
    tl.store(out_ptr + column, (x / scale).to(kind), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantise_rows(x: Tensor, columns: Tensor | None, inner: Inner | None) -> tuple[Tensor, Tensor]:
    """As `ops.fp8.quantise_rows`: values and scales."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    ranks, border = 1, 0
    low, factor = x, x
    if inner is not None:
        low, factor = inner.values if inner.values.stride(1) == 1 else inner.values.contiguous(), inner.factor
        ranks = low.shape[1]
        border = border_of(ranks)
    out = torch.empty(rows, width + border, dtype=_E4M3, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantise[(rows,)](
        x, x if columns is None else columns, low, factor, out, scale, width, x.stride(0), low.stride(0), ranks,
        border, SCALED=columns is not None, BORDER=triton.next_power_of_2(border) if border else 1, BLOCK=block,
        num_warps=max(4, min(32, block // 1024)),
    )  # fmt: skip
    return out, scale


@triton.jit
def _peak(matrix_ptr, divisor_ptr, factor_ptr, n, ranks, step_n, step_r, DIVIDED: tl.constexpr, RANKS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANKS)
    inside = (row < n)[:, None] & (rank < ranks)[None, :]
    v = tl.load(matrix_ptr + row[:, None] * step_n + rank[None, :] * step_r, mask=inside, other=0.0).to(tl.float32)
    if DIVIDED:
        v = v / tl.load(divisor_ptr + row, mask=row < n, other=1.0)[:, None]
    tl.atomic_max(factor_ptr, tl.max(tl.abs(v)) / 448.0)


def factor_of(matrix: Tensor, divisor: Tensor | None, least: float) -> Tensor:
    """As `ops.fp8.factor_of`."""
    factor = torch.full((1,), least, dtype=torch.float32, device=matrix.device)
    n, ranks = matrix.shape
    _peak[(triton.cdiv(n, _TILE),)](
        matrix, matrix if divisor is None else divisor, factor, n, ranks, *matrix.stride(),
        DIVIDED=divisor is not None, RANKS=triton.next_power_of_2(ranks), BLOCK=_TILE,
    )  # fmt: skip
    return factor


@triton.jit
def _border(
    matrix_ptr, divisor_ptr, factor_ptr, out_ptr, n, ranks, border, step_n, step_r, out_step,
    DIVIDED: tl.constexpr, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, BORDER)
    kind = out_ptr.dtype.element_ty
    inside = (row < n)[:, None] & (place < 3 * ranks)[None, :]
    at = row[:, None] * step_n + (place % ranks)[None, :] * step_r
    v = tl.load(matrix_ptr + at, mask=inside, other=0.0).to(tl.float32) / tl.load(factor_ptr)
    if DIVIDED:
        v = v / tl.load(divisor_ptr + row, mask=row < n, other=1.0)[:, None]
    hi = v.to(kind)
    lo = (v - hi.to(tl.float32)).to(kind)
    part = tl.where((place // ranks == 2)[None, :], lo.to(tl.float32), hi.to(tl.float32)).to(kind)
    tl.store(
        out_ptr + row[:, None] * out_step + place[None, :], part, mask=(row < n)[:, None] & (place < border)[None, :]
    )


def lay_border(matrix: Tensor, divisor: Tensor | None, factor: Tensor, out: Tensor) -> None:
    """As `ops.fp8.lay_border`."""
    (n, ranks), border = matrix.shape, out.shape[1]
    _border[(triton.cdiv(n, 32),)](
        matrix, matrix if divisor is None else divisor, factor, out, n, ranks, border, *matrix.stride(),
        out.stride(0), DIVIDED=divisor is not None, BORDER=triton.next_power_of_2(border), BLOCK=32,
    )  # fmt: skip


@triton.jit
def _transpose(x_ptr, out_ptr, rows, width, x_step, out_step, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tile = tl.load(x_ptr + row[:, None] * x_step + column[None, :], mask=inside)
    tl.store(out_ptr + column[:, None] * out_step + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def transposed(values: Tensor, border: int) -> Tensor:
    """As `ops.fp8.transposed`."""
    rows, width = values.shape
    out = torch.empty(width, rows + border, dtype=values.dtype, device=values.device)
    _transpose[(triton.cdiv(rows, _TILE), triton.cdiv(width, _TILE))](
        values.view(torch.uint8), out.view(torch.uint8), rows, width, values.stride(0), out.stride(0), TILE=_TILE,
        num_warps=4,
    )  # fmt: skip
    return out
