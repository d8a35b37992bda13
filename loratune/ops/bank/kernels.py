# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the three products of a bank (`ops.bank.projection`), and the device tables that they read.

A row is divided into blocks of `BLOCK` tokens, each of one slot, and a program works on tokens of one block. It looks
up the slot, the offsets of its weights and its rank, and touches nothing else. So one launch serves every mixture of
adapters, and a recorded launch serves later ones: joining, leaving and another division of the row are numbers in
tables whose addresses do not change. Low-rank parts read or write a wide operand once and multiply little, so they
are bound by memory; sums are in float32.

    block   slot; position in the slot's step; dropout key (two halves); dropout threshold out of 2^24. The last
    column
            is a list of its own: all blocks of the row, sorted by slot
    slot    index of its first block in that list; 1 / (1 - dropout)
    entry   one for each layer and slot: rank, offsets of A and of B transposed in the pool; scaling

One program computes each tile of columns of a slot's gradient, by adding the slot's blocks in order. There are no
atomics, so every run gives the same bits.
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
    from loratune.ops.bank.pool import BankLayer, BankPool, Segment
    from loratune.ops.bank.projection import BankProjection

BLOCK = 64
_MAX_BLOCKS = 1 << 14
"""A row has at most a million tokens."""
_MEMBERS = 3
"""Largest number of linear layers in one launch."""
_A, _B = 1, 2
"""Columns of an entry: the offsets of the two factors."""


OF_LAYERS = ["layer0", "layer1", "layer2", "salt0", "salt1", "salt2"]
"""Arguments that differ between layers; a kernel is not compiled again for their values."""


@triton.jit
def kept(block_ptr, token, feature, salt, GOLDEN: tl.constexpr, LEVELS: tl.constexpr):
    """(tokens, features) mask of the elements that dropout keeps; `token` counts within the block."""
    position, low, high = tl.load(block_ptr + 1) + token, tl.load(block_ptr + 2), tl.load(block_ptr + 3) ^ salt
    return keeps(hashed(position, low, high), feature, tl.load(block_ptr + 4), GOLDEN, LEVELS)


@triton.jit
def _of(member, first, second, third):
    return tl.where(member == 0, first, tl.where(member == 1, second, third))


