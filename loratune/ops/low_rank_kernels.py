# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of `ops.low_rank`, for bfloat16 and float16 on a GPU.

`narrow` and `gradients` cut sums into pieces. Each block writes its piece, counts itself, and the one that finds
itself the last adds up all pieces in their order and sets the counter back: the same bits each time, and one launch.
The counters are shared by all launches of a device, which is right as long as they follow one another on one stream.

With dropout no program may take the ranks of two adapters at once, since each sees an operand of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.dropout import GOLDEN, LEVELS, threshold
from loratune.ops.dropout_kernels import hashed_in_row, keeps
from loratune.ops.low_rank import AdapterDropout, AdapterSlices, GradientOperands

_BLOCKS = 264
"""Blocks that fill a large GPU; sums are cut until there are about as many."""
TILES = {16: (64, 64, 5), 32: (128, 32, 5), 64: (64, 32, 6)}
"""Of gradients, by ranks: columns, rows, and how many tiles are on their way or in use (measured)."""


def height(rows: int, *, hashed: bool = False) -> int:
    """Rows of a tile of the wide operand; fewer behind dropout, whose hash takes registers too."""
    return 16 if rows < 1024 else 32 if hashed else 64


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
def through_registers(tile, inside):
    """The same numbers, zero outside as they were; to be multiplied where a tile is also used for something else.

    From 64 rows on Hopper multiplies while the loop goes on, with operands in shared memory. For a load with a second
    use Triton 3.6 keeps one buffer too few then, and the copy ahead overwrites the tile that is being multiplied
    (triton-lang/triton#6691): other bits from run to run. What has gone through registers is multiplied from there.
    """
    return tl.where(inside, tile, 0.0)


@triton.jit
def _dropped(x, tokens, feature, threshold, scale, GOLDEN: tl.constexpr, LEVELS: tl.constexpr):
    """x, (tokens, features), behind dropout."""
    kept = keeps(tokens, feature, threshold, GOLDEN, LEVELS)
    return tl.where(kept, x.to(tl.float32) * scale, 0.0).to(x.dtype)


