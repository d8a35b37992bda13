# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `ops.low_rank.down_project` and `up_project`, for bfloat16 and float16 on a GPU.

Memory traffic bounds both: `down_project` reads N K elements, `up_project` writes as many. `down_project` is a split
reduction. Each thread block writes its part to memory and counts itself; the last block adds all parts in their order
and sets the counter back to zero. So it is one launch, and its bits are the same each time.

Counters and tables are in `KernelBuffers`, which belong to one forward: launches that share counters must follow one
another on one stream.

With dropout, a program computes ranks of one adapter only, since each adapter reads a masked operand of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.buffers import COUNTERS, KernelBuffers
from loratune.ops.dropout import GOLDEN, LEVELS, threshold
from loratune.ops.dropout_kernels import hashed_in_row, keeps
from loratune.ops.low_rank import AdapterDropout


def tile_rows(rows: int, *, hashed: bool = False) -> int:
    """Rows of a tile of the wide operand. With dropout fewer, because the hash needs registers too."""
    return 16 if rows < 1024 else 32 if hashed else 64


def split_count(blocks: int, steps: int) -> int:
    """Number of parts, a power of two, into which to split a reduction of `steps` steps by `blocks` thread blocks."""
    parts = 1
    while blocks * parts * 2 <= COUNTERS and parts * 4 <= steps:
        parts *= 2
    return parts