@triton.jit(do_not_specialize=OF_LAYERS)
def _down(
    wide_ptr, out_ptr, work_ptr, entries_ptr, scaling_ptr, blocks_ptr, keep_ptr,
    tokens, slots, max_rank, wide_stride, out_stride,
    layer0, layer1, layer2, column0, column1, column2, width0, width1, width2, salt0, salt1, salt2,
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
        entry = _of(member, layer0, layer1, layer2) * slots + slot
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
def _up(
    low_rank_ptr, out_ptr, work_ptr, entries_ptr, scaling_ptr, blocks_ptr, keep_ptr,
    tokens, slots, max_rank, low_rank_stride, out_stride,
    layer0, layer1, layer2, column0, column1, column2, width0, width1, width2, salt0, salt1, salt2,
    SIDE: tl.constexpr, MEMBERS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, GOLDEN: tl.constexpr,
    LEVELS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """out[t] = low_rank[t] factor: columns of each member on the side of B, the sum of all members on that of A.

    Zero where a token has no adapter; added to `out` if `ADD`.
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
            entry = _of(member, layer0, layer1, layer2) * slots + slot
            rank = tl.load(entries_ptr + entry * 4).to(tl.int32)
            at = tl.multiple_of(tl.load(entries_ptr + entry * 4 + SIDE), 16)
            inside = (n < width)[None, :]
            part = tl.zeros((TOKENS, WIDTH), tl.float32)
            for start in range(0, rank, RANK):
                r = start + tl.arange(0, RANK)
                low_rank = (
                    low_rank_ptr
                    + (first + t).to(tl.int64)[:, None] * low_rank_stride
                    + member * max_rank
                    + r[None, :]
                )
                left = tl.load(low_rank, mask=there & (r < rank)[None, :], other=0.0)
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
def _add_gradients(
    low_rank_ptr, wide_ptr, gradient_ptr, entries_ptr, scaling_ptr, blocks_ptr, starts_ptr, keep_ptr,
    tokens, slots, max_rank, low_rank_stride, wide_stride,
    layer0, layer1, layer2, column0, column1, column2, width0, width1, width2, salt0, salt1, salt2,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """gradient[r] += sum over the slot's tokens of low_rank[t, r] wide[t]."""
    slot = tl.program_id(1)
    chunks = tl.cdiv(max_rank, RANK)
    member, chunk = tl.program_id(2) // chunks, tl.program_id(2) % chunks
    entry = _of(member, layer0, layer1, layer2) * slots + slot
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
            low_rank = low_rank_ptr + t * low_rank_stride + member * max_rank + r[None, :]
            left = tl.load(low_rank, mask=there & (r < rank)[None, :], other=0.0)
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
    capacity: int,
    settings: Tensor,
    losses: Tensor,
) -> Tensor:
    """As `ops.bank.adamw.bank_adamw`, in two passes over the slots that update now."""
    slots, columns = settings.shape
    grid = (triton.cdiv(capacity, _CHUNK), slots)
    sums = master.new_empty(slots, grid[0])
    _square_sums[grid](gradient, starts, settings, sums, COLUMNS=columns, CHUNK=_CHUNK)
    norms = sums.sum(1).sqrt_()
    _adamw[grid](master, gradient, *moments, starts, settings, losses, norms, COLUMNS=columns, CHUNK=_CHUNK)
    return norms


class BankTables:
    """Tables that the kernels read, at fixed addresses, and the launches of the kernels."""

    def __init__(self, pool: BankPool, layers: int, dtype: torch.dtype) -> None:
        self.slots, self.device = len(pool.starts) - 1, pool.device
        self.work = torch.zeros_like(pool.master, dtype=dtype)
        self.entries = torch.zeros(layers, self.slots, 4, dtype=torch.int64, device=pool.device)
        self.scaling = torch.zeros(layers, self.slots, device=pool.device)
        self.keep = torch.ones(self.slots, device=pool.device)
        self._head = self.slots + 1
        self._row = torch.full((self._head + 8 * _MAX_BLOCKS,), -1, dtype=torch.int32, device=pool.device)
        self._row[: self._head] = 0
        self.starts, self.blocks = self._row[: self._head], self._row[self._head :]
        self._used = 0
        self.rank = min(64, max(16, triton.next_power_of_2(pool.max_rank)))
        """Ranks in a tile of a program."""

    def set_slot(self, pool: BankPool, slot: int, layers: Sequence[BankLayer]) -> None:
        """Writes the present contents of a slot to the tables."""
        entries = torch.zeros(len(layers), 4, dtype=torch.int64, device="cpu")
        scaling = torch.zeros(len(layers), device="cpu")
        for layer in layers:
            part = layer.parts.get(slot)
            if part is not None:
                places = part.A.shape[0], part.A.storage_offset(), part.B.storage_offset(), 0
                entries[layer.index] = torch.tensor(places)
                scaling[layer.index] = part.scaling
        self.entries[:, slot] = entries.to(self.device)
        self.scaling[:, slot] = scaling.to(self.device)
        self.keep[slot] = 1 / (1 - pool.dropout[slot])

    def prepare_row(self, pool: BankPool, segments: Sequence[Segment]) -> Tensor:
        """The tables of these segments for `set_row`, in host memory; pinned if the device is a GPU."""
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
        """Sends the result of `prepare_row` to the device: one copy, without waiting."""
        self._row[: len(row)].copy_(row, non_blocking=True)

    def down_forward(self, p: BankProjection, x: Tensor) -> Tensor:
        """As `ops.bank.projection.down_forward`."""
        return self._down(p, x, _A)

    def down_backward(self, p: BankProjection, dy: Tensor) -> Tensor:
        """As `ops.bank.projection.down_backward`."""
        return self._down(p, dy, _B)

    def _down(self, p: BankProjection, wide: Tensor, side: int) -> Tensor:
        max_rank, (tokens, size) = p.pool.max_rank, down_shape(wide.shape[0], len(p.layers))
        out = wide.new_empty(wide.shape[0], len(p.layers) * max_rank)
        wide = wide if wide.stride(1) == 1 else wide.contiguous()
        for first, members in _launches(p, side):
            count = min(_MEMBERS, len(p.layers) - first)
            grid = (triton.cdiv(wide.shape[0], tokens), count * triton.cdiv(max_rank, self.rank))
            _down[grid](
                wide, out[:, first * max_rank :], self.work, self.entries, self.scaling, self.blocks, self.keep,
                wide.shape[0], self.slots, max_rank, wide.stride(0), out.stride(0), *members,
                SIDE=side, **CONSTANTS, TOKENS=tokens, WIDTH=size, RANK=self.rank,
                num_warps=DOWN["num_warps"], num_stages=DOWN["num_stages"],
            )  # fmt: skip
        return out

    def up_forward(self, p: BankProjection, low_rank: Tensor) -> Tensor:
        """As `ops.bank.projection.up_forward`."""
        columns = p.frozen.shape[0]
        covered = sum(layer.d_out for layer in p.layers) == columns
        out = (low_rank.new_empty if covered else low_rank.new_zeros)((low_rank.shape[0], columns))
        return self._up(p, low_rank, out, _B)

    def up_backward(self, p: BankProjection, d_low_rank: Tensor) -> Tensor:
        """As `ops.bank.projection.up_backward`."""
        return self._up(p, d_low_rank, d_low_rank.new_empty(d_low_rank.shape[0], p.frozen.shape[1]), _A)

    def _up(self, p: BankProjection, low_rank: Tensor, out: Tensor, side: int) -> Tensor:
        max_rank = p.pool.max_rank
        for first, members in _launches(p, side):
            count = min(_MEMBERS, len(p.layers) - first)
            widest = max(members[6:9])
            grid = (
                triton.cdiv(out.shape[0], UP["tokens"]), triton.cdiv(widest, UP["width"]),
                count if side == _B else 1,
            )  # fmt: skip
            _up[grid](
                low_rank[:, first * max_rank :], out, self.work, self.entries, self.scaling, self.blocks, self.keep,
                out.shape[0], self.slots, max_rank, low_rank.stride(0), out.stride(0), *members,
                SIDE=side, MEMBERS=1 if side == _B else count, ADD=side == _A and first > 0, **CONSTANTS,
                TOKENS=UP["tokens"], WIDTH=UP["width"], RANK=min(self.rank, 32),
                num_warps=UP["num_warps"], num_stages=UP["num_stages"],
            )  # fmt: skip
        return out

    def add_gradients(self, p: BankProjection, dy: Tensor, d_low_rank: Tensor, x: Tensor, low_rank: Tensor) -> None:
        """As `ops.bank.projection.add_gradients`."""
        for narrow, wide, side in ((d_low_rank, x, _A), (low_rank, dy, _B)):
            wide = wide if wide.stride(1) == 1 else wide.contiguous()
            for first, members in _launches(p, side):
                count, widest = min(_MEMBERS, len(p.layers) - first), max(members[6:9])
                size = (
                    GRADIENTS["width"] if widest * self.slots >= GRADIENTS["width"] * 256 else GRADIENTS["width"] // 2
                )
                grid = (triton.cdiv(widest, size), self.slots, count * triton.cdiv(p.pool.max_rank, self.rank))
                _add_gradients[grid](
                    narrow[:, first * p.pool.max_rank :], wide, p.pool.gradient, self.entries, self.scaling,
                    self.blocks, self.starts, self.keep, wide.shape[0], self.slots, p.pool.max_rank,
                    narrow.stride(0), wide.stride(0), *members,
                    SIDE=side, **CONSTANTS, WIDTH=size, RANK=self.rank,
                    num_warps=GRADIENTS["num_warps"], num_stages=GRADIENTS["num_stages"],
                )  # fmt: skip


# Tile sizes, measured (docs/lab, "Many adapters").
DOWN: dict[str, int] = {"tokens": 32, "width": 128, "num_warps": 4, "num_stages": 4}
UP: dict[str, int] = {"tokens": 32, "width": 128, "num_warps": 4, "num_stages": 2}
GRADIENTS: dict[str, int] = {"width": 256, "num_warps": 4, "num_stages": 3}
CONSTANTS: dict[str, Any] = {"BLOCK": BLOCK, "GOLDEN": GOLDEN, "LEVELS": LEVELS}


def down_shape(tokens: int, members: int) -> tuple[int, int]:
    """Tokens of a program, and columns of the wide operand it reads at a time. Short rows take fewer tokens."""
    return (16 if tokens * members < 32 * 64 else DOWN["tokens"]), DOWN["width"]


def _launches(p: BankProjection, side: int) -> list[tuple[int, list[int]]]:
    """Launches of up to `_MEMBERS` members: the first member, and arguments (layers, first columns, widths,
    salts)."""
    launches = []
    for first in range(0, len(p.layers), _MEMBERS):
        layers = list(p.layers[first : first + _MEMBERS])
        rows = list(p.rows[first : first + _MEMBERS])
        layers += [layers[0]] * (_MEMBERS - len(layers))
        rows += [rows[0]] * (_MEMBERS - len(rows))
        columns = [0 if side == _A else row.start for row in rows]
        widths = [layer.d_in if side == _A else layer.d_out for layer in layers]
        launches.append(
            (first, [layer.index for layer in layers] + columns + widths + [layer.salt for layer in layers])
        )
    return launches
