# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""SwiGLU of a bank's rows together with the low-rank parts of both neighbouring projections.

    forward     active = silu(gate + low rank) * (up + low rank)
    backward    d_active + low rank -> gradients of gate and up, and active recomputed

Adding a low-rank part to a wide tensor reads and writes the tensor once more, and gate and up are the widest of a
layer: 134 MB for a Llama-3.2-1B with 4,096 tokens, a fifth of the cost of their product. These kernels read the
tensors anyway and add the low-rank parts at the same time. The wide tensors stay as the frozen products wrote them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.bank.kernels import BLOCK, CONSTANTS, kept

if TYPE_CHECKING:
    from loratune.ops.bank.projection import BankProjection

_TOKENS, _WIDTH = 32, 128


@triton.jit
def _low_rank(
    low_rank_ptr, factor_ptr, row, there, column, inside, rank, low_rank_stride, width,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """(TOKENS, WIDTH): low_rank[t, :rank] factor[:rank, n], in float32."""
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK)
        held = r < rank
        left = tl.load(
            low_rank_ptr + row[:, None] * low_rank_stride + r[None, :], mask=there & held[None, :], other=0.0
        )
        right = tl.load(
            factor_ptr + r.to(tl.int64)[:, None] * width + column[None, :], mask=held[:, None] & inside, other=0.0
        )
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _gate_and_up(
    gate_up_ptr, low_rank_ptr, work_ptr, entries_ptr, scaling_ptr, slot, slots, row, there, column, inside,
    width, max_rank, low_rank_stride, layer0, layer1,
    GATE: tl.constexpr, UP: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Gate and up in float32, with the low-rank part of the slot's adapter."""
    at = gate_up_ptr + row[:, None] * 2 * width + column[None, :]
    gate = tl.load(at, mask=there & inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=there & inside, other=0.0).to(tl.float32)
    if slot >= 0:
        if GATE:
            entry = layer0 * slots + slot
            rank = tl.load(entries_ptr + entry * 4).to(tl.int32)
            factor = work_ptr + tl.multiple_of(tl.load(entries_ptr + entry * 4 + 2), 16)
            part = _low_rank(
                low_rank_ptr, factor, row, there, column, inside, rank, low_rank_stride, width, TOKENS, WIDTH, RANK
            )
            gate += part * tl.load(scaling_ptr + entry)
        if UP:
            entry = layer1 * slots + slot
            rank = tl.load(entries_ptr + entry * 4).to(tl.int32)
            factor = work_ptr + tl.multiple_of(tl.load(entries_ptr + entry * 4 + 2), 16)
            part = _low_rank(
                low_rank_ptr + (max_rank if GATE else 0), factor, row, there, column, inside, rank, low_rank_stride,
                width, TOKENS, WIDTH, RANK,
            )  # fmt: skip
            up += part * tl.load(scaling_ptr + entry)
    return gate, up


@triton.jit(do_not_specialize=["layer0", "layer1"])
def _swiglu(
    gate_up_ptr, low_rank_ptr, out_ptr, work_ptr, entries_ptr, scaling_ptr, blocks_ptr,
    tokens, slots, max_rank, width, low_rank_stride, layer0, layer1,
    GATE: tl.constexpr, UP: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TOKENS
    slot = tl.load(blocks_ptr + first // BLOCK * 8)
    row, column = (first + tl.arange(0, TOKENS)).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there, inside = (row < tokens)[:, None], (column < width)[None, :]
    gate, up = _gate_and_up(
        gate_up_ptr, low_rank_ptr, work_ptr, entries_ptr, scaling_ptr, slot, slots, row, there, column, inside,
        width, max_rank, low_rank_stride, layer0, layer1, GATE, UP, TOKENS, WIDTH, RANK,
    )  # fmt: skip
    kind = out_ptr.dtype.element_ty
    active = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up
    tl.store(out_ptr + row[:, None] * width + column[None, :], active.to(kind), mask=there & inside)


@triton.jit(do_not_specialize=["layer0", "layer1", "layer2", "salt"])
def _swiglu_backward(
    gate_up_ptr, low_rank_ptr, d_active_ptr, d_low_rank_ptr, d_gate_up_ptr, active_ptr,
    work_ptr, entries_ptr, scaling_ptr, blocks_ptr, keep_ptr,
    tokens, slots, max_rank, width, low_rank_stride, d_low_rank_stride, layer0, layer1, layer2, salt,
    GATE: tl.constexpr, UP: tl.constexpr, BLOCK: tl.constexpr, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TOKENS
    block_ptr = blocks_ptr + first // BLOCK * 8
    slot = tl.load(block_ptr)
    token, column = tl.arange(0, TOKENS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row = (first + token).to(tl.int64)
    there, inside = (row < tokens)[:, None], (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    d_active = tl.load(d_active_ptr + at, mask=there & inside, other=0.0).to(tl.float32)
    if slot >= 0:
        entry = layer2 * slots + slot
        rank = tl.load(entries_ptr + entry * 4).to(tl.int32)
        factor = work_ptr + tl.multiple_of(tl.load(entries_ptr + entry * 4 + 1), 16)
        part = _low_rank(
            d_low_rank_ptr, factor, row, there, column, inside, rank, d_low_rank_stride, width, TOKENS, WIDTH, RANK
        )
        if tl.load(block_ptr + 4) > 0:
            staying = kept(block_ptr, first % BLOCK + token, column, salt, GOLDEN, LEVELS)
            part = tl.where(staying, part * tl.load(keep_ptr + slot), 0.0)
        d_active += part
    gate, up = _gate_and_up(
        gate_up_ptr, low_rank_ptr, work_ptr, entries_ptr, scaling_ptr, slot, slots, row, there, column, inside,
        width, max_rank, low_rank_stride, layer0, layer1, GATE, UP, TOKENS, WIDTH, RANK,
    )  # fmt: skip
    kind = active_ptr.dtype.element_ty
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_active * up * (sigmoid + silu * (1 - sigmoid))
    both = d_gate_up_ptr + row[:, None] * 2 * width + column[None, :]
    tl.store(both, d_gate.to(kind), mask=there & inside)
    tl.store(both + width, (d_active * silu).to(kind), mask=there & inside)
    tl.store(active_ptr + at, (silu.to(kind).to(tl.float32) * up).to(kind), mask=there & inside)


def swiglu(p: BankProjection, gate_up: Tensor, low_rank: Tensor) -> Tensor:
    """SwiGLU of gate and up with the low-rank part that `p` deferred; (N, 2 m) -> (N, m)."""
    tables, (rows, width) = p.pool.tables, (gate_up.shape[0], gate_up.shape[1] // 2)
    out, (layers, flags) = gate_up.new_empty(rows, width), _halves(p, width)
    _swiglu[(triton.cdiv(rows, _TOKENS), triton.cdiv(width, _WIDTH))](
        gate_up, low_rank, out, tables.work, tables.entries, tables.scaling, tables.blocks,
        rows, tables.slots, p.pool.max_rank, width, low_rank.stride(0), *layers, **flags, BLOCK=BLOCK,
        TOKENS=_TOKENS, WIDTH=_WIDTH, RANK=min(tables.rank, 32), num_warps=4,
    )  # fmt: skip
    return out


def swiglu_backward(
    p: BankProjection,
    gate_up: Tensor,
    low_rank: Tensor,
    d_active: Tensor,
    following: BankProjection,
    d_low_rank: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up, (N, 2 m), and swiglu of them, (N, m).

    Args:
        p: the projection of gate and up.
        gate_up, low_rank: output of `p` without its low-rank part, and its low-rank activation.
        d_active: gradient of the activation from the frozen part of `following`, (N, m).
        following, d_low_rank: the second projection, and the gradient of its low-rank activation.
    """
    tables, (rows, width) = p.pool.tables, (gate_up.shape[0], gate_up.shape[1] // 2)
    d_gate_up, active, (layers, flags) = (
        gate_up.new_empty(rows, 2 * width),
        gate_up.new_empty(rows, width),
        _halves(p, width),
    )
    _swiglu_backward[(triton.cdiv(rows, _TOKENS), triton.cdiv(width, _WIDTH))](
        gate_up, low_rank, d_active, d_low_rank, d_gate_up, active,
        tables.work, tables.entries, tables.scaling, tables.blocks, tables.keep,
        rows, tables.slots, p.pool.max_rank, width, low_rank.stride(0), d_low_rank.stride(0), *layers,
        following.layers[0].index, following.layers[0].salt, **flags, **CONSTANTS,
        TOKENS=_TOKENS, WIDTH=_WIDTH, RANK=min(tables.rank, 32), num_warps=4,
    )  # fmt: skip
    return d_gate_up, active


def _halves(p: BankProjection, width: int) -> tuple[list[int], dict[str, bool]]:
    """Indices of the layers of gate and up, and a flag for each that is True if the layer exists."""
    by_start = {rows.start: layer.index for rows, layer in zip(p.rows, p.layers, strict=True)}
    flags = {"GATE": 0 in by_start, "UP": width in by_start}
    return [by_start.get(0, 0), by_start.get(width, 0)], flags
