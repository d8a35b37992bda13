# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the three products of a bank (`ops.bank.projection`), and the tables on the device that they read.

A row is divided into blocks of `BLOCK` tokens, each of one slot, and a program works on tokens of one block: it looks
up the slot, where its weights lie and how high its rank is, and touches nothing else. So one launch serves every
mixture of adapters, and a recorded launch serves those to come: joining, leaving and another division of the row are
numbers in tables whose addresses do not change. Low-rank parts read or write a wide operand once and multiply little,
so what counts is that each is read once, by enough programs at a time; sums are in float32.

    block   slot, position in the slot's step, key (two halves), dropped of 2^24; and, apart from the block itself,
            the nth block in the order of the slots, which is how the gradients go through a row
    slot    first of its blocks in that order; 1 / (1 - dropout)
    entry   of a lane and a slot: rank, offsets of A and of B transposed in the pool; scaling

The gradient of a slot is made by one program for each tile of columns, which goes through the slot's blocks in their
order: no atomics, the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.dropout import GOLDEN, LEVELS, halves, threshold
from loratune.ops.dropout_kernels import hashed, keeps

if TYPE_CHECKING:
    from loratune.ops.bank.projection import BankProjection, Lane, Pool, Segment

BLOCK = 64
_MAX_BLOCKS = 1 << 14
"""A row has at most a million tokens."""
_MEMBERS = 3
"""Linear layers that one launch takes."""
_A, _B = 1, 2
"""Columns of an entry: the offsets of the two factors."""


OF_LAYERS = ["lane0", "lane1", "lane2", "salt0", "salt1", "salt2"]
"""Arguments whose values are those of one layer, for none of which a kernel is to be compiled apart."""


@triton.jit
def kept(block_ptr, token, feature, salt, GOLDEN: tl.constexpr, LEVELS: tl.constexpr):
    """(tokens, features): which elements dropout keeps; `token` counts within the block."""
    position, low, high = tl.load(block_ptr + 1) + token, tl.load(block_ptr + 2), tl.load(block_ptr + 3) ^ salt
    return keeps(hashed(position, low, high), feature, tl.load(block_ptr + 4), GOLDEN, LEVELS)


@triton.jit
def _of(member, first, second, third):
    return tl.where(member == 0, first, tl.where(member == 1, second, third))


