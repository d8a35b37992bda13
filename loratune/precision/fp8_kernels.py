# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `precision.fp8_rows`: quantised rows, adapter columns, transposed weights.

`augment_rows` is the low-rank product of `ops.low_rank_kernels`, which has each tile of x in registers. It writes the
tile in 8 bits at once, because the row's scale is known before x is read. Without adapter columns, one program holds
a whole row, so that x is read from memory once. Reading wide rows twice, the second time from the cache, was slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops import measure, measure_kernels
from loratune.ops.buffers import KernelBuffers
from loratune.ops.low_rank_kernels import add_parts, split_count, through_registers, tile_rows
from loratune.ops.measure_kernels import INVERSE_E4M3_MAX, MIN_SCALE, one_over, power_of_two_above, scales
from loratune.precision.fp8_rows import E4M3, MARGIN, QuantisedRows, adapter_columns

WARPS = 4
"""Warps of `augment_rows`."""
TILES = {False: (128, 3), True: (256, 2)}
"""Terms of a tile and pipeline stages of `augment_rows`, without and with column factors (measured)."""
_TILE = 128
_GROUP = 16
"""Ranks whose norms one program computes. Their columns of B are one memory sector in each row."""
_MEASURED = tl.constexpr(measure.PIECES)
_MARGIN = tl.constexpr(MARGIN)