@triton.jit
def add_parts(own, partial_ptr, counter_ptr, block, piece, PIECES: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Stores one part of a split reduction, (A, B). Returns the sum of all parts and True in the last block."""
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
def through_registers(tile, inside):
    """The tile unchanged, but multiplied from registers. For tiles that have a second use besides the product.

    From 64 rows on, Hopper's products run asynchronously on operands in shared memory. For a load with a second use,
    Triton 3.6 allocates one buffer too few, and the copy ahead overwrites the tile that is being multiplied
    (triton-lang/triton#6691): the bits then differ between runs. An operand in registers is not affected.
    """
    return tl.where(inside, tile, 0.0)


@triton.jit
def dropped(x, tokens, feature, threshold, scale, GOLDEN: tl.constexpr, LEVELS: tl.constexpr):
    """x, (tokens, features), after dropout."""
    kept = keeps(tokens, feature, threshold, GOLDEN, LEVELS)
    return tl.where(kept, x.to(tl.float32) * scale, 0.0).to(x.dtype)


@triton.jit
def _clear(at, rows, count, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Stores `count` zeros at each of the addresses `at`, (ROWS, 1)."""
    column = tl.arange(0, COUNT)[None, :]
    tl.store(at + column, tl.zeros((ROWS, COUNT), tl.float32), mask=rows & (column < count))


@triton.jit
def _down_project(
    wide_ptr, factor_ptr, tail_ptr, kept_ptr, copy_ptr, partial_ptr, counter_ptr, row_ptr, parts_ptr,
    rows, terms, ranks, wide_row, factor_term, factor_rank, tail_row, kept_row, copy_row, spare, threshold,
    scale, first,
    TERMS_EACH: tl.constexpr, PIECES: tl.constexpr, TAIL: tl.constexpr, KEEP: tl.constexpr, COPY: tl.constexpr,
    SPARE: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr, RANKS: tl.constexpr, DROP: tl.constexpr,
    GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One program for a tile of rows, a part of the terms, and up to 64 ranks (of one adapter with dropout)."""
    block, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_rank, end_rank, salt = tl.program_id(2) * RANKS, ranks, 0
    if DROP:
        part = parts_ptr + tl.program_id(2) * 3
        first_rank, end_rank, salt = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    row, rank = block * ROWS + tl.arange(0, ROWS), first_rank + tl.arange(0, RANKS)
    if DROP:
        tokens = hashed_in_row(row_ptr, first + row, salt)
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for above in range(0, TERMS_EACH, TERMS):
        term = piece * TERMS_EACH + above + tl.arange(0, TERMS)
        wide_at = row[:, None] * wide_row + term[None, :]
        wide = tl.load(wide_ptr + wide_at, mask=(row < rows)[:, None] & (term < terms)[None, :], other=0.0)
        if COPY:
            copy_at = row[:, None] * copy_row + term[None, :]
            tl.store(copy_ptr + copy_at, wide, mask=(row < rows)[:, None] & (term < terms)[None, :])
            wide = through_registers(wide, (row < rows)[:, None])
        if DROP:
            wide = dropped(wide, tokens, term, threshold, scale, GOLDEN, LEVELS)
        factor_at = term[:, None].to(tl.int64) * factor_term + rank[None, :] * factor_rank
        factor = tl.load(factor_ptr + factor_at, mask=(term < terms)[:, None] & (rank < end_rank)[None, :], other=0.0)
        total = tl.dot(wide, factor, total)
    done = True
    if PIECES > 1:
        counted = block * tl.num_programs(2) + tl.program_id(2)
        total, done = add_parts(total, partial_ptr, counter_ptr, counted, piece, PIECES, ROWS, RANKS)
    if done:
        inside = (row < rows)[:, None] & (rank < end_rank)[None, :]
        if TAIL:
            tl.store(tail_ptr + row[:, None] * tail_row + rank[None, :], total, mask=inside)
            if SPARE > 0:
                _clear(tail_ptr + row[:, None] * tail_row + ranks, (row < rows)[:, None], spare, ROWS, SPARE)
        if KEEP:
            tl.store(kept_ptr + row[:, None] * kept_row + rank[None, :], total, mask=inside)


def _rank_table(drops: AdapterDropout, width: int, buffers: KernelBuffers) -> Tensor:
    """(parts, 3) int32: first rank, end and salt of parts of at most `width` ranks of one adapter."""
    places = tuple((ranks.start, ranks.stop, salt) for ranks, salt in zip(drops.ranks, drops.salts, strict=True))
    device = drops.row.device

    def make() -> tuple[Tensor]:
        table = [
            [first, min(first + width, end), salt]
            for start, end, salt in places
            for first in range(start, end, width)
        ]
        return (torch.tensor(table, dtype=torch.int32, device=device),)

    return buffers.table(("ranks", places, width, device), make)[0]


def most_ranks(drops: AdapterDropout | None, total: int) -> int:
    """Largest number of ranks that one program may compute, out of `total`."""
    return total if drops is None else max(ranks.stop - ranks.start for ranks in drops.ranks)


def mask_arguments(drops: AdapterDropout | None) -> tuple[int, float, int]:
    """Arguments `threshold`, `scale` and `first` of the kernels."""
    return (0, 1.0, 0) if drops is None else (threshold(drops.probability), drops.scale, drops.first)


def down_project(
    wide: Tensor,
    factor: Tensor,
    tail: Tensor | None = None,
    keep: bool = True,
    copy: Tensor | None = None,
    drops: AdapterDropout | None = None,
    buffers: KernelBuffers | None = None,
) -> Tensor:
    """Twin of `ops.low_rank.down_project`. Reads `wide` once for every 64 ranks."""
    buffers = buffers or KernelBuffers()
    wide = wide if wide.stride(1) == 1 else wide.contiguous()
    (rows, terms), ranks = wide.shape, factor.shape[1]
    keep, spare = keep or tail is None, 0 if tail is None else tail.shape[1] - ranks
    kept = wide.new_empty(rows, ranks) if keep or tail is None else tail[:, :ranks]
    tall, step = tile_rows(rows, hashed=drops is not None), 128
    width = min(64, max(16, triton.next_power_of_2(most_ranks(drops, ranks))))
    row, parts = (wide, wide) if drops is None else (drops.row, _rank_table(drops, width, buffers))
    blocks, columns = triton.cdiv(rows, tall), triton.cdiv(ranks, width) if drops is None else len(parts)
    pieces = split_count(blocks * columns, triton.cdiv(terms, step))
    terms_each = triton.cdiv(triton.cdiv(terms, pieces), step) * step
    partial = wide.new_empty(blocks * columns * pieces * tall * width if pieces > 1 else 0, dtype=torch.float32)
    filled = kept if tail is None else tail
    copied = wide if copy is None else copy
    _down_project[(blocks, pieces, columns)](
        wide, factor, filled, kept, copied, partial, buffers.counters(wide.device), row, parts, rows, terms, ranks,
        wide.stride(0), factor.stride(0), factor.stride(1), filled.stride(0), kept.stride(0), copied.stride(0), spare,
        *mask_arguments(drops), TERMS_EACH=terms_each, PIECES=pieces, TAIL=tail is not None, KEEP=keep,
        COPY=copy is not None,
        SPARE=triton.next_power_of_2(spare) if spare else 0, ROWS=tall, TERMS=step, RANKS=width,
        DROP=drops is not None, GOLDEN=GOLDEN, LEVELS=LEVELS,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return kept


@triton.jit
def _up_project(
    low_ptr, factor_ptr, out_ptr, row_ptr, parts_ptr, rows, columns, low_row, factor_row, threshold, scale, first,
    MEMBERS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
    GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """out = sum over adapters of dropout(low factor). One program for a tile; adapters have at most `MOST` ranks."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there, inside = (row < rows)[:, None], (column < columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for member in tl.static_range(MEMBERS):
        part = parts_ptr + member * 3
        first_rank, end_rank, salt = tl.load(part), tl.load(part + 1), tl.load(part + 2)
        own = tl.zeros((ROWS, COLUMNS), tl.float32)
        for above in range(0, MOST, RANKS):
            rank = first_rank + above + tl.arange(0, RANKS)
            low_at = low_ptr + row[:, None] * low_row + rank[None, :]
            low = tl.load(low_at, mask=there & (rank < end_rank)[None, :], other=0.0)
            factor_at = factor_ptr + rank[:, None].to(tl.int64) * factor_row + column[None, :]
            factor = tl.load(factor_at, mask=(rank < end_rank)[:, None] & inside, other=0.0)
            own = tl.dot(low, factor, own)
        tokens = hashed_in_row(row_ptr, first + row, salt)
        total += dropped(own, tokens, column, threshold, scale, GOLDEN, LEVELS)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], total, mask=there & inside)


def up_project(
    low_rank: Tensor, factor: Tensor, drops: AdapterDropout, buffers: KernelBuffers | None = None
) -> Tensor:
    """Twin of `ops.low_rank.up_project`."""
    buffers = buffers or KernelBuffers()
    low_rank, factor = (t if t.stride(1) == 1 else t.contiguous() for t in (low_rank, factor))
    (rows, columns), (tall, step) = (low_rank.shape[0], factor.shape[1]), (32, 128)
    most = most_ranks(drops, factor.shape[0])
    out = low_rank.new_empty(rows, columns)
    _up_project[triton.cdiv(rows, tall), triton.cdiv(columns, step)](
        low_rank, factor, out, drops.row, _rank_table(drops, factor.shape[0], buffers), rows, columns,
        low_rank.stride(0), factor.stride(0), *mask_arguments(drops), MEMBERS=len(drops.ranks), MOST=most, ROWS=tall,
        COLUMNS=step, RANKS=min(32, max(16, triton.next_power_of_2(most))), GOLDEN=GOLDEN, LEVELS=LEVELS,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