@triton.jit(do_not_specialize=OF_LAYERS)
def _thin(
    wide_ptr, out_ptr, work_ptr, entries_ptr, scaling_ptr, blocks_ptr, keep_ptr,
    tokens, slots, max_rank, wide_stride, out_stride,
    lane0, lane1, lane2, column0, column1, column2, width0, width1, width2, salt0, salt1, salt2,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out[t, r] = wide[t] . factor[r], with dropout on the side of A and the scaling on that of B."""
    first = tl.program_id(0) * TOKENS
    block_ptr = blocks_ptr + first // BLOCK * 8
    chunks = tl.cdiv(max_rank, RANK)
    member, chunk = tl.program_id(1) // chunks, tl.program_id(1) % chunks
    slot = tl.load(block_ptr)
    if slot >= 0:
        entry = _of(member, lane0, lane1, lane2) * slots + slot
        rank = tl.load(entries_ptr + entry * 4).to(tl.int32)
        if chunk * RANK < rank:
            width, column = _of(member, width0, width1, width2), _of(member, column0, column1, column2)
            salt = _of(member, salt0, salt1, salt2)
            t, r, k = tl.arange(0, TOKENS), chunk * RANK + tl.arange(0, RANK), tl.arange(0, WIDTH)
            there, held = (first + t < tokens)[:, None], (r < rank)[:, None]
            x_ptr = wide_ptr + (first + t).to(tl.int64)[:, None] * wide_stride + column + k[None, :]
            at = tl.multiple_of(tl.load(entries_ptr + entry * 4 + SIDE), 16)
            factor_ptr = work_ptr + at + r.to(tl.int64)[:, None] * width + k[None, :]
            dropped, keep = tl.load(block_ptr + 4) > 0, tl.load(keep_ptr + slot)
            acc = tl.zeros((TOKENS, RANK), tl.float32)
            for start in range(0, width, WIDTH):
                inside = (start + k < width)[None, :]
                x = tl.load(x_ptr + start, mask=there & inside, other=0.0)
                if SIDE == 1:  # noqa: SIM102 (decided when compiled, unlike the next)
                    if dropped:
                        staying = kept(block_ptr, first % BLOCK + t, start + k, salt, GOLDEN, LEVELS)
                        x = tl.where(staying, x.to(tl.float32) * keep, 0.0).to(x.dtype)
                factor = tl.load(factor_ptr + start, mask=held & inside, other=0.0)
                acc = tl.dot(x, tl.trans(factor), acc)
            if SIDE == 2:
                acc = acc * tl.load(scaling_ptr + entry)
            out = out_ptr + (first + t).to(tl.int64)[:, None] * out_stride + member * max_rank + r[None, :]
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=there & (r < rank)[None, :])


@triton.jit(do_not_specialize=OF_LAYERS)
def _wide(
    inner_ptr, out_ptr, work_ptr, entries_ptr, scaling_ptr, blocks_ptr, keep_ptr,
    tokens, slots, max_rank, inner_stride, out_stride,
    lane0, lane1, lane2, column0, column1, column2, width0, width1, width2, salt0, salt1, salt2,
    SIDE: tl.constexpr, MEMBERS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, GOLDEN: tl.constexpr,
    LEVELS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out[t] = inner[t] factor: columns of each member on the side of B, the sum of all members on that of A.

    Zero where a token has no adapter; added to what is there if `ADD`.
    """
    first = tl.program_id(0) * TOKENS
    block_ptr = blocks_ptr + first // BLOCK * 8
    slot = tl.load(block_ptr)
    t, n = tl.arange(0, TOKENS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = (first + t < tokens)[:, None]
    column, width = 0, width0
    if SIDE == 2:
        column = _of(tl.program_id(2), column0, column1, column2)
        width = _of(tl.program_id(2), width0, width1, width2)
    acc = tl.zeros((TOKENS, WIDTH), tl.float32)
    if slot >= 0:
        dropped, keep = tl.load(block_ptr + 4), tl.load(keep_ptr + slot)
        for each in tl.static_range(MEMBERS):
            member = each
            if SIDE == 2:
                member = tl.program_id(2)
            entry = _of(member, lane0, lane1, lane2) * slots + slot
            rank = tl.load(entries_ptr + entry * 4).to(tl.int32)
            at = tl.multiple_of(tl.load(entries_ptr + entry * 4 + SIDE), 16)
            inside = (n < width)[None, :]
            part = tl.zeros((TOKENS, WIDTH), tl.float32)
            for start in range(0, rank, RANK):
                r = start + tl.arange(0, RANK)
                inner = inner_ptr + (first + t).to(tl.int64)[:, None] * inner_stride + member * max_rank + r[None, :]
                left = tl.load(inner, mask=there & (r < rank)[None, :], other=0.0)
                factor = work_ptr + at + r.to(tl.int64)[:, None] * width + n[None, :]
                right = tl.load(factor, mask=(r < rank)[:, None] & inside, other=0.0)
                part = tl.dot(left, right, part)
            if SIDE == 1:
                if dropped > 0:
                    salt = _of(member, salt0, salt1, salt2)
                    staying = kept(block_ptr, first % BLOCK + t, n, salt, GOLDEN, LEVELS)
                    part = tl.where(staying, part * keep, 0.0)
            else:
                part = part * tl.load(scaling_ptr + entry)
            acc += part
    mask = there & (n < width)[None, :]
    out = out_ptr + (first + t).to(tl.int64)[:, None] * out_stride + column + n[None, :]
    if ADD:
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=OF_LAYERS)
def _outer(
    inner_ptr, wide_ptr, gradient_ptr, entries_ptr, scaling_ptr, blocks_ptr, starts_ptr, keep_ptr,
    tokens, slots, max_rank, inner_stride, wide_stride,
    lane0, lane1, lane2, column0, column1, column2, width0, width1, width2, salt0, salt1, salt2,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """gradient[r] += sum over the slot's tokens of inner[t, r] wide[t]."""
    slot = tl.program_id(1)
    chunks = tl.cdiv(max_rank, RANK)
    member, chunk = tl.program_id(2) // chunks, tl.program_id(2) % chunks
    entry = _of(member, lane0, lane1, lane2) * slots + slot
    rank = tl.load(entries_ptr + entry * 4).to(tl.int32)
    begin, end = tl.load(starts_ptr + slot), tl.load(starts_ptr + slot + 1)
    width, column = _of(member, width0, width1, width2), _of(member, column0, column1, column2)
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    if (chunk * RANK < rank) & (begin < end) & (tl.program_id(0) * WIDTH < width):
        salt, keep = _of(member, salt0, salt1, salt2), tl.load(keep_ptr + slot)
        token, r, inside = tl.arange(0, BLOCK), chunk * RANK + tl.arange(0, RANK), (n < width)[None, :]
        acc = tl.zeros((RANK, WIDTH), tl.float32)
        for nth in range(begin, end):
            block = tl.load(blocks_ptr + nth * 8 + 5)
            t = block * BLOCK + token
            there, t = (t < tokens)[:, None], t.to(tl.int64)[:, None]
            inner = inner_ptr + t * inner_stride + member * max_rank + r[None, :]
            left = tl.load(inner, mask=there & (r < rank)[None, :], other=0.0)
            x = tl.load(wide_ptr + t * wide_stride + column + n[None, :], mask=there & inside, other=0.0)
            if SIDE == 1:
                block_ptr = blocks_ptr + block * 8
                if tl.load(block_ptr + 4) > 0:
                    staying = kept(block_ptr, token, n, salt, GOLDEN, LEVELS)
                    x = tl.where(staying, x.to(tl.float32) * keep, 0.0).to(x.dtype)
            acc = tl.dot(tl.trans(left), x, acc)
        if SIDE == 2:
            acc = acc * tl.load(scaling_ptr + entry)
        at = tl.multiple_of(tl.load(entries_ptr + entry * 4 + SIDE), 16)
        out = gradient_ptr + at + r.to(tl.int64)[:, None] * width + n[None, :]
        mask = (r < rank)[:, None] & inside
        tl.store(out, tl.load(out, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit
def _square_sums(gradient_ptr, starts_ptr, settings_ptr, sums_ptr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    slot, chunk = tl.program_id(1), tl.program_id(0)
    total = 0.0
    if tl.load(settings_ptr + slot * COLUMNS) > 0:
        at = tl.load(starts_ptr + slot) + chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
        g = tl.load(gradient_ptr + at, mask=at < tl.load(starts_ptr + slot + 1), other=0.0)
        total = tl.sum(g * g)
    tl.store(sums_ptr + slot * tl.num_programs(0) + chunk, total)


@triton.jit
def _adamw(
    master_ptr, gradient_ptr, first_ptr, second_ptr, starts_ptr, settings_ptr, losses_ptr, norms_ptr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    settings_ptr += slot * COLUMNS
    at = tl.load(starts_ptr + slot) + tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = at < tl.load(starts_ptr + slot + 1)
    if tl.load(settings_ptr) > 0:
        norm, loss = tl.load(norms_ptr + slot), tl.load(losses_ptr + slot)
        if (norm < float("inf")) & (tl.abs(loss) < float("inf")):  # neither holds for NaN
            rate, beta1, beta2 = tl.load(settings_ptr + 1), tl.load(settings_ptr + 2), tl.load(settings_ptr + 3)
            eps, decay, most = tl.load(settings_ptr + 4), tl.load(settings_ptr + 5), tl.load(settings_ptr + 6)
            correction1, correction2 = tl.load(settings_ptr + 7), tl.load(settings_ptr + 8)
            g = tl.load(gradient_ptr + at, mask=inside) / tl.maximum((norm + 1e-6) / most, 1.0)
            m = tl.load(first_ptr + at, mask=inside)
            m += (1 - beta1) * (g - m)
            v = tl.load(second_ptr + at, mask=inside) * beta2 + (1 - beta2) * g * g
            p = tl.load(master_ptr + at, mask=inside) * (1 - rate * decay)
            p -= rate / correction1 * m / (tl.sqrt(v) / correction2 + eps)
            tl.store(master_ptr + at, p, mask=inside)
            tl.store(first_ptr + at, m, mask=inside)
            tl.store(second_ptr + at, v, mask=inside)
        tl.store(gradient_ptr + at, tl.zeros((CHUNK,), tl.float32), mask=inside)


_CHUNK = 4096


def bank_adamw(
    master: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    starts: Tensor,
    room: int,
    settings: Tensor,
    losses: Tensor,
) -> Tensor:
    """As `ops.bank.adamw.bank_adamw`, in two passes over the slots that are due."""
    slots, columns = settings.shape
    grid = (triton.cdiv(room, _CHUNK), slots)
    sums = master.new_empty(slots, grid[0])
    _square_sums[grid](gradient, starts, settings, sums, COLUMNS=columns, CHUNK=_CHUNK)
    norms = sums.sum(1).sqrt_()
    _adamw[grid](master, gradient, *moments, starts, settings, losses, norms, COLUMNS=columns, CHUNK=_CHUNK)
    return norms


class Tables:
    """What the kernels read, at addresses that stay, and the kernels."""

    def __init__(self, pool: Pool, lanes: int, dtype: torch.dtype) -> None:
        self.slots, self.device = len(pool.starts) - 1, pool.device
        self.work = torch.zeros_like(pool.master, dtype=dtype)
        self.entries = torch.zeros(lanes, self.slots, 4, dtype=torch.int64, device=pool.device)
        self.scaling = torch.zeros(lanes, self.slots, device=pool.device)
        self.keep = torch.ones(self.slots, device=pool.device)
        self._head = self.slots + 1
        self._row = torch.full((self._head + 8 * _MAX_BLOCKS,), -1, dtype=torch.int32, device=pool.device)
        self._row[: self._head] = 0
        self.starts, self.blocks = self._row[: self._head], self._row[self._head :]
        self._used = 0
        self.rank = min(64, max(16, triton.next_power_of_2(pool.max_rank)))
        """Ranks that a program takes at once."""

    def set_slot(self, pool: Pool, slot: int, lanes: Sequence[Lane]) -> None:
        """Takes up what a slot holds now."""
        entries = torch.zeros(len(lanes), 4, dtype=torch.int64, device="cpu")
        scaling = torch.zeros(len(lanes), device="cpu")
        for lane in lanes:
            part = lane.parts.get(slot)
            if part is not None:
                places = part.A.shape[0], part.A.storage_offset(), part.B.storage_offset(), 0
                entries[lane.index] = torch.tensor(places)
                scaling[lane.index] = part.scaling
        self.entries[:, slot] = entries.to(self.device)
        self.scaling[:, slot] = scaling.to(self.device)
        self.keep[slot] = 1 / (1 - pool.dropout[slot])

    def lay_row(self, pool: Pool, segments: Sequence[Segment]) -> Tensor:
        """What `set_row` sends for these segments, on the host (pinned where there is a GPU)."""
        used = max((-(-segment.stop // BLOCK) for segment in segments), default=0)
        host = np.full(self._head + 8 * max(self._used, used), -1, dtype=np.int32)
        starts, blocks = host[: self._head], host[self._head :].reshape(-1, 8)
        self._used = max(self._used, used)
        for segment in segments:
            first, last = segment.start // BLOCK, -(-segment.stop // BLOCK)
            low, high = halves(segment.key or 0)
            dropped = 0 if segment.key is None else threshold(pool.dropout[segment.slot])
            position = segment.position + BLOCK * first - segment.start
            blocks[first:last, :5] = segment.slot, position, low, high, dropped
            blocks[first:last, 1] += BLOCK * np.arange(last - first, dtype=np.int32)
        order = np.argsort(blocks[:, 0], kind="stable")[int((blocks[:, 0] < 0).sum()) :]
        blocks[: len(order), 5] = order
        starts[0] = 0
        starts[1:] = np.bincount(blocks[order, 0], minlength=self.slots).cumsum()
        row = torch.from_numpy(host)
        return row.pin_memory() if self.device.type == "cuda" else row

    def set_row(self, row: Tensor) -> None:
        """Takes up what `lay_row` gave: one copy, which the host does not wait for."""
        self._row[: len(row)].copy_(row, non_blocking=True)

    def thin_forward(self, p: BankProjection, x: Tensor) -> Tensor:
        """As `ops.bank.projection.thin_forward`."""
        return self._thin(p, x, _A)

    def thin_backward(self, p: BankProjection, dy: Tensor) -> Tensor:
        """As `ops.bank.projection.thin_backward`."""
        return self._thin(p, dy, _B)

    def _thin(self, p: BankProjection, wide: Tensor, side: int) -> Tensor:
        max_rank, (tokens, size) = p.pool.max_rank, thin_shape(wide.shape[0], len(p.lanes))
        out = wide.new_empty(wide.shape[0], len(p.lanes) * max_rank)
        wide = wide if wide.stride(1) == 1 else wide.contiguous()
        for first, members in _launches(p, side):
            count = min(_MEMBERS, len(p.lanes) - first)
            grid = (triton.cdiv(wide.shape[0], tokens), count * triton.cdiv(max_rank, self.rank))
            _thin[grid](
                wide, out[:, first * max_rank :], self.work, self.entries, self.scaling, self.blocks, self.keep,
                wide.shape[0], self.slots, max_rank, wide.stride(0), out.stride(0), *members,
                SIDE=side, **CONSTANTS, TOKENS=tokens, WIDTH=size, RANK=self.rank,
                num_warps=THIN["num_warps"], num_stages=THIN["num_stages"],
            )  # fmt: skip
        return out

    def wide_forward(self, p: BankProjection, inner: Tensor) -> Tensor:
        """As `ops.bank.projection.wide_forward`."""
        columns = p.frozen.shape[0]
        covered = sum(lane.d_out for lane in p.lanes) == columns
        out = (inner.new_empty if covered else inner.new_zeros)((inner.shape[0], columns))
        return self._wide(p, inner, out, _B)

    def wide_backward(self, p: BankProjection, d_inner: Tensor) -> Tensor:
        """As `ops.bank.projection.wide_backward`."""
        return self._wide(p, d_inner, d_inner.new_empty(d_inner.shape[0], p.frozen.shape[1]), _A)

    def _wide(self, p: BankProjection, inner: Tensor, out: Tensor, side: int) -> Tensor:
        max_rank = p.pool.max_rank
        for first, members in _launches(p, side):
            count = min(_MEMBERS, len(p.lanes) - first)
            widest = max(members[6:9])
            grid = (
                triton.cdiv(out.shape[0], WIDE["tokens"]), triton.cdiv(widest, WIDE["width"]),
                count if side == _B else 1,
            )  # fmt: skip
            _wide[grid](
                inner[:, first * max_rank :], out, self.work, self.entries, self.scaling, self.blocks, self.keep,
                out.shape[0], self.slots, max_rank, inner.stride(0), out.stride(0), *members,
                SIDE=side, MEMBERS=1 if side == _B else count, ADD=side == _A and first > 0, **CONSTANTS,
                TOKENS=WIDE["tokens"], WIDTH=WIDE["width"], RANK=min(self.rank, 32),
                num_warps=WIDE["num_warps"], num_stages=WIDE["num_stages"],
            )  # fmt: skip
        return out

    def swiglu(self, p: BankProjection, gate_up: Tensor, inner: Tensor) -> Tensor:
        """As `ops.bank.projection.swiglu`."""
        from loratune.ops.bank import swiglu_kernels as bank_swiglu_kernels  # which imports this module

        return bank_swiglu_kernels.swiglu(p, gate_up, inner)

    def swiglu_backward(
        self,
        p: BankProjection,
        gate_up: Tensor,
        inner: Tensor,
        d_active: Tensor,
        after: BankProjection,
        d_inner: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `ops.bank.projection.swiglu_backward`."""
        from loratune.ops.bank import swiglu_kernels as bank_swiglu_kernels  # which imports this module

        return bank_swiglu_kernels.swiglu_backward(p, gate_up, inner, d_active, after, d_inner)

    def outer(self, p: BankProjection, dy: Tensor, d_inner: Tensor, x: Tensor, inner: Tensor) -> None:
        """As `ops.bank.projection.outer`."""
        for narrow, wide, side in ((d_inner, x, _A), (inner, dy, _B)):
            wide = wide if wide.stride(1) == 1 else wide.contiguous()
            for first, members in _launches(p, side):
                count, widest = min(_MEMBERS, len(p.lanes) - first), max(members[6:9])
                size = OUTER["width"] if widest * self.slots >= OUTER["width"] * 256 else OUTER["width"] // 2
                grid = (triton.cdiv(widest, size), self.slots, count * triton.cdiv(p.pool.max_rank, self.rank))
                _outer[grid](
                    narrow[:, first * p.pool.max_rank :], wide, p.pool.gradient, self.entries, self.scaling,
                    self.blocks, self.starts, self.keep, wide.shape[0], self.slots, p.pool.max_rank,
                    narrow.stride(0), wide.stride(0), *members,
                    SIDE=side, **CONSTANTS, WIDTH=size, RANK=self.rank,
                    num_warps=OUTER["num_warps"], num_stages=OUTER["num_stages"],
                )  # fmt: skip


# Sizes of a program's piece, chosen by measuring (benchmarks/NOTES.md, "Many adapters").
THIN: dict[str, int] = {"tokens": 32, "width": 128, "num_warps": 4, "num_stages": 4}
WIDE: dict[str, int] = {"tokens": 32, "width": 128, "num_warps": 4, "num_stages": 2}
OUTER: dict[str, int] = {"width": 256, "num_warps": 4, "num_stages": 3}
CONSTANTS: dict[str, Any] = {"BLOCK": BLOCK, "GOLDEN": GOLDEN, "LEVELS": LEVELS}


def thin_shape(tokens: int, members: int) -> tuple[int, int]:
    """Tokens of a program, and columns of the wide operand that it takes at once: fewer tokens in short rows."""
    return (16 if tokens * members < 32 * 64 else THIN["tokens"]), THIN["width"]


def _launches(p: BankProjection, side: int) -> list[tuple[int, list[int]]]:
    """First member, and what a launch needs of up to `_MEMBERS`: lanes, first columns, widths, salts."""
    launches = []
    for first in range(0, len(p.lanes), _MEMBERS):
        lanes = list(p.lanes[first : first + _MEMBERS])
        rows = list(p.rows[first : first + _MEMBERS])
        lanes += [lanes[0]] * (_MEMBERS - len(lanes))
        rows += [rows[0]] * (_MEMBERS - len(rows))
        columns = [0 if side == _A else row.start for row in rows]
        widths = [lane.d_in if side == _A else lane.d_out for lane in lanes]
        launches.append((first, [lane.index for lane in lanes] + columns + widths + [lane.salt for lane in lanes]))
    return launches
