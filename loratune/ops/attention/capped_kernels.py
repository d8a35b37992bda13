# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton kernels of `ops.attention.capped`: attention with soft caps and sinks, bfloat16 or float16 on a GPU.

    _forward        one program for a block of queries of a head; loops over visible keys with running maximum and sum
    _queries_part   the same loop for dQ; also writes delta = sum(dO * O) of every query
    _keys_part      one program for a block of keys of a kv head; loops over the queries that see it, for dK and dV

The bound is arithmetic: two products of (queries, keys) tiles forward, five backward. Probabilities are recomputed
from the logsumexp of each query. One program computes each sum, in a fixed order, so results are the same to the bit
each time. The keys visible to a query form one interval: it begins with the document or the window and ends with the
query. Two numbers from the table of spans therefore bound each loop, and invisible blocks are never read.

Source: Dao 2023, arXiv:2307.08691; the gradient through the cap c tanh(s / c) is 1 - tanh^2(s / c).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_NOTHING = tl.constexpr(-1e30)
"""Score of invisible keys; finite, so that a difference of two such scores is defined."""
_VARYING = ["tokens", "window"]


class Tile(NamedTuple):
    """Size of one block of scores, and warps and pipeline stages of the program."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _load(ptr, at, stride, count, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `at` to `at + ROWS` of a matrix, (ROWS, WIDTH); zeros from row `count` and column DIM on."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (at + row < count)[:, None] & (column < DIM)[None, :]
    ptr += tl.cast(at, tl.int64) * stride
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, value, at, stride, count, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (at + row < count)[:, None] & (column < DIM)[None, :]
    ptr += tl.cast(at, tl.int64) * stride
    tl.store(ptr + row[:, None] * stride + column[None, :], value, mask=inside)


@triton.jit
def _capped(product, scaling, softcap, CAP: tl.constexpr):
    """Scores in base 2, and the derivative of the soft cap."""
    score, slope = product * scaling, 1.0
    if CAP:
        share = 2 * tl.sigmoid(2 * score / softcap) - 1  # tanh
        score, slope = softcap * share, 1 - share * share
    return score * _LOG2E, slope


@triton.jit(do_not_specialize=_VARYING)
def _forward(
    q_ptr, k_ptr, v_ptr, sinks_ptr, spans_ptr, out_ptr, lse_ptr, tokens, window, groups, scaling, softcap,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token,
    CAP: tl.constexpr, SINKS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest loops start first
    head = tl.program_id(1)
    row = at + tl.arange(0, ROWS)
    first = tl.load(spans_ptr + row, mask=row < tokens, other=tokens)
    first = tl.maximum(first, row - window + 1)
    q_ptr += head.to(tl.int64) * q_head
    k_ptr += (head // groups).to(tl.int64) * k_head
    v_ptr += (head // groups).to(tl.int64) * v_head
    q = _load(q_ptr, at, q_token, tokens, ROWS, DIM, WIDTH)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    if SINKS:
        most = tl.zeros((ROWS,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        total = tl.full((ROWS,), 1.0, tl.float32)
    else:
        most, total = tl.full((ROWS,), _NOTHING, tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(tl.min(first) // COLUMNS * COLUMNS, tl.minimum(at + ROWS, tokens), COLUMNS):
        k = _load(k_ptr, start, k_token, tokens, COLUMNS, DIM, WIDTH)
        score, _ = _capped(tl.dot(q, tl.trans(k)), scaling, softcap, CAP)
        column = (start + tl.arange(0, COLUMNS))[None, :]
        seen = (column <= row[:, None]) & (column >= first[:, None])
        higher = tl.maximum(most, tl.max(tl.where(seen, score, _NOTHING), 1))
        share = tl.exp2(tl.where(seen, score - higher[:, None], _NOTHING))
        shrunk = tl.exp2(most - higher)
        total = total * shrunk + tl.sum(share, 1)
        v = _load(v_ptr, start, v_token, tokens, COLUMNS, DIM, WIDTH)
        out = tl.dot(share.to(v.dtype), v, out * shrunk[:, None])
        most = higher
    total = tl.where(row < tokens, total, 1.0)
    tl.store(lse_ptr + head * tokens + row, most + tl.log2(total), mask=row < tokens)
    _store(out_ptr + head * DIM, out / total[:, None], at, out_token, tokens, ROWS, DIM, WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def _queries_part(
    q_ptr, k_ptr, v_ptr, spans_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, d_q_ptr,
    tokens, window, groups, scaling, softcap,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token,
    CAP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    row = at + tl.arange(0, ROWS)
    first = tl.load(spans_ptr + row, mask=row < tokens, other=tokens)
    first = tl.maximum(first, row - window + 1)
    q_ptr += head.to(tl.int64) * q_head
    k_ptr += (head // groups).to(tl.int64) * k_head
    v_ptr += (head // groups).to(tl.int64) * v_head
    q = _load(q_ptr, at, q_token, tokens, ROWS, DIM, WIDTH)
    d_out = _load(d_out_ptr + head * DIM, at, out_token, tokens, ROWS, DIM, WIDTH)
    out = _load(out_ptr + head * DIM, at, out_token, tokens, ROWS, DIM, WIDTH)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + head * tokens + row, delta, mask=row < tokens)
    lse = tl.load(lse_ptr + head * tokens + row, mask=row < tokens, other=0.0)
    d_q = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(tl.min(first) // COLUMNS * COLUMNS, tl.minimum(at + ROWS, tokens), COLUMNS):
        k = _load(k_ptr, start, k_token, tokens, COLUMNS, DIM, WIDTH)
        v = _load(v_ptr, start, v_token, tokens, COLUMNS, DIM, WIDTH)
        score, slope = _capped(tl.dot(q, tl.trans(k)), scaling, softcap, CAP)
        column = (start + tl.arange(0, COLUMNS))[None, :]
        seen = (column <= row[:, None]) & (column >= first[:, None])
        share = tl.exp2(tl.where(seen, score - lse[:, None], _NOTHING))
        d_score = share * (tl.dot(d_out, tl.trans(v)) - delta[:, None]) * slope
        d_q = tl.dot(d_score.to(k.dtype), k, d_q)
    _store(d_q_ptr + head * DIM, d_q * scaling, at, out_token, tokens, ROWS, DIM, WIDTH)


@triton.jit(do_not_specialize=_VARYING)
def _keys_part(
    q_ptr, k_ptr, v_ptr, spans_ptr, d_out_ptr, lse_ptr, delta_ptr, d_k_ptr, d_v_ptr,
    tokens, window, groups, scaling, softcap,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, d_token,
    CAP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, shared = tl.program_id(0) * COLUMNS, tl.program_id(1)
    column = at + tl.arange(0, COLUMNS)
    end = tl.load(spans_ptr + tokens + column, mask=column < tokens, other=0)
    end = tl.minimum(end, column + window)  # the first position that no longer sees the key
    k = _load(k_ptr + shared.to(tl.int64) * k_head, at, k_token, tokens, COLUMNS, DIM, WIDTH)
    v = _load(v_ptr + shared.to(tl.int64) * v_head, at, v_token, tokens, COLUMNS, DIM, WIDTH)
    d_k, d_v = tl.zeros((COLUMNS, WIDTH), tl.float32), tl.zeros((COLUMNS, WIDTH), tl.float32)
    for head in range(shared * groups, shared * groups + groups):
        for start in range(at // ROWS * ROWS, tl.max(end), ROWS):
            q = _load(q_ptr + tl.cast(head, tl.int64) * q_head, start, q_token, tokens, ROWS, DIM, WIDTH)
            d_out = _load(d_out_ptr + head * DIM, start, out_token, tokens, ROWS, DIM, WIDTH)
            row = start + tl.arange(0, ROWS)
            lse = tl.load(lse_ptr + head * tokens + row, mask=row < tokens, other=0.0)
            delta = tl.load(delta_ptr + head * tokens + row, mask=row < tokens, other=0.0)
            score, slope = _capped(tl.dot(k, tl.trans(q)), scaling, softcap, CAP)
            seen = (row[None, :] >= column[:, None]) & (row[None, :] < end[:, None])
            share = tl.exp2(tl.where(seen, score - lse[None, :], _NOTHING))
            d_v = tl.dot(share.to(d_out.dtype), d_out, d_v)
            d_score = share * (tl.dot(v, tl.trans(d_out)) - delta[None, :]) * slope
            d_k = tl.dot(d_score.to(q.dtype), q, d_k)
    _store(d_k_ptr + shared * DIM, d_k * scaling, at, d_token, tokens, COLUMNS, DIM, WIDTH)
    _store(d_v_ptr + shared * DIM, d_v, at, d_token, tokens, COLUMNS, DIM, WIDTH)


def _large_shared_memory(device: torch.device) -> bool:
    """True if a block has the shared memory of an H100, 227 KiB; most other GPUs have about 99 KiB."""
    if device.type != "cuda":
        return True
    found: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return found >= 227 << 10


def _tiles(width: int, large: bool) -> tuple[Tile, Tile, Tile]:
    """Tiles of the three kernels; `tests/ops/test_compile.py` checks that they fit in shared memory."""
    if width <= 64:
        return Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)
    if width <= 128:
        if large:
            return Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)
        return Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)
    if large:
        return Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)
    return Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)


class _Launch(NamedTuple):
    """Arguments that the three kernels share."""

    numbers: tuple[int | float, ...]
    strides: tuple[int, ...]
    constants: dict[str, int | bool]
    tiles: tuple[Tile, Tile, Tile]


def _launch(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None) -> _Launch:
    (tokens, heads, dim), width = q.shape, max(16, triton.next_power_of_2(q.shape[-1]))
    numbers = (tokens, window or tokens, heads // k.shape[1], scaling, softcap or 1.0)
    strides = (*(stride for tensor in (q, k, v) for stride in tensor.stride()[:2]), heads * dim)
    constants = {"CAP": softcap is not None, "DIM": dim, "WIDTH": width}
    return _Launch(numbers, strides, constants, _tiles(width, _large_shared_memory(q.device)))


def _of(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.queries, "COLUMNS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    sinks: Tensor | None,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The output, (T, heads, head_dim), and the logsumexp in base 2 of every query, (heads, T) float32.

    Args:
        q: (T, heads, head_dim); k, v: (T, kv_heads, head_dim); the numbers of one head are contiguous.
        spans: see `ops.attention.capped.DocumentSpans`.
        sinks: (heads,), contiguous, or None.
    """
    tokens, heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(heads, tokens, dtype=torch.float32)
    launch = _launch(q, k, v, scaling, window, softcap)
    tile = launch.tiles[0]
    _forward[(triton.cdiv(tokens, tile.queries), heads)](
        q, k, v, lse if sinks is None else sinks, spans, out, lse, *launch.numbers, *launch.strides,
        SINKS=sinks is not None, **launch.constants, **_of(tile),
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    out: Tensor,
    lse: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous. The logsumexp includes the sinks, which receive no gradient.

    Args:
        d_out: (T, heads, head_dim), contiguous like `out`.
    """
    (tokens, heads, _), shared = q.shape, k.shape[1]
    d_q, d_k, d_v, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    launch = _launch(q, k, v, scaling, window, softcap)
    tile = launch.tiles[1]
    _queries_part[(triton.cdiv(tokens, tile.queries), heads)](
        q, k, v, spans, out, d_out, lse, delta, d_q, *launch.numbers, *launch.strides, **launch.constants, **_of(tile)
    )
    tile = launch.tiles[2]
    _keys_part[(triton.cdiv(tokens, tile.keys), shared)](
        q, k, v, spans, d_out, lse, delta, d_k, d_v, *launch.numbers, *launch.strides, d_k.stride(0),
        **launch.constants, **_of(tile),
    )  # fmt: skip
    return d_q, d_k, d_v