@triton.jit
def _clear(at, rows, count, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Zeros from each of the addresses `at`, (ROWS, 1), on."""
    column = tl.arange(0, COUNT)[None, :]
    tl.store(at + column, tl.zeros((ROWS, COUNT), tl.float32), mask=rows & (column < count))


@triton.jit
def _narrow(
    wide_ptr, thin_ptr, tail_ptr, kept_ptr, copy_ptr, partial_ptr, counter_ptr, row_ptr, parts_ptr,
    rows, terms, ranks, wide_row, thin_term, thin_rank, tail_row, kept_row, copy_row, spare, threshold, scale, first,
    TERMS_EACH: tl.constexpr, PIECES: tl.constexpr, TAIL: tl.constexpr, KEEP: tl.constexpr, COPY: tl.constexpr,
    SPARE: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr, RANKS: tl.constexpr, DROP: tl.constexpr,
    GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
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
            wide = _dropped(wide, tokens, term, threshold, scale, GOLDEN, LEVELS)
        thin_at = term[:, None].to(tl.int64) * thin_term + rank[None, :] * thin_rank
        thin = tl.load(thin_ptr + thin_at, mask=(term < terms)[:, None] & (rank < end_rank)[None, :], other=0.0)
        total = tl.dot(wide, thin, total)
    done = True
    if PIECES > 1:
        counted = block * tl.num_programs(2) + tl.program_id(2)
        total, done = _summed(total, partial_ptr, counter_ptr, counted, piece, PIECES, ROWS, RANKS)
    if done:
        inside = (row < rows)[:, None] & (rank < end_rank)[None, :]
        if TAIL:
            tl.store(tail_ptr + row[:, None] * tail_row + rank[None, :], total, mask=inside)
            if SPARE > 0:
                _clear(tail_ptr + row[:, None] * tail_row + ranks, (row < rows)[:, None], spare, ROWS, SPARE)
        if KEEP:
            tl.store(kept_ptr + row[:, None] * kept_row + rank[None, :], total, mask=inside)


@functools.cache
def _parts(places: tuple[tuple[int, int], ...], salts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """(parts, 3) int32: first rank, end and salt of each, none wider than `width` or of two adapters."""
    table = [
        [first, min(first + width, end), salt]
        for (start, end), salt in zip(places, salts, strict=True)
        for first in range(start, end, width)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


def _parts_of(drops: AdapterDropout, width: int) -> Tensor:
    return _parts(tuple((k.start, k.stop) for k in drops.ranks), tuple(drops.salts), width, drops.row.device)


def _most_ranks(drops: AdapterDropout | None, total: int) -> int:
    """Of those that one program may take, out of `total`."""
    return total if drops is None else max(ranks.stop - ranks.start for ranks in drops.ranks)


def _how(drops: AdapterDropout | None) -> tuple[int, float, int]:
    """Threshold, scale and first token, as kernels take them."""
    return (0, 1.0, 0) if drops is None else (threshold(drops.probability), drops.scale, drops.first)


def down_project(
    wide: Tensor,
    thin: Tensor,
    tail: Tensor | None = None,
    keep: bool = True,
    copy: Tensor | None = None,
    drops: AdapterDropout | None = None,
) -> Tensor:
    """As `ops.low_rank.down_project`."""
    wide = wide if wide.stride(1) == 1 else wide.contiguous()
    (rows, terms), ranks = wide.shape, thin.shape[1]
    keep, spare = keep or tail is None, 0 if tail is None else tail.shape[1] - ranks
    kept = wide.new_empty(rows, ranks) if keep or tail is None else tail[:, :ranks]
    tall, step = height(rows, hashed=drops is not None), 128
    width = min(64, max(16, triton.next_power_of_2(_most_ranks(drops, ranks))))
    row, parts = (wide, wide) if drops is None else (drops.row, _parts_of(drops, width))
    blocks, columns = triton.cdiv(rows, tall), triton.cdiv(ranks, width) if drops is None else len(parts)
    pieces = _pieces(blocks * columns, triton.cdiv(terms, step))
    terms_each = triton.cdiv(triton.cdiv(terms, pieces), step) * step
    partial = wide.new_empty(blocks * columns * pieces * tall * width if pieces > 1 else 0, dtype=torch.float32)
    filled = kept if tail is None else tail
    copied = wide if copy is None else copy
    _narrow[(blocks, pieces, columns)](
        wide, thin, filled, kept, copied, partial, _counters(wide.device), row, parts, rows, terms, ranks,
        wide.stride(0), thin.stride(0), thin.stride(1), filled.stride(0), kept.stride(0), copied.stride(0), spare,
        *_how(drops), TERMS_EACH=terms_each, PIECES=pieces, TAIL=tail is not None, KEEP=keep, COPY=copy is not None,
        SPARE=triton.next_power_of_2(spare) if spare else 0, ROWS=tall, TERMS=step, RANKS=width,
        DROP=drops is not None, GOLDEN=GOLDEN, LEVELS=LEVELS,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return kept


@triton.jit
def _widen(
    inner_ptr, thin_ptr, out_ptr, row_ptr, parts_ptr, rows, columns, inner_row, thin_row, threshold, scale, first,
    MEMBERS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
    GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over the members of dropout of inner[n] thin, each over its own ranks, at most `MOST`."""
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
            inner_at = inner_ptr + row[:, None] * inner_row + rank[None, :]
            inner = tl.load(inner_at, mask=there & (rank < end_rank)[None, :], other=0.0)
            thin_at = thin_ptr + rank[:, None].to(tl.int64) * thin_row + column[None, :]
            thin = tl.load(thin_at, mask=(rank < end_rank)[:, None] & inside, other=0.0)
            own = tl.dot(inner, thin, own)
        tokens = hashed_in_row(row_ptr, first + row, salt)
        total += _dropped(own, tokens, column, threshold, scale, GOLDEN, LEVELS)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], total, mask=there & inside)


