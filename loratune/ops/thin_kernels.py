# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `ops.thin`, for bfloat16 and float16 on a GPU.

Both kernels cut their sums into pieces. Each block writes its piece, counts itself, and the one that finds itself the
last adds up all pieces in their order and sets the counter back: the same bits each time, and one launch. The
counters are shared by all launches of a device, which is right as long as they follow one another on one stream.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.thin import Members

_BLOCKS = 264
"""Blocks that fill a large GPU; sums are cut until there are about as many."""


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(_BLOCKS, dtype=torch.int32, device=device)


def _pieces(blocks: int, steps: int) -> int:
    """Into how many pieces to cut a sum of so many steps that so many blocks have to make: a power of two."""
    pieces = 1
    while blocks * pieces * 2 <= _BLOCKS and pieces * 4 <= steps:
        pieces *= 2
    return pieces


@triton.jit
def _summed(own, partial_ptr, counter_ptr, block, piece, PIECES: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Leaves a piece, (A, B); to the last block the sum of all pieces and True."""
    at = tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(partial_ptr + (block * PIECES + piece) * A * B + at, own)
    tl.debug_barrier()  # all threads have written before one of them counts
    last = tl.atomic_add(counter_ptr + block, 1, sem="acq_rel") == PIECES - 1
    if last:
        tl.debug_barrier()
        own = tl.zeros((A, B), tl.float32)
        for other in range(PIECES):
            own += tl.load(partial_ptr + (block * PIECES + other) * A * B + at, cache_modifier=".cg")
        tl.store(counter_ptr + block, 0)
    return own, last


@triton.jit
def _narrow(
    wide_ptr, thin_ptr, tail_ptr, kept_ptr, partial_ptr, counter_ptr,
    rows, terms, ranks, wide_row, thin_term, thin_rank, tail_row, kept_row,
    TERMS_EACH: tl.constexpr, PIECES: tl.constexpr, TAIL: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, TERMS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    block, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, rank = block * ROWS + tl.arange(0, ROWS), tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    start, stop = piece * TERMS_EACH, tl.minimum(terms, (piece + 1) * TERMS_EACH)
    for first in range(0, TERMS_EACH, TERMS):
        term = start + first + tl.arange(0, TERMS)
        wide_at = row[:, None] * wide_row + term[None, :]
        wide = tl.load(wide_ptr + wide_at, mask=(row < rows)[:, None] & (term < stop)[None, :], other=0.0)
        thin_at = term[:, None].to(tl.int64) * thin_term + rank[None, :] * thin_rank
        thin = tl.load(thin_ptr + thin_at, mask=(term < stop)[:, None] & (rank < ranks)[None, :], other=0.0)
        total = tl.dot(wide, thin, total)
    done = True
    if PIECES > 1:
        counted = block * tl.num_programs(2) + tl.program_id(2)
        total, done = _summed(total, partial_ptr, counter_ptr, counted, piece, PIECES, ROWS, RANKS)
    if done:
        inside = (row < rows)[:, None] & (rank < ranks)[None, :]
        if TAIL:
            tl.store(tail_ptr + row[:, None] * tail_row + rank[None, :], total, mask=inside)
        if KEEP:
            tl.store(kept_ptr + row[:, None] * kept_row + rank[None, :], total, mask=inside)


def narrow(wide: Tensor, thin: Tensor, tail: Tensor | None = None, keep: bool = True) -> Tensor:
    """As `ops.thin.narrow`."""
    wide = wide if wide.stride(1) == 1 else wide.contiguous()
    (rows, terms), ranks = wide.shape, thin.shape[1]
    keep = keep or tail is None
    kept = wide.new_empty(rows, ranks) if keep or tail is None else tail
    height, step, width = (16 if rows < 1024 else 64), 128, min(64, max(16, triton.next_power_of_2(ranks)))
    blocks, columns = triton.cdiv(rows, height), triton.cdiv(ranks, width)
    pieces = _pieces(blocks * columns, triton.cdiv(terms, step))
    terms_each = triton.cdiv(triton.cdiv(terms, pieces), step) * step
    partial = wide.new_empty(blocks * columns * pieces * height * width if pieces > 1 else 0, dtype=torch.float32)
    filled = kept if tail is None else tail
    _narrow[(blocks, pieces, columns)](
        wide, thin, filled, kept, partial, _counters(wide.device), rows, terms, ranks,
        wide.stride(0), thin.stride(0), thin.stride(1), filled.stride(0), kept.stride(0),
        TERMS_EACH=terms_each,
        PIECES=pieces, TAIL=tail is not None, KEEP=keep, ROWS=height, TERMS=step, RANKS=width,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return kept


@triton.jit
def _gradients(
    x_ptr, d_inner_ptr, dy_ptr, inner_ptr, out_ptr, table_ptr, scale_ptr, partial_ptr, counter_ptr,
    rows, x_row, d_inner_row, dy_row, inner_row,
    ROWS_EACH: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    task, piece = tl.program_id(0), tl.program_id(1)
    entry = table_ptr + task * 8
    is_b, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    first_rank, ranks, out_at, stride = (
        tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6),
    )  # fmt: skip
    column, rank = first + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    wide_ptr, thin_ptr = x_ptr, d_inner_ptr
    wide_row, thin_row = x_row.to(tl.int64), d_inner_row.to(tl.int64)
    if is_b != 0:
        wide_ptr, thin_ptr = dy_ptr, inner_ptr
        wide_row, thin_row = dy_row.to(tl.int64), inner_row.to(tl.int64)
    total = tl.zeros((COLUMNS, RANKS), tl.float32)
    start, stop = piece * ROWS_EACH, tl.minimum(rows, (piece + 1) * ROWS_EACH)
    for above in range(0, ROWS_EACH, ROWS):
        row = start + above + tl.arange(0, ROWS)
        inside = (row < stop)[:, None]
        wide_at = row[:, None] * wide_row + column[None, :]
        wide = tl.load(wide_ptr + wide_at, mask=inside & (column < end)[None, :], other=0.0)
        thin_at = row[:, None] * thin_row + (first_rank + rank)[None, :]
        thin = tl.load(thin_ptr + thin_at, mask=inside & (rank < ranks)[None, :], other=0.0)
        total = tl.dot(tl.trans(wide), thin, total)
    done = True
    if PIECES > 1:
        total, done = _summed(total, partial_ptr, counter_ptr, task, piece, PIECES, COLUMNS, RANKS)
    if done:
        total *= tl.load(scale_ptr + task)
        if is_b != 0:  # (d_out, r)
            at = out_ptr + out_at + (column - first)[:, None] * stride + rank[None, :]
            tl.store(at, total, mask=(column < end)[:, None] & (rank < ranks)[None, :])
        else:  # (r, d_in)
            at = out_ptr + out_at + rank[:, None] * stride + (column - first)[None, :]
            tl.store(at, tl.trans(total), mask=(rank < ranks)[:, None] & (column < end)[None, :])


_TASKS: dict[tuple[object, ...], tuple[Tensor, Tensor, int]] = {}
"""Tables on the device by what they follow from; a model has as many as it has kinds of projections."""


def _tasks(members: Members, d_in: int, columns: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """(tasks, 8) int64 for the kernel, (tasks,) factors, and how many numbers the gradients are.

    First dA of all members, which share the reading of x, then dB of each.
    """
    places = tuple((r.start, r.stop, k.start, k.stop) for r, k in zip(members.rows, members.ranks, strict=True))
    key = (places, tuple(members.scalings), d_in, columns, width, device)
    if key not in _TASKS:
        total, table = places[-1][-1], []
        for k in range(0, total, width):
            for first in range(0, d_in, columns):
                table.append(
                    [0, first, min(d_in, first + columns), k, min(width, total - k), k * d_in + first, d_in, 0]
                )
        scales, out = [1.0] * len(table), total * d_in
        for (top, bottom, low, high), scaling in zip(places, members.scalings, strict=True):
            rank = high - low
            for k in range(low, high, width):
                ranks = min(width, high - k)
                for first in range(top, bottom, columns):
                    end = min(bottom, first + columns)
                    table.append([1, first, end, k, ranks, out + (first - top) * rank + k - low, rank, 0])
                    scales.append(scaling)
            out += rank * (bottom - top)
        _TASKS[key] = torch.tensor(table, device=device), torch.tensor(scales, device=device), out
    return _TASKS[key]


def gradients(x: Tensor, d_inner: Tensor, dy: Tensor, inner: Tensor, members: Members) -> list[Tensor]:
    """As `ops.thin.gradients`; the gradients are parts of one buffer."""
    (rows, d_in), total = x.shape, members.ranks[-1].stop
    width = min(64, max(16, triton.next_power_of_2(total)))
    columns = 128 if rows >= 1024 else 64
    table, scales, size = _tasks(members, d_in, columns, width, x.device)
    tasks, step = table.shape[0], 64
    pieces = _pieces(tasks, triton.cdiv(rows, step))
    rows_each = triton.cdiv(triton.cdiv(rows, pieces), step) * step
    out = torch.empty(size, device=x.device)
    partial = out.new_empty(tasks * pieces * columns * width if pieces > 1 else 0)
    _gradients[(tasks, pieces)](
        x, d_inner, dy, inner, out, table, scales, partial, _counters(x.device),
        rows, x.stride(0), d_inner.stride(0), dy.stride(0), inner.stride(0),
        ROWS_EACH=rows_each,
        PIECES=pieces, COLUMNS=columns, ROWS=step, RANKS=width, num_warps=4, num_stages=4,
    )  # fmt: skip
    dA, at, found = out[: total * d_in].view(total, d_in), total * d_in, []
    for place, rank in zip(members.rows, members.ranks, strict=True):
        size = (place.stop - place.start) * (rank.stop - rank.start)
        found += [dA[rank], out[at : at + size].view(place.stop - place.start, -1)]
        at += size
    return found
