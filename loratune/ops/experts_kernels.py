# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the grouped products, the sort and the sum in `ops.experts`.

A program computes one tile of rows of one expert. The number of tiles depends on the data, so the grid has as many
programs as any routing needs, and each finds its expert from the ends; surplus programs stop at once. Rows are read
through their index, so no sorted copy of the tokens is made. The low-rank part is added before the sum is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.dispatch import at_least_float32
from loratune.ops.experts import Routing

_BLOCK_K = 64
_FEW_ROWS = 512
"""Rows of an average expert, below which tiles are smaller: half-empty tiles would cost more than they save."""


@triton.jit
def _tile(ends_ptr, experts, tile, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Expert, first row and end of a tile of BLOCK rows; the expert is `experts` behind the last tile."""
    index = tl.arange(0, EXPERTS)
    inside = index < experts
    ends = tl.load(ends_ptr + index, mask=inside, other=0)
    begins = tl.load(ends_ptr + index - 1, mask=inside & (index > 0), other=0)
    tiles = tl.where(inside, (ends - begins + BLOCK - 1) // BLOCK, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((inside & (last <= tile)).to(tl.int32), 0)
    here = index == expert
    first = tl.sum(tl.where(here, last - tiles, 0), 0)
    begin = tl.sum(tl.where(here, begins, 0), 0) + (tile - first) * BLOCK
    return expert, begin, tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def _grouped_product(
    x_ptr, w_ptr, ends_ptr, rows_ptr, low_ptr, added_ptr, out_ptr,
    experts, width, depth, rank, x_row, w_expert, w_depth, w_column, a_expert, a_rank, a_column,
    GATHER: tl.constexpr, ADDED: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of x W + low added, (ROWS, COLUMNS). Reads DEPTH of the inner dimension at a time."""
    expert, begin, end = _tile(ends_ptr, experts, tl.program_id(1), EXPERTS, ROWS)
    if expert < experts:
        place = begin + tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        row_in, column_in = place < end, column < width
        row = place.to(tl.int64)
        if GATHER:
            row = tl.load(rows_ptr + place, mask=row_in, other=0)
        inner = tl.arange(0, DEPTH)
        x_at = x_ptr + row[:, None] * x_row + inner[None, :]
        which = expert.to(tl.int64)
        w_at = w_ptr + which * w_expert + inner[:, None].to(tl.int64) * w_depth + column[None, :] * w_column
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            inner_in = start + inner < depth
            x = tl.load(x_at, mask=row_in[:, None] & inner_in[None, :], other=0.0)
            w = tl.load(w_at, mask=inner_in[:, None] & column_in[None, :], other=0.0)
            total = tl.dot(x, w, total, input_precision=PRECISION)
            x_at += DEPTH
            w_at += DEPTH * w_depth
        if ADDED:
            j = tl.arange(0, RANK)
            j_in = j < rank
            low = tl.load(
                low_ptr + place[:, None].to(tl.int64) * rank + j[None, :],
                mask=row_in[:, None] & j_in[None, :], other=0.0,
            )  # fmt: skip
            added = tl.load(
                added_ptr + which * a_expert + j[:, None] * a_rank + column[None, :] * a_column,
                mask=j_in[:, None] & column_in[None, :], other=0.0,
            )  # fmt: skip
            total = tl.dot(low, added, total, input_precision=PRECISION)
        out_at = out_ptr + place[:, None].to(tl.int64) * width + column[None, :]
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


def grouped_product(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Tensor | None = None,
    low: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """See `ops.experts.grouped_product`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    count, (experts, depth, width) = (x if rows is None else rows).shape[0], weight.shape
    out = x.new_empty(count, width)
    rank = 0 if low is None else low.shape[1]
    block = 128 if count >= _FEW_ROWS * experts else 64
    columns = min(128, max(16, triton.next_power_of_2(width)))
    tiles = min(count, triton.cdiv(count, block) + experts)
    low = low if low is None else low.contiguous()
    _grouped_product[triton.cdiv(width, columns), tiles](
        x, weight, ends, rows, low, added, out,
        experts, width, depth, rank, x.stride(0), *weight.stride(), *((0, 0, 0) if added is None else added.stride()),
        GATHER=rows is not None, ADDED=low is not None,
        EXPERTS=triton.next_power_of_2(experts), RANK=max(16, triton.next_power_of_2(max(1, rank))),
        ROWS=block, COLUMNS=columns, DEPTH=_BLOCK_K if x.element_size() == 2 else 32,
        PRECISION="tf32" if x.element_size() == 2 else "ieee",
        num_warps=8 if block == 128 and columns == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _grouped_outer(
    low_ptr, x_ptr, ends_ptr, rows_ptr, out_ptr,
    width, rank, scale, x_row, o_expert, o_rank, o_column,
    GATHER: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of lowᵀ x of one expert, (RANK, COLUMNS). Reads DEPTH rows at a time."""
    expert = tl.program_id(1)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    j, step = tl.arange(0, RANK), tl.arange(0, DEPTH)
    column_in, j_in = column < width, j < rank
    total = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for start in range(begin, end, DEPTH):
        place = start + step
        row_in = place < end
        row = place.to(tl.int64)
        low = tl.load(low_ptr + row[None, :] * rank + j[:, None], mask=j_in[:, None] & row_in[None, :], other=0.0)
        if GATHER:
            row = tl.load(rows_ptr + place, mask=row_in, other=0)
        x = tl.load(
            x_ptr + row[:, None] * x_row + column[None, :], mask=row_in[:, None] & column_in[None, :], other=0.0
        )
        total = tl.dot(low, x, total, input_precision=PRECISION)
    out_at = out_ptr + expert.to(tl.int64) * o_expert + j[:, None] * o_rank + column[None, :].to(tl.int64) * o_column
    tl.store(out_at, total * scale, mask=j_in[:, None] & column_in[None, :])


def grouped_outer(
    low: Tensor,
    x: Tensor,
    ends: Tensor,
    rows: Tensor | None = None,
    expert_last: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """See `ops.experts.grouped_outer`."""
    low, x = low.contiguous(), x if x.stride(1) == 1 else x.contiguous()
    experts, rank, width = ends.shape[0], low.shape[1], x.shape[1]
    shape = (width, rank, experts) if expert_last else (experts, rank, width)
    out = x.new_empty(shape, dtype=at_least_float32(x[:0]).dtype)
    out = out.permute(2, 1, 0) if expert_last else out
    columns = min(128, max(16, triton.next_power_of_2(width)))
    _grouped_outer[triton.cdiv(width, columns), experts](
        low, x, ends, rows, out, width, rank, scale, x.stride(0), *out.stride(),
        GATHER=rows is not None, RANK=max(16, triton.next_power_of_2(rank)), COLUMNS=columns,
        DEPTH=64 if x.element_size() == 2 else 32, PRECISION="tf32" if x.element_size() == 2 else "ieee",
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _combine(
    rows_ptr, places_ptr, weights_ptr, bias_ptr, index_ptr, out_ptr, width,
    CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token: the sum of its rows, with their biases, times weights; float32 inside."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(CHOICES):
        place = tl.load(places_ptr + token * CHOICES + choice).to(tl.int64)
        value = tl.load(rows_ptr + place * width + column, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            expert = tl.load(index_ptr + token * CHOICES + choice).to(tl.int64)
            value += tl.load(bias_ptr + expert * width + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights_ptr + token * CHOICES + choice).to(tl.float32)
        total += value
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(
    rows: Tensor,
    places: Tensor,
    weights: Tensor | None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """See `ops.experts.combine`."""
    rows, places = rows.contiguous(), places.contiguous()
    (tokens, choices), width = places.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    block = min(1024, triton.next_power_of_2(width))
    weights, bias, index = (None if tensor is None else tensor.contiguous() for tensor in (weights, bias, index))
    _combine[tokens, triton.cdiv(width, block)](
        rows, places, weights, bias, index, out, width,
        CHOICES=choices, WEIGHTED=weights is not None, BIAS=bias is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _route(
    index_ptr, order_ptr, places_ptr, tokens_ptr, experts_ptr, ends_ptr, count,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A counting sort: one program finds the places of one expert. Reads all choices twice, from the cache."""
    expert, step = tl.program_id(0), tl.arange(0, BLOCK)
    smaller, same = tl.zeros((BLOCK,), dtype=tl.int32), tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, count, BLOCK):
        chosen = tl.load(index_ptr + start + step, mask=start + step < count, other=expert + 1)
        smaller += (chosen < expert).to(tl.int32)
        same += (chosen == expert).to(tl.int32)
    begin = tl.sum(smaller, 0)
    tl.store(ends_ptr + expert, begin + tl.sum(same, 0))
    for start in range(0, count, BLOCK):
        pair = start + step
        chosen = tl.load(index_ptr + pair, mask=pair < count, other=expert + 1)
        here = (chosen == expert).to(tl.int32)
        place = begin + tl.cumsum(here, 0) - 1
        tl.store(order_ptr + place, pair.to(tl.int64), mask=here > 0)
        tl.store(places_ptr + pair, place.to(tl.int64), mask=here > 0)
        tl.store(tokens_ptr + place, (pair // CHOICES).to(tl.int64), mask=here > 0)
        tl.store(experts_ptr + place, tl.zeros((BLOCK,), dtype=tl.int64) + expert, mask=here > 0)
        begin += tl.sum(here, 0)


def route(index: Tensor, experts: int) -> Routing:
    """See `ops.experts.route`."""
    index = index.contiguous()
    order, places, tokens, sorted_experts = (index.new_empty(index.numel()) for _ in range(4))
    ends = index.new_empty(experts, dtype=torch.int32)
    _route[(experts,)](
        index, order, places, tokens, sorted_experts, ends, index.numel(),
        CHOICES=index.shape[1], BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return Routing(order, places, tokens, sorted_experts, ends)