def up_project(inner: Tensor, thin: Tensor, drops: AdapterDropout) -> Tensor:
    """As `ops.low_rank.up_project`."""
    inner, thin = (t if t.stride(1) == 1 else t.contiguous() for t in (inner, thin))
    (rows, columns), (height, step) = (inner.shape[0], thin.shape[1]), (32, 128)
    most = _most_ranks(drops, thin.shape[0])
    out = inner.new_empty(rows, columns)
    _widen[triton.cdiv(rows, height), triton.cdiv(columns, step)](
        inner, thin, out, drops.row, _parts_of(drops, thin.shape[0]), rows, columns, inner.stride(0), thin.stride(0),
        *_how(drops), MEMBERS=len(drops.ranks), MOST=most, ROWS=height, COLUMNS=step,
        RANKS=min(32, max(16, triton.next_power_of_2(most))), GOLDEN=GOLDEN, LEVELS=LEVELS,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _outer(
    wide_ptr, thin_ptr, row_ptr, wide_row, thin_row, first_column, end, first_rank, ranks, rows, piece,
    salt, threshold, scale, first, ROWS_EACH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    RANKS: tl.constexpr, DROP: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Sum over a piece of the rows of wide[:, first_column:end]ᵀ thin[:, first_rank:first_rank + ranks]."""
    column, rank = first_column + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    total = tl.zeros((COLUMNS, RANKS), tl.float32)
    for above in range(0, ROWS_EACH, ROWS):
        row = (piece * ROWS_EACH + above + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None]
        wide_at = row[:, None] * wide_row + column[None, :]
        wide = tl.load(wide_ptr + wide_at, mask=inside & (column < end)[None, :], other=0.0)
        if DROP:
            tokens = hashed_in_row(row_ptr, first + row, salt)
            wide = _dropped(wide, tokens, column, threshold, scale, GOLDEN, LEVELS)
        thin_at = row[:, None] * thin_row + (first_rank + rank)[None, :]
        thin = tl.load(thin_ptr + thin_at, mask=inside & (rank < ranks)[None, :], other=0.0)
        total = tl.dot(tl.trans(wide), thin, total)
    return total


@triton.jit
def _chosen(which, a, b, c, d, e, f, PAIRS: tl.constexpr):
    """One of `PAIRS` values."""
    chosen = tl.where(which == 0, a, b)
    if PAIRS > 2:
        chosen = tl.where(which < 2, chosen, tl.where(which == 2, c, d))
    if PAIRS > 4:
        chosen = tl.where(which < 4, chosen, tl.where(which == 4, e, f))
    return chosen


@triton.jit
def _gradients(
    x0_ptr, dy0_ptr, x1_ptr, dy1_ptr, x2_ptr, dy2_ptr,
    d_inner0_ptr, inner0_ptr, d_inner1_ptr, inner1_ptr, d_inner2_ptr, inner2_ptr,
    x0_row, dy0_row, x1_row, dy1_row, x2_row, dy2_row,
    d_inner0_row, inner0_row, d_inner1_row, inner1_row, d_inner2_row, inner2_row,
    out_ptr, table_ptr, scale_ptr, partial_ptr, counter_ptr, row_ptr, rows, threshold, scale, first_token,
    ROWS_EACH: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    ALIGNED: tl.constexpr, PAIRS: tl.constexpr, DROP: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Sums over rows of products of wide operands with the thin ones that stand in their places, see `_tasks`."""
    task, piece = tl.program_id(0), tl.program_id(1)
    entry = table_ptr + task * 8
    which, first, end, first_rank, ranks = (
        tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
    )  # fmt: skip
    out_at, stride, salt = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
    is_b = which % 2
    if ALIGNED:  # without this the compiler must take numbers one by one
        first, end = tl.multiple_of(first, 16), tl.multiple_of(end, 16)
        first_rank, ranks = tl.multiple_of(first_rank, 16), tl.multiple_of(ranks, 16)
    if not DROP:
        wide = _chosen(which, x0_ptr, dy0_ptr, x1_ptr, dy1_ptr, x2_ptr, dy2_ptr, PAIRS)
        thin = _chosen(
            which, d_inner0_ptr, inner0_ptr, d_inner1_ptr, inner1_ptr, d_inner2_ptr, inner2_ptr, PAIRS
        )  # fmt: skip
        wide_row = _chosen(which, x0_row, dy0_row, x1_row, dy1_row, x2_row, dy2_row, PAIRS)
        thin_row = _chosen(
            which, d_inner0_row, inner0_row, d_inner1_row, inner1_row, d_inner2_row, inner2_row, PAIRS
        )  # fmt: skip
        total = _outer(
            wide, thin, row_ptr, wide_row, thin_row, first, end, first_rank, ranks, rows, piece,
            salt, threshold, scale, first_token, ROWS_EACH, COLUMNS, ROWS, RANKS, False, GOLDEN, LEVELS,
        )  # fmt: skip
    elif is_b != 0:
        total = _outer(
            dy0_ptr, inner0_ptr, row_ptr, dy0_row, inner0_row, first, end, first_rank, ranks, rows, piece,
            salt, threshold, scale, first_token, ROWS_EACH, COLUMNS, ROWS, RANKS, False, GOLDEN, LEVELS,
        )  # fmt: skip
    else:
        total = _outer(
            x0_ptr, d_inner0_ptr, row_ptr, x0_row, d_inner0_row, first, end, first_rank, ranks, rows, piece,
            salt, threshold, scale, first_token, ROWS_EACH, COLUMNS, ROWS, RANKS, DROP, GOLDEN, LEVELS,
        )  # fmt: skip
    done = True
    if PIECES > 1:
        total, done = _summed(total, partial_ptr, counter_ptr, task, piece, PIECES, COLUMNS, RANKS)
    if done:
        total *= tl.load(scale_ptr + task)
        column, rank = tl.arange(0, COLUMNS), tl.arange(0, RANKS)
        if is_b != 0:  # (d_out, r)
            b_at = out_ptr + out_at + column[:, None] * stride + rank[None, :]
            tl.store(b_at, total, mask=(first + column < end)[:, None] & (rank < ranks)[None, :])
        else:  # (r, d_in)
            a_at = out_ptr + out_at + rank[:, None] * stride + column[None, :]
            tl.store(a_at, tl.trans(total), mask=(rank < ranks)[:, None] & (first + column < end)[None, :])


_TASKS: dict[tuple[object, ...], tuple[Tensor, Tensor, int]] = {}
"""Tables on the device by what they follow from; a model has as many as it has kinds of projections."""


def _tasks(works: Sequence[GradientOperands], columns: int, width: int) -> tuple[Tensor, Tensor, int]:
    """(tasks, 8) int64 for the kernel, (tasks,) factors, and how many numbers the gradients are.

    Of each work first dA of all members, which share the reading of x unless there is dropout, then dB of each.
    """
    device = works[0].x.device
    key = (columns, width, device, *(_place(work) for work in works))
    if key not in _TASKS:
        table: list[list[int]] = []
        scales: list[float] = []
        out = 0
        for pair, (members, d_in, salts) in enumerate(map(_place, works)):
            places, scalings = members
            total = places[-1][-1]
            readers = [(0, total, 0)]
            if salts is not None:
                readers = [(low, high, salt) for (_, _, low, high), salt in zip(places, salts, strict=True)]
            for low, high, salt in readers:
                for k in range(low, high, width):
                    for first in range(0, d_in, columns):
                        end, ranks = min(d_in, first + columns), min(width, high - k)
                        table.append([2 * pair, first, end, k, ranks, out + k * d_in + first, d_in, salt])
            scales += [1.0] * (len(table) - len(scales))
            out += total * d_in
            for (top, bottom, low, high), scaling in zip(places, scalings, strict=True):
                rank = high - low
                for k in range(low, high, width):
                    ranks = min(width, high - k)
                    for first in range(top, bottom, columns):
                        end = min(bottom, first + columns)
                        place = out + (first - top) * rank + k - low
                        table.append([2 * pair + 1, first, end, k, ranks, place, rank, 0])
                        scales.append(scaling)
                out += rank * (bottom - top)
        _TASKS[key] = torch.tensor(table, device=device), torch.tensor(scales, device=device), out
    return _TASKS[key]


def _place(work: GradientOperands) -> tuple[Any, ...]:
    """What the tasks of a work follow from."""
    members, drops = work.members, work.drops
    places = tuple((r.start, r.stop, k.start, k.stop) for r, k in zip(members.rows, members.ranks, strict=True))
    return (places, tuple(members.scalings)), work.x.shape[1], None if drops is None else tuple(drops.salts)


def gradients(
    x: Tensor, d_inner: Tensor, dy: Tensor, inner: Tensor, members: AdapterSlices, drops: AdapterDropout | None = None
) -> list[Tensor]:
    """As `ops.low_rank.gradients`."""
    return gradients_of([GradientOperands(x, d_inner, dy, inner, members, drops)])[0]


_TOGETHER = 3
"""Works that one launch takes."""
_FEW = 4096
"""Rows up to which works are made together; of more, each fills a GPU by itself, and has the tiles that suit it."""


def gradients_of(works: Sequence[GradientOperands]) -> list[list[Tensor]]:
    """As `ops.low_rank.gradients_of`; gradients that are made in one launch are parts of one buffer."""
    if len(works) > 1 and (works[0].x.shape[0] > _FEW or any(work.drops is not None for work in works)):
        return [found for work in works for found in gradients_of([work])]
    if len(works) > _TOGETHER:
        return gradients_of(works[:_TOGETHER]) + gradients_of(works[_TOGETHER:])
    works = [_with_whole_rows(work) for work in works]
    drops, rows = works[0].drops, works[0].x.shape[0]
    assert all(tensor.shape[0] == rows for work in works for tensor in work[:4])
    most = max(_most_ranks(drops, work.members.ranks[-1].stop) for work in works)
    width = min(64, max(16, triton.next_power_of_2(most)))
    columns, step, stages = TILES[width]
    table, scales, size = _tasks(works, columns, width)
    tasks = table.shape[0]
    pieces = _pieces(tasks, triton.cdiv(rows, step))
    rows_each = triton.cdiv(triton.cdiv(rows, pieces), step) * step
    out = torch.empty(size, device=works[0].x.device)
    partial = out.new_empty(tasks * pieces * columns * width if pieces > 1 else 0)
    three = [works[min(nth, len(works) - 1)] for nth in range(_TOGETHER)]
    wide = [tensor for work in three for tensor in (work.x, work.dy)]
    thin = [tensor for work in three for tensor in (work.d_inner, work.inner)]
    _gradients[(tasks, pieces)](
        *wide, *thin, *(tensor.stride(0) for tensor in (*wide, *thin)), out, table, scales, partial,
        _counters(out.device), wide[0] if drops is None else drops.row, rows, *_how(drops),
        ROWS_EACH=rows_each, PIECES=pieces, COLUMNS=columns, ROWS=step, RANKS=width,
        ALIGNED=all(map(_aligned, works)), PAIRS=2 * len(works), DROP=drops is not None, GOLDEN=GOLDEN, LEVELS=LEVELS,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    found, at = [], 0
    for work in works:
        d_in, total = work.x.shape[1], work.members.ranks[-1].stop
        dA, of_work = out[at : at + total * d_in].view(total, d_in), []
        at += total * d_in
        for place, rank in zip(work.members.rows, work.members.ranks, strict=True):
            size = (place.stop - place.start) * (rank.stop - rank.start)
            of_work += [dA[rank], out[at : at + size].view(place.stop - place.start, -1)]
            at += size
        found.append(of_work)
    return found


def _with_whole_rows(work: GradientOperands) -> GradientOperands:
    x, d_inner, dy, inner = (t if t.stride(1) == 1 else t.contiguous() for t in work[:4])
    return work._replace(x=x, d_inner=d_inner, dy=dy, inner=inner)


def _aligned(work: GradientOperands) -> bool:
    """Whether all that its tasks are bounded by is a multiple of 16."""
    parts = (*work.members.rows, *work.members.ranks)
    return all(edge % 16 == 0 for edge in (work.x.shape[1], *(e for part in parts for e in (part.start, part.stop))))
