# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `ops.low_rank.gradients` and `gradients_of`, for bfloat16 and float16 on a GPU.

One launch computes dA and dB of all adapters of up to three projections. A table on the device lists the tiles of all
gradients, and each program looks up its own. Memory traffic is the bound: x and dy are read once for every 64 ranks,
N (d_in + D) elements. The sum over rows is a split reduction as in `ops.low_rank_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.buffers import KernelBuffers
from loratune.ops.dropout import GOLDEN, LEVELS
from loratune.ops.dropout_kernels import hashed_in_row
from loratune.ops.low_rank import AdapterDropout, AdapterSlices, GradientOperands
from loratune.ops.low_rank_kernels import add_parts, dropped, mask_arguments, most_ranks, split_count

TILES = {16: (64, 64, 5), 32: (128, 32, 5), 64: (64, 32, 6)}
"""Tiles by ranks: columns, rows, and pipeline stages (measured)."""


@triton.jit
def _outer(
    wide_ptr, factor_ptr, row_ptr, wide_row, factor_row, first_column, end, first_rank, ranks, rows, piece,
    salt, threshold, scale, first, ROWS_EACH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    RANKS: tl.constexpr, DROP: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """wide[:, first_column:end]ᵀ factor[:, first_rank:first_rank + ranks], summed over one part of the rows."""
    column, rank = first_column + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    total = tl.zeros((COLUMNS, RANKS), tl.float32)
    for above in range(0, ROWS_EACH, ROWS):
        row = (piece * ROWS_EACH + above + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None]
        wide_at = row[:, None] * wide_row + column[None, :]
        wide = tl.load(wide_ptr + wide_at, mask=inside & (column < end)[None, :], other=0.0)
        if DROP:
            tokens = hashed_in_row(row_ptr, first + row, salt)
            wide = dropped(wide, tokens, column, threshold, scale, GOLDEN, LEVELS)
        factor_at = row[:, None] * factor_row + (first_rank + rank)[None, :]
        factor = tl.load(factor_ptr + factor_at, mask=inside & (rank < ranks)[None, :], other=0.0)
        total = tl.dot(tl.trans(wide), factor, total)
    return total


@triton.jit
def _select(which, a, b, c, d, e, f, PAIRS: tl.constexpr):
    """Value number `which` of `PAIRS`."""
    selected = tl.where(which == 0, a, b)
    if PAIRS > 2:
        selected = tl.where(which < 2, selected, tl.where(which == 2, c, d))
    if PAIRS > 4:
        selected = tl.where(which < 4, selected, tl.where(which == 4, e, f))
    return selected


@triton.jit
def _gradients(
    x0_ptr, dy0_ptr, x1_ptr, dy1_ptr, x2_ptr, dy2_ptr,
    d_low0_ptr, low0_ptr, d_low1_ptr, low1_ptr, d_low2_ptr, low2_ptr,
    x0_row, dy0_row, x1_row, dy1_row, x2_row, dy2_row,
    d_low0_row, low0_row, d_low1_row, low1_row, d_low2_row, low2_row,
    out_ptr, table_ptr, scale_ptr, partial_ptr, counter_ptr, row_ptr, rows, threshold, scale, first_token,
    ROWS_EACH: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    ALIGNED: tl.constexpr, PAIRS: tl.constexpr, DROP: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program for a part of the rows of one tile of dA or dB, given by a line of the table (`_TileLine`)."""
    task, piece = tl.program_id(0), tl.program_id(1)
    entry = table_ptr + task * 8
    which, first, end, first_rank, ranks = (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
    )  # fmt: skip
    out_at, stride, salt = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
    is_b = which % 2
    if ALIGNED:  # without this hint the compiler loads elements one by one
        first, end = tl.multiple_of(first, 16), tl.multiple_of(end, 16)
        first_rank, ranks = tl.multiple_of(first_rank, 16), tl.multiple_of(ranks, 16)
    if not DROP:
        wide = _select(which, x0_ptr, dy0_ptr, x1_ptr, dy1_ptr, x2_ptr, dy2_ptr, PAIRS)
        factor = _select(
            which, d_low0_ptr, low0_ptr, d_low1_ptr, low1_ptr, d_low2_ptr, low2_ptr, PAIRS
        )  # fmt: skip
        wide_row = _select(which, x0_row, dy0_row, x1_row, dy1_row, x2_row, dy2_row, PAIRS)
        factor_row = _select(
            which, d_low0_row, low0_row, d_low1_row, low1_row, d_low2_row, low2_row, PAIRS
        )  # fmt: skip
        total = _outer(
            wide, factor, row_ptr, wide_row, factor_row, first, end, first_rank, ranks, rows, piece,
            salt, threshold, scale, first_token, ROWS_EACH, COLUMNS, ROWS, RANKS, False, GOLDEN, LEVELS,
        )  # fmt: skip
    elif is_b != 0:
        total = _outer(
            dy0_ptr, low0_ptr, row_ptr, dy0_row, low0_row, first, end, first_rank, ranks, rows, piece,
            salt, threshold, scale, first_token, ROWS_EACH, COLUMNS, ROWS, RANKS, False, GOLDEN, LEVELS,
        )  # fmt: skip
    else:
        total = _outer(
            x0_ptr, d_low0_ptr, row_ptr, x0_row, d_low0_row, first, end, first_rank, ranks, rows, piece,
            salt, threshold, scale, first_token, ROWS_EACH, COLUMNS, ROWS, RANKS, DROP, GOLDEN, LEVELS,
        )  # fmt: skip
    done = True
    if PIECES > 1:
        total, done = add_parts(total, partial_ptr, counter_ptr, task, piece, PIECES, COLUMNS, RANKS)
    if done:
        total *= tl.load(scale_ptr + task)
        column, rank = tl.arange(0, COLUMNS), tl.arange(0, RANKS)
        if is_b != 0:  # (d_out, r)
            b_at = out_ptr + out_at + column[:, None] * stride + rank[None, :]
            tl.store(b_at, total, mask=(first + column < end)[:, None] & (rank < ranks)[None, :])
        else:  # (r, d_in)
            a_at = out_ptr + out_at + rank[:, None] * stride + column[None, :]
            tl.store(a_at, tl.trans(total), mask=(rank < ranks)[:, None] & (first + column < end)[None, :])


class _TileLine(NamedTuple):
    """A line of the table of `_gradients`: the tile that one program computes, and the gradient it belongs to."""

    which: int
    """Number of the gradient: 2 × projection for dA, 2 × projection + 1 for dB."""
    first_column: int
    end_column: int
    """Columns of x or dy."""
    first_rank: int
    ranks: int
    out: int
    """Place of the tile in the output, and the stride of its rows."""
    stride: int
    salt: int
    """Salt of the adapter's dropout; 0 for dB."""


def _tile_lines(projections: Sequence[GradientOperands], columns: int, width: int) -> list[tuple[_TileLine, float]]:
    """Tiles of all gradients with their factors: of each projection first dA, then dB of each adapter.

    All adapters of a projection share a tile of dA, because they read the same x, unless there is dropout.
    """
    lines, out = list[tuple[_TileLine, float]](), 0
    for pair, operands in enumerate(projections):
        members, drops, d_in = operands.members, operands.drops, operands.x.shape[1]
        total = members.ranks[-1].stop
        readers = [(0, total, 0)]
        if drops is not None:
            readers = [(k.start, k.stop, salt) for k, salt in zip(members.ranks, drops.salts, strict=True)]
        for low, high, salt in readers:
            for k in range(low, high, width):
                for first in range(0, d_in, columns):
                    end, ranks = min(d_in, first + columns), min(width, high - k)
                    lines.append((_TileLine(2 * pair, first, end, k, ranks, out + k * d_in + first, d_in, salt), 1.0))
        out += total * d_in
        for rows, ranks_of, scaling in zip(members.rows, members.ranks, members.scalings, strict=True):
            rank = ranks_of.stop - ranks_of.start
            for k in range(ranks_of.start, ranks_of.stop, width):
                ranks = min(width, ranks_of.stop - k)
                for first in range(rows.start, rows.stop, columns):
                    end, place = (
                        min(rows.stop, first + columns),
                        out + (first - rows.start) * rank + k - ranks_of.start,
                    )
                    lines.append((_TileLine(2 * pair + 1, first, end, k, ranks, place, rank, 0), scaling))
            out += rank * (rows.stop - rows.start)
    return lines


def _tile_table(
    projections: Sequence[GradientOperands], columns: int, width: int, buffers: KernelBuffers
) -> tuple[Tensor, ...]:
    """(tiles, 8) int64 table for `_gradients`, and (tiles,) factors. A model has one for each kind of projection."""
    device = projections[0].x.device

    def make() -> tuple[Tensor, ...]:
        lines, factors = zip(*_tile_lines(projections, columns, width), strict=True)
        return torch.tensor(lines, device=device), torch.tensor(factors, device=device)

    return buffers.table(("tiles", columns, width, device, *map(_layout_key, projections)), make)


def _layout_key(operands: GradientOperands) -> tuple[object, ...]:
    """Key of a projection's tile table: two projections with equal keys can share it."""
    members, drops = operands.members, operands.drops
    places = tuple((r.start, r.stop, k.start, k.stop) for r, k in zip(members.rows, members.ranks, strict=True))
    return places, tuple(members.scalings), operands.x.shape[1], None if drops is None else tuple(drops.salts)


def gradients(
    x: Tensor,
    d_low_rank: Tensor,
    dy: Tensor,
    low_rank: Tensor,
    members: AdapterSlices,
    drops: AdapterDropout | None = None,
    buffers: KernelBuffers | None = None,
) -> list[Tensor]:
    """Twin of `ops.low_rank.gradients`."""
    return gradients_of([GradientOperands(x, d_low_rank, dy, low_rank, members, drops, buffers)])[0]


_TOGETHER = 3
"""Largest number of projections in one launch."""
_FEW = 4096
"""Largest number of rows for a shared launch. With more rows each projection fills a GPU, with tiles of its own."""


def gradients_of(projections: Sequence[GradientOperands]) -> list[list[Tensor]]:
    """Twin of `ops.low_rank.gradients_of`. Gradients from one launch are views of one buffer."""
    apart = projections[0].x.shape[0] > _FEW or any(operands.drops is not None for operands in projections)
    if len(projections) > 1 and apart:
        return [found for operands in projections for found in gradients_of([operands])]
    if len(projections) > _TOGETHER:
        return gradients_of(projections[:_TOGETHER]) + gradients_of(projections[_TOGETHER:])
    projections = [_with_whole_rows(operands) for operands in projections]
    return _views(_launch(projections), projections)


def _launch(projections: Sequence[GradientOperands]) -> Tensor:
    """All gradients of up to three projections in one float32 buffer, in the order of `_tile_lines`."""
    drops, rows, buffers = projections[0].drops, projections[0].x.shape[0], projections[0].buffers or KernelBuffers()
    assert all(tensor.shape[0] == rows for operands in projections for tensor in operands[:4])
    most = max(most_ranks(drops, operands.members.ranks[-1].stop) for operands in projections)
    width = min(64, max(16, triton.next_power_of_2(most)))
    columns, step, stages = TILES[width]
    table, scales = _tile_table(projections, columns, width, buffers)
    tiles = table.shape[0]
    pieces = split_count(tiles, triton.cdiv(rows, step))
    rows_each = triton.cdiv(triton.cdiv(rows, pieces), step) * step
    out = torch.empty(sum(map(_elements, projections)), device=projections[0].x.device)
    partial = out.new_empty(tiles * pieces * columns * width if pieces > 1 else 0)
    three = [projections[min(nth, len(projections) - 1)] for nth in range(_TOGETHER)]
    wide = [tensor for operands in three for tensor in (operands.x, operands.dy)]
    factors = [tensor for operands in three for tensor in (operands.d_low_rank, operands.low_rank)]
    _gradients[(tiles, pieces)](
        *wide, *factors, *(tensor.stride(0) for tensor in (*wide, *factors)), out, table, scales, partial,
        buffers.counters(out.device), wide[0] if drops is None else drops.row, rows, *mask_arguments(drops),
        ROWS_EACH=rows_each, PIECES=pieces, COLUMNS=columns, ROWS=step, RANKS=width,
        ALIGNED=all(map(_aligned, projections)), PAIRS=2 * len(projections), DROP=drops is not None, GOLDEN=GOLDEN,
        LEVELS=LEVELS, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


def _views(out: Tensor, projections: Sequence[GradientOperands]) -> list[list[Tensor]]:
    """dA and dB of each adapter of each projection, views of the buffer."""
    found, at = [], 0
    for operands in projections:
        d_in, total = operands.x.shape[1], operands.members.ranks[-1].stop
        dA, of_projection = out[at : at + total * d_in].view(total, d_in), []
        at += total * d_in
        for rows, ranks in zip(operands.members.rows, operands.members.ranks, strict=True):
            size = (rows.stop - rows.start) * (ranks.stop - ranks.start)
            of_projection += [dA[ranks], out[at : at + size].view(rows.stop - rows.start, -1)]
            at += size
        found.append(of_projection)
    return found


def _elements(operands: GradientOperands) -> int:
    """Number of elements in the gradients of one projection."""
    members = operands.members
    dA: int = members.ranks[-1].stop * operands.x.shape[1]
    dB: int = sum((r.stop - r.start) * (k.stop - k.start) for r, k in zip(members.rows, members.ranks, strict=True))
    return dA + dB


def _with_whole_rows(operands: GradientOperands) -> GradientOperands:
    """The operands with contiguous rows."""
    x, d_low_rank, dy, low_rank = (t if t.stride(1) == 1 else t.contiguous() for t in operands[:4])
    return operands._replace(x=x, d_low_rank=d_low_rank, dy=dy, low_rank=low_rank)


def _aligned(operands: GradientOperands) -> bool:
    """True if all bounds of its tiles are multiples of 16."""
    parts = (*operands.members.rows, *operands.members.ranks)
    edges = operands.x.shape[1], *(edge for part in parts for edge in (part.start, part.stop))
    return all(edge % 16 == 0 for edge in edges)
