# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `ops.fp8`: rows to 8 bits in one pass, the transpose of a matrix of bytes, and the small borders.

A program goes through its rows twice, for the largest magnitude and to write, the second time out of the cache: x is
read from memory once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    x_ptr, columns_ptr, inner_ptr, factor_ptr, out_ptr, scale_ptr, rows, stride, inner_stride, ranks, border,
    width: tl.constexpr, SCALED: tl.constexpr, BORDER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    kind = out_ptr.dtype.element_ty
    most = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = live & (column < width)
        x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(columns_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(x), 1))
    if BORDER > 1:
        place = tl.arange(0, BORDER)[None, :]
        at = row * inner_stride + place % ranks
        v = tl.load(inner_ptr + at, mask=live & (place < 3 * ranks), other=0.0).to(tl.float32)
        v *= tl.load(factor_ptr)
        most = tl.maximum(most, tl.max(tl.abs(v), 1))
        scale = tl.maximum(most / 448.0, 1e-12)[:, None]
        low = _split_low(v / scale, place, ranks, kind, False)
        tl.store(out_ptr + row * (width + border) + width + place, low, mask=live & (place < border))
    else:
        scale = tl.maximum(most / 448.0, 1e-12)[:, None]
    for start in range(0, width, BLOCK):  # once more, out of the cache
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = live & (column < width)
        x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            x *= tl.load(columns_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * (width + border) + column, (x / scale).to(kind), mask=inside)
    tl.store(scale_ptr + row, scale, mask=live)


def tiling(width: int, scaled: bool) -> tuple[int, int, int]:
    """Rows of a program, columns of a tile, warps: a few rows share the columns' factors, and stay in the cache."""
    block = min(4096, triton.next_power_of_2(width))
    return (2 if scaled and width > 4096 else 1), block, 8 if block > 2048 else 4


def quantise_rows(x: Tensor, columns: Tensor | None, inner: Inner | None) -> tuple[Tensor, Tensor]:
    """As `ops.fp8.quantise_rows`: values and scales."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    ranks, border = 1, 0
    low, factor = x, x
    if inner is not None:
        low, factor = inner.values if inner.values.stride(1) == 1 else inner.values.contiguous(), inner.factor
        ranks = low.shape[1]
        border = -(-3 * ranks // 16) * 16
    out = torch.empty(rows, width + border, dtype=_E4M3, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    rows_each, block, warps = tiling(width, columns is not None)
    _quantise[(triton.cdiv(rows, rows_each),)](
        x, x if columns is None else columns, low, factor, out, scale, rows, x.stride(0), low.stride(0), ranks,
        border, width=width, SCALED=columns is not None, BORDER=triton.next_power_of_2(border) if border else 1,
        ROWS=rows_each, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out, scale


@triton.jit
def _peak(matrix_ptr, divisor_ptr, factor_ptr, n, ranks, step_n, step_r, DIVIDED: tl.constexpr, RANKS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