@triton.jit
def _quantise(
    x_ptr, columns_ptr, out_ptr, scale_ptr, width, stride, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(columns_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)) * INVERSE_E4M3_MAX, MIN_SCALE)
    tl.store(out_ptr + row * width + column, (x * one_over(scale)).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


def quantise_rows(x: Tensor, columns: Tensor | None = None) -> QuantisedRows:
    """As `precision.fp8_rows.quantise_rows`; one program per row, bound by reading x once."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=E4M3, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantise[(rows,)](
        x, x if columns is None else columns, out, scale, width, x.stride(0), SCALED=columns is not None, BLOCK=block,
        num_warps=max(4, min(32, block // 1024)),
    )  # fmt: skip
    return QuantisedRows(out, scale)


@triton.jit
def _measure(x_ptr, columns_ptr, found_ptr, width, stride, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0)
    x = measure_kernels.scaled(x, columns_ptr, column, inside, SCALED)
    behind_ptr = found_ptr + row * 2 * _MEASURED
    measure_kernels.store_statistics(behind_ptr, tl.max(tl.abs(x)), tl.sum(x * x), piece, tl.num_programs(1))


def measured_rows(x: Tensor, columns: Tensor | None) -> Tensor:
    """As `precision.fp8_rows.measured_rows`; bound by reading x once."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, width), found = x.shape, torch.empty(x.shape[0], 2 * measure.PIECES, device=x.device)
    block = max(4096, triton.next_power_of_2(triton.cdiv(width, measure.PIECES)))
    _measure[(rows, triton.cdiv(width, block))](
        x, x if columns is None else columns, found, width, x.stride(0), SCALED=columns is not None, BLOCK=block,
        num_warps=max(4, block // 1024),
    )  # fmt: skip
    return found


@triton.jit
def _augment(
    x_ptr, matrix_ptr, columns_ptr, found_ptr, factors_ptr, out_ptr, scale_ptr, low_rank_ptr, partial_ptr,
    counter_ptr,
    rows, terms, ranks, adapter, x_row, found_row, matrix_term, matrix_rank,
    TERMS_EACH: tl.constexpr, PIECES: tl.constexpr, SCALED: tl.constexpr, SPARE: tl.constexpr, ROWS: tl.constexpr,
    TERMS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    block, piece, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, rank = block * ROWS + tl.arange(0, ROWS), part * RANKS + tl.arange(0, RANKS)
    there = (row < rows)[:, None]
    kind = out_ptr.dtype.element_ty
    found_at = found_ptr + row[:, None] * found_row + tl.arange(0, _MEASURED)[None, :]
    largest = tl.max(tl.load(found_at, mask=there, other=0.0), 1)
    squares = tl.sum(tl.load(found_at + _MEASURED, mask=there, other=0.0), 1)
    factor, bound = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    scale = scales(largest, squares, bound)
    inverse = one_over(scale)
    out_at = out_ptr + row[:, None] * (terms + adapter)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(0, TERMS_EACH, TERMS):
        term = piece * TERMS_EACH + first + tl.arange(0, TERMS)
        inside = there & (term < terms)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_row + term[None, :], mask=inside, other=0.0)
        value = x.to(tl.float32) * inverse[:, None]
        if SCALED:
            value *= tl.load(columns_ptr + term, mask=term < terms, other=0.0).to(tl.float32)[None, :]
        tl.store(out_at + term[None, :], value.to(kind), mask=inside & (part == 0))
        matrix_at = term[:, None].to(tl.int64) * matrix_term + rank[None, :] * matrix_rank
        matrix = tl.load(matrix_ptr + matrix_at, mask=(term < terms)[:, None] & (rank < ranks)[None, :], other=0.0)
        total = tl.dot(through_registers(x, there), matrix, total)
    done = True
    if PIECES > 1:
        counted = block * tl.num_programs(2) + part
        total, done = add_parts(total, partial_ptr, counter_ptr, counted, piece, PIECES, ROWS, RANKS)
    if done:
        inside = there & (rank < ranks)[None, :]
        low_rank = total.to(low_rank_ptr.dtype.element_ty)
        tl.store(low_rank_ptr + row[:, None] * ranks + rank[None, :], low_rank, mask=inside)
        v = low_rank.to(tl.float32) * (inverse * factor)[:, None]
        hi = v.to(kind)
        behind_at = out_at + terms + rank[None, :]
        tl.store(behind_at, hi, mask=inside)
        tl.store(behind_at + ranks, (v - hi.to(tl.float32)).to(kind), mask=inside)
        tl.store(behind_at + 2 * ranks, hi, mask=inside)
        if part == 0:
            tl.store(scale_ptr + row, scale, mask=row < rows)
            if SPARE > 0:
                spare = 3 * ranks + tl.arange(0, SPARE)[None, :]
                nothing = tl.zeros((ROWS, SPARE), tl.float32).to(kind)
                tl.store(out_at + terms + spare, nothing, mask=there & (spare < adapter))


def augment_rows(
    x: Tensor,
    found: Tensor,
    matrix: Tensor,
    columns: Tensor | None,
    factors: Tensor,
    buffers: KernelBuffers | None = None,
) -> tuple[QuantisedRows, Tensor]:
    """As `precision.fp8_rows.augment_rows`; bound by reading x once and writing it in 8 bits."""
    buffers = buffers or KernelBuffers()
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, terms), ranks = x.shape, matrix.shape[1]
    adapter = adapter_columns(ranks)
    spare = adapter - 3 * ranks
    step, stages = TILES[columns is not None]
    tall, width = tile_rows(rows), min(64, max(16, triton.next_power_of_2(ranks)))
    blocks, parts = triton.cdiv(rows, tall), triton.cdiv(ranks, width)
    pieces = split_count(blocks * parts, triton.cdiv(terms, step))
    terms_each = triton.cdiv(triton.cdiv(terms, pieces), step) * step
    partial = torch.empty(blocks * parts * pieces * tall * width if pieces > 1 else 0, device=x.device)
    out = torch.empty(rows, terms + adapter, dtype=E4M3, device=x.device)
    scale, low_rank = torch.empty(rows, 1, device=x.device), x.new_empty(rows, ranks)
    _augment[(blocks, pieces, parts)](
        x, matrix, x if columns is None else columns, found, factors, out, scale, low_rank, partial,
        buffers.counters(x.device),
        rows, terms, ranks, adapter, x.stride(0), found.stride(0), matrix.stride(0), matrix.stride(1),
        TERMS_EACH=terms_each, PIECES=pieces, SCALED=columns is not None,
        SPARE=triton.next_power_of_2(spare) if spare else 0, ROWS=tall, TERMS=step, RANKS=width,
        num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
    return QuantisedRows(out, scale), low_rank


@triton.jit
def _split_low(v, place, ranks, kind: tl.constexpr):
    """[hi, hi, lo] of v; `place` is the adapter column of each element."""
    hi = v.to(kind)
    lo = (v - hi.to(tl.float32)).to(kind)
    return tl.where(place // ranks == 2, lo.to(tl.float32), hi.to(tl.float32)).to(kind)


@triton.jit
def _transpose(
    x_ptr, out_ptr, low_ptr, factor_ptr, like_ptr,
    rows, width, x_step, out_step, ranks, adapter, low_step_n, low_step_r,
    TILE: tl.constexpr, ADAPTER: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1).to(tl.int64) * TILE
    tiles = tl.cdiv(rows, TILE)
    if tl.program_id(0) < tiles:
        row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        column = first + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        tile = tl.load(x_ptr + row[:, None] * x_step + column[None, :], mask=inside)
        tl.store(out_ptr + column[:, None] * out_step + row[None, :], tl.trans(tile), mask=tl.trans(inside))
    elif ADAPTER > 0:
        kind = like_ptr.dtype.element_ty
        place = tl.arange(0, ADAPTER)[None, :]
        # Each program takes few columns. With more, the transpose would run out of registers and wait for these.
        beside = (first + (tl.program_id(0) - tiles) * FEW + tl.arange(0, FEW))[:, None]
        at = beside * low_step_n + place % ranks * low_step_r
        v = tl.load(low_ptr + at, mask=(beside < width) & (place < 3 * ranks), other=0.0).to(tl.float32)
        low = _split_low(v * one_over(tl.load(factor_ptr)), place, ranks, kind).to(tl.uint8, bitcast=True)
        tl.store(out_ptr + beside * out_step + rows + place, low, mask=(beside < width) & (place < adapter))


def transposed(values: Tensor, lora_A: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """As `precision.fp8_rows.transposed`; bound by reading and writing a byte per element."""
    rows, width = values.shape
    ranks = 1 if lora_A is None else lora_A.shape[0]
    adapter = 0 if lora_A is None else adapter_columns(ranks)
    out = torch.empty(width, rows + adapter, dtype=values.dtype, device=values.device)
    low = values.view(torch.uint8) if lora_A is None else lora_A.T
    wide = triton.next_power_of_2(adapter) if adapter else 0
    few = max(1, min(_TILE, 2048 // wide)) if adapter else _TILE
    _transpose[(triton.cdiv(rows, _TILE) + (_TILE // few if adapter else 0), triton.cdiv(width, _TILE))](
        values.view(torch.uint8), out.view(torch.uint8), low, low if factor is None else factor, values, rows, width,
        values.stride(0), out.stride(0), ranks, adapter, *low.stride(), TILE=_TILE, ADAPTER=wide,
        FEW=few, num_warps=4,
    )  # fmt: skip
    return out


class AdapterTensors(NamedTuple):
    """Tensors of one `precision.fp8_projection.Fp8Projection` that a refresh reads and writes."""

    lora_A: Tensor
    lora_B: Tensor
    scale: Tensor
    """(d_out, 1) float32 of the weight"""
    columns: Tensor
    """(d_out, adapter columns), in the augmented weight behind W"""
    transposed_columns: Tensor | None
    """(d_in, adapter columns), behind the transposed copy of W, if one is held"""
    factors: Tensor
    """(4,) float32"""


@triton.jit
def _norms(table_ptr, found_ptr, like_ptr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Largest magnitude and norm of each row of A, and of each column of B divided by the weight's scale.

    One program per group of `GROUP` ranks.
    """
    entry = table_ptr + tl.program_id(0) * 9
    a_ptr = tl.load(entry).to(tl.pointer_type(like_ptr.dtype.element_ty))
    b_ptr = tl.load(entry + 1).to(tl.pointer_type(like_ptr.dtype.element_ty))
    scale_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    d_in, d_out, ranks = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    a_step, b_step = tl.load(entry + 6), tl.load(entry + 7)
    rank, at, first = tl.arange(0, GROUP), tl.arange(0, BLOCK), 0
    found_ptr += (tl.load(entry + 8) + rank) * 4
    held = rank < ranks
    most, squares = tl.zeros((GROUP, BLOCK), tl.float32), tl.zeros((GROUP, BLOCK), tl.float32)
    while first < d_in:
        inside = held[:, None] & (first + at < d_in)[None, :]
        v = tl.load(a_ptr + rank[:, None] * a_step + (first + at)[None, :], mask=inside, other=0.0).to(tl.float32)
        most, squares = tl.maximum(most, tl.abs(v)), squares + v * v
        first += BLOCK
    tl.store(found_ptr, tl.max(most, 1), mask=held)
    tl.store(found_ptr + 1, tl.sqrt_rn(tl.sum(squares, 1)), mask=held)
    most, squares, first = tl.zeros((BLOCK, GROUP), tl.float32), tl.zeros((BLOCK, GROUP), tl.float32), 0
    while first < d_out:
        there = first + at < d_out
        inside = there[:, None] & held[None, :]
        v = tl.load(b_ptr + (first + at)[:, None] * b_step + rank[None, :], mask=inside, other=0.0).to(tl.float32)
        v *= one_over(tl.load(scale_ptr + first + at, mask=there, other=1.0))[:, None]
        most, squares = tl.maximum(most, tl.abs(v)), squares + v * v
        first += BLOCK
    tl.store(found_ptr + 2, tl.max(most, 0), mask=held)
    tl.store(found_ptr + 3, tl.sqrt_rn(tl.sum(squares, 0)), mask=held)


@triton.jit
def _factors(table_ptr, found_ptr, BLOCK: tl.constexpr):
    """`precision.fp8_rows.adapter_factors` from the norms of all ranks. One program per projection."""
    entry = table_ptr + tl.program_id(0) * 3
    factors_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    first, ranks = tl.load(entry + 1), tl.load(entry + 2)
    rank = tl.arange(0, BLOCK)
    at, inside = found_ptr + (first + rank) * 4, rank < ranks
    of_a = tl.maximum(power_of_two_above(tl.max(tl.load(at, mask=inside, other=0.0)) * INVERSE_E4M3_MAX), MIN_SCALE)
    of_b = tl.maximum(power_of_two_above(tl.max(tl.load(at + 2, mask=inside, other=0.0)) * INVERSE_E4M3_MAX), 1.0)
    tl.store(factors_ptr, of_b)
    tl.store(factors_ptr + 1, _MARGIN * of_b * tl.max(tl.load(at + 1, mask=inside, other=0.0)))
    tl.store(factors_ptr + 2, of_a)
    tl.store(factors_ptr + 3, _MARGIN * of_a * tl.max(tl.load(at + 3, mask=inside, other=0.0)))


@triton.jit
def _adapter_columns(table_ptr, like_ptr, kind_ptr, ALIGNED: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    entry = table_ptr + tl.program_id(0) * 9
    n, ranks = tl.load(entry + 4), tl.load(entry + 5).to(tl.int32)
    if tl.program_id(1) * BLOCK < n:
        matrix_ptr = tl.load(entry).to(tl.pointer_type(like_ptr.dtype.element_ty))
        factor_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
        divisor_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
        out_ptr = tl.load(entry + 3).to(tl.pointer_type(kind_ptr.dtype.element_ty))
        step_n, step_r, out_step = tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8)
        if ALIGNED:
            ranks = tl.multiple_of(ranks, 16)
        row = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        rank = tl.arange(0, RANKS)[None, :]
        inside = (row < n)[:, None] & (rank < ranks)
        v = tl.load(matrix_ptr + row[:, None] * step_n + rank * step_r, mask=inside, other=0.0).to(tl.float32)
        divided = (row < n) & (tl.load(entry + 2) != 0)
        by = tl.load(divisor_ptr + row, mask=divided, other=1.0) * tl.load(factor_ptr)
        v *= one_over(by)[:, None]
        hi = v.to(kind_ptr.dtype.element_ty)
        out_at = out_ptr + row[:, None] * out_step + rank
        if ALIGNED:  # without this hint the compiler writes bytes one by one
            out_at = tl.max_contiguous(tl.multiple_of(out_at, [1, 16]), [1, 16])
        tl.store(out_at, hi, mask=inside)
        tl.store(out_at + ranks, hi, mask=inside)
        tl.store(out_at + 2 * ranks, (v - hi.to(tl.float32)).to(kind_ptr.dtype.element_ty), mask=inside)


class RefreshAll:
    """Updates factors and adapter columns of many adapters from the current A and B, in three launches.

    Adapter columns after the first 3 R are zero and stay zero.
    """

    def __init__(self, adapters: Sequence[AdapterTensors]) -> None:
        groups: list[list[int]] = []
        factors, columns, total = [], [], 0
        for a in adapters:
            (ranks, d_in), d_out = a.lora_A.shape, a.lora_B.shape[0]
            assert a.lora_A.stride(1) == a.lora_B.stride(1) == 1
            factors.append([a.factors.data_ptr(), total, ranks])
            for first in range(0, ranks, _GROUP):
                pointers = [a.lora_A[first:].data_ptr(), a.lora_B[:, first:].data_ptr(), a.scale.data_ptr()]
                sizes = [d_in, d_out, min(_GROUP, ranks - first)]
                groups.append([*pointers, *sizes, a.lora_A.stride(0), a.lora_B.stride(0), total + first])
            total += ranks
            for matrix, which, divisor, out in (
                (a.lora_B, 0, a.scale.data_ptr(), a.columns),
                (a.lora_A.T, 2, 0, a.transposed_columns),
            ):
                if out is not None:
                    pointers = [matrix.data_ptr(), a.factors[which:].data_ptr(), divisor, out.data_ptr()]
                    columns.append([*pointers, matrix.shape[0], ranks, *matrix.stride(), out.stride(0)])
        device = adapters[0].lora_A.device
        self._alive: Any = list(adapters)
        self._tables = [torch.tensor(t, dtype=torch.int64).to(device) for t in (groups, factors, columns)]
        self._found = torch.empty(total, 4, device=device)
        self._ranks = triton.next_power_of_2(max(row[2] for row in factors))
        self._aligned = all(row[place] % 16 == 0 for row in columns for place in (3, 5, 8))
        self._grid = len(columns), triton.cdiv(max(row[4] for row in columns), 64)

    def __call__(self) -> None:
        """Updates factors and adapter columns."""
        groups, factors, columns = self._tables
        like = self._alive[0]
        _norms[(groups.shape[0],)](groups, self._found, like.lora_A, GROUP=_GROUP, BLOCK=512, num_warps=8)
        _factors[(factors.shape[0],)](factors, self._found, BLOCK=self._ranks, num_warps=1)
        _adapter_columns[self._grid](
            columns, like.lora_A, like.columns, ALIGNED=self._aligned, RANKS=max(16, self._ranks), BLOCK=64
        )
