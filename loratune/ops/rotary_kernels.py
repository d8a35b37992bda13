# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twins of the rotation of heads in `ops.layer`, for bfloat16 and float16 on a GPU.

One launch normalises and rotates the heads of all tokens; its backward also joins the gradients of queries, keys and
values into rows for the projection. Terms used here:

    slot    a head's place in memory within its token's row
    head    its number in the order queries, keys, values; equal to the slot unless heads are grouped
    pair    two elements rotated together: tiles `a` and `b` hold the first and the second elements of all pairs,
            tile `c` the elements from `rotary_dim` on

Sizes that are not powers of two are masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.dispatch import unit_stride
from loratune.ops.layer import HeadSpec
from loratune.ops.measure import PIECES, Measure
from loratune.ops.measure_kernels import measure_arguments, scaled, store_statistics, warps
from loratune.ops.norm_kernels import form_of, load_weight, weighted

_PER_HEAD, _WHOLE = tl.constexpr(1), tl.constexpr(2)


class _Pairs(NamedTuple):
    """Constants of the kernels that describe a head."""

    DIM: int
    PAIRS: int
    """Pairs in a head. Without a rotation, half of its elements, so that tiles still divide a head."""
    HALF: int
    """PAIRS, rounded up to a power of two."""
    REST: int
    """Elements after the pairs, rounded up to a power of two; 0 for none."""
    ROTATE: bool
    INTERLEAVED: bool
    EACH: int
    """Query heads for each key head if heads are grouped, else 0."""
    NORM: int
    """0, `_PER_HEAD` or `_WHOLE`."""
    FORM: int
    """Form of the norm (`ops.norm_kernels.form_of`); 0 without a norm."""


def _pairs_of(heads: HeadSpec) -> _Pairs:
    pairs = (heads.rotary_dim or heads.dim) // 2
    rest = heads.dim - 2 * pairs
    return _Pairs(
        heads.dim,
        pairs,
        triton.next_power_of_2(pairs),
        triton.next_power_of_2(rest) if rest else 0,
        heads.rotary_dim > 0,
        heads.interleaved and heads.rotary_dim > 0,
        heads.query // heads.key_value if heads.grouped else 0,
        0 if heads.norm is None else 2 if heads.whole_width else 1,
        0 if heads.norm is None else form_of(heads.norm),
    )


def _sizes(heads: HeadSpec, slots: int, block: int, measured: bool) -> tuple[int, dict[str, int]]:
    """Programs for each token; slots and warps of a program. A norm or a measure may need more slots than `block`."""
    if measured:  # a row has space for the statistics of PIECES programs
        block = max(block, triton.next_power_of_2(triton.cdiv(slots, PIECES)))
    if heads.norm is not None and heads.whole_width:
        block = triton.next_power_of_2(slots)
        return 1, {"HEADS": block, "num_warps": warps(block * heads.dim)}
    return triton.cdiv(slots, block), {"HEADS": block, "num_warps": 4}


@triton.jit
def _head_of(slot, queries, keys, EACH: tl.constexpr):
    """Number of the head in a slot."""
    if EACH == 0:
        head = slot
    else:
        group, place = slot // (EACH + 2), slot % (EACH + 2)
        key_or_value = tl.where(place == EACH, queries + group, queries + keys + group)
        head = tl.where(place < EACH, group * EACH + place, key_or_value)
    return head


@triton.jit
def _columns(j, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of the first and the second element of pair j in a head."""
    if INTERLEAVED:
        first, second = 2 * j, 2 * j + 1
    else:
        first, second = j, j + PAIRS
    return first, second


@triton.jit
def _load_pairs(
    ptr, at, column, inside, both_inside, HEADS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """First and second elements of all pairs, (HEADS, HALF) float32, from heads at `ptr + at`.

    Interleaved pairs are loaded as one tile of neighbouring columns and divided in registers. Two loads of every
    second element would read each line twice.
    """
    if INTERLEAVED:
        x = tl.load(ptr + at + column, mask=both_inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    else:
        a = tl.load(ptr + at + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(ptr + at + column + PAIRS, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(
    ptr, at, column, a, b, inside, both_inside, HEADS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Stores the tiles that `_load_pairs` loads."""
    if INTERLEAVED:
        tl.store(ptr + at + column, tl.reshape(tl.join(a, b), (HEADS, 2 * HALF)), mask=both_inside)
    else:
        tl.store(ptr + at + column, a, mask=inside)
        tl.store(ptr + at + column + PAIRS, b, mask=inside)


@triton.jit
def _angles(cos_ptr, sin_ptr, token, j, inside, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """cos and sin of both elements of each pair, float32."""
    at = token * 2 * PAIRS + j
    if PAIRS == HALF:
        cos_a, sin_a = tl.load(cos_ptr + at).to(tl.float32), tl.load(sin_ptr + at).to(tl.float32)
    else:
        cos_a = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if INTERLEAVED:
        cos_b, sin_b = cos_a, sin_a
    elif PAIRS == HALF:
        cos_b, sin_b = tl.load(cos_ptr + at + PAIRS).to(tl.float32), tl.load(sin_ptr + at + PAIRS).to(tl.float32)
    else:
        cos_b = tl.load(cos_ptr + at + PAIRS, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + at + PAIRS, mask=inside, other=0.0).to(tl.float32)
    return cos_a, cos_b, sin_a, sin_b


@triton.jit
def _head_mean(sums, head, queries, keys, DIM: tl.constexpr, NORM: tl.constexpr):
    """Means over each head, or over all query and over all key columns, from sums over each head; (HEADS, 1)."""
    if NORM == _PER_HEAD:
        mean = (sums / DIM)[:, None]
    else:
        sums, is_query = sums[:, None], head < queries
        query_mean = tl.sum(tl.where(is_query, sums, 0.0)) / (queries * DIM)
        key_mean = tl.sum(tl.where(is_query | (head >= queries + keys), 0.0, sums)) / (keys * DIM)
        mean = tl.where(is_query, query_mean, key_mean)
    return mean


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, queries, keys, eps, offset,
    DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, EACH: tl.constexpr, NORM: tl.constexpr, FORM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of query and key heads.

    A program takes HEADS slots of a token. Moves 4 bytes for each element of a rotated head; with a norm, of every
    head, because the result is then in new memory.
    """
    token = tl.program_id(0).to(tl.int64)
    slot, j = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, HALF)[None, :]
    head = _head_of(slot, queries, keys, EACH)
    rotated = queries + keys
    heads = rotated + keys
    inside = slot < heads
    if PAIRS != HALF:
        inside = inside & (j < PAIRS)
    first, second = _columns(j, PAIRS, INTERLEAVED)
    column, both_inside = first, inside
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        both_inside = (slot < heads) & (column < 2 * PAIRS)
    at = (token * heads + slot) * DIM
    a0, b0 = _load_pairs(x_ptr, at, column, inside, both_inside, HEADS, PAIRS, HALF, INTERLEAVED)
    a, b = a0, b0
    if NORM > 0:
        kind = out_ptr.dtype.element_ty
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST > 0:
            k = tl.arange(0, REST)[None, :]
            behind = (slot < heads) & (k < DIM - 2 * PAIRS)
            c0 = tl.load(x_ptr + at + 2 * PAIRS + k, mask=behind, other=0.0).to(tl.float32)
            squares += tl.sum(c0 * c0, 1)
        inverse = tl.rsqrt(_head_mean(squares, head, queries, keys, DIM, NORM) + eps)
        normed = inside & (head < rotated)
        weight_a = load_weight(weight_ptr, head * DIM + first, normed, offset, FORM)
        weight_b = load_weight(weight_ptr, head * DIM + second, normed, offset, FORM)
        a = weighted(a * inverse, weight_a, kind, FORM).to(kind).to(tl.float32)
        b = weighted(b * inverse, weight_b, kind, FORM).to(kind).to(tl.float32)
        if REST > 0:
            weight_c = load_weight(weight_ptr, head * DIM + 2 * PAIRS + k, behind & (head < rotated), offset, FORM)
            c = weighted(c0 * inverse, weight_c, kind, FORM)
            tl.store(out_ptr + at + 2 * PAIRS + k, tl.where(head < rotated, c, c0), mask=behind)
    if ROTATE:
        cos_a, cos_b, sin_a, sin_b = _angles(cos_ptr, sin_ptr, token, j, j < PAIRS, PAIRS, HALF, INTERLEAVED)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    a, b = tl.where(head < rotated, a, a0), tl.where(head < rotated, b, b0)
    _store_pairs(out_ptr, at, column, a, b, inside, both_inside, HEADS, PAIRS, HALF, INTERLEAVED)


def rotate_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, heads: HeadSpec) -> Tensor:
    """As `ops.layer.rotate_heads`."""
    norm, x = heads.norm, x.contiguous()
    if norm is None and heads.rotary_dim == 0:
        return x
    cos, sin = (x if table is None else table.contiguous() for table in (cos, sin))
    out = x if norm is None else torch.empty_like(x)
    slots = heads.rotated if norm is None and not heads.grouped else heads.total
    pairs = _pairs_of(heads)
    read = 2 * pairs.HALF if norm is None else triton.next_power_of_2(heads.dim)
    programs, sizes = _sizes(heads, slots, max(1, 1024 // read), measured=False)
    weight, eps, offset = (x, 0.0, 0.0) if norm is None else (norm.weight, norm.eps, norm.offset)
    _rotate[(x.shape[0], programs)](
        x, cos, sin, weight, out, heads.query, heads.key_value, eps, offset, **pairs._asdict(), **sizes
    )
    return out


@triton.jit
def _gradient_at(
    d_query_ptr, d_key_ptr, d_value_ptr, token, head, column, queries, keys,
    query_token, query_head, key_token, key_head, value_token, value_head,
):  # fmt: skip
    """Addresses of a column in the gradients of heads."""
    rotated = queries + keys
    query_at = d_query_ptr + token * query_token + head * query_head + column
    key_at = d_key_ptr + token * key_token + (head - queries) * key_head + column
    value_at = d_value_ptr + token * value_token + (head - rotated) * value_head + column
    # One load from three places: three loads, each masked, would wait for one another.
    return tl.where(head < queries, query_at, tl.where(head < rotated, key_at, value_at))


@triton.jit
def _through_norm(
    a, b, c, x_ptr, weight_ptr, first, second, rest, inside, behind, head, queries, keys, eps, offset,
    DIM: tl.constexpr, REST: tl.constexpr, NORM: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Gradients of heads before their norm, from gradients after it. Pointers point to the tile's heads."""
    normed = inside & (head < queries + keys)
    x_a = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    x_b = tl.load(x_ptr + second, mask=inside, other=0.0).to(tl.float32)
    a *= load_weight(weight_ptr, first, normed, offset, FORM)
    b *= load_weight(weight_ptr, second, normed, offset, FORM)
    squares = tl.sum(x_a * x_a, 1) + tl.sum(x_b * x_b, 1)
    if REST > 0:
        x_c = tl.load(x_ptr + rest, mask=behind, other=0.0).to(tl.float32)
        c *= load_weight(weight_ptr, rest, behind & (head < queries + keys), offset, FORM)
        squares += tl.sum(x_c * x_c, 1)
    inverse = tl.rsqrt(_head_mean(squares, head, queries, keys, DIM, NORM) + eps)
    x_a, x_b = x_a * inverse, x_b * inverse
    products = tl.sum(a * x_a, 1) + tl.sum(b * x_b, 1)
    if REST > 0:
        x_c *= inverse
        products += tl.sum(c * x_c, 1)
    mean = _head_mean(products, head, queries, keys, DIM, NORM)
    if REST > 0:
        c = inverse * (c - x_c * mean)
    return inverse * (a - x_a * mean), inverse * (b - x_b * mean), c


@triton.jit
def _rotate_backward(
    d_query_ptr, d_key_ptr, d_value_ptr, cos_ptr, sin_ptr, x_ptr, weight_ptr, out_ptr, scale_ptr,
    queries, keys, query_token, query_head, key_token, key_head, value_token, value_head, pad, eps, offset,
    DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, EACH: tl.constexpr, NORM: tl.constexpr, FORM: tl.constexpr,
    MEASURE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Gradient of a row of heads from the gradients of its queries, keys and values.

    A program takes HEADS slots of a token. Moves 4 bytes for each element of a row, 6 with a norm.
    """
    token = tl.program_id(0).to(tl.int64)
    slot, j = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, HALF)[None, :]
    head = _head_of(slot, queries, keys, EACH).to(tl.int64)  # heads may be a whole row apart
    rotated = queries + keys
    heads = rotated + keys
    inside = slot < heads
    if PAIRS != HALF:
        inside = inside & (j < PAIRS)
    first, second = _columns(j, PAIRS, INTERLEAVED)
    column, both_inside = first, inside
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        both_inside = (slot < heads) & (column < 2 * PAIRS)
    from_at = _gradient_at(
        d_query_ptr, d_key_ptr, d_value_ptr, token, head, column, queries, keys,
        query_token, query_head, key_token, key_head, value_token, value_head,
    )  # fmt: skip
    a0, b0 = _load_pairs(from_at, 0, 0, inside, both_inside, HEADS, PAIRS, HALF, INTERLEAVED)
    a, b = a0, b0
    if ROTATE:
        cos_a, cos_b, sin_a, sin_b = _angles(cos_ptr, sin_ptr, token, j, j < PAIRS, PAIRS, HALF, INTERLEAVED)
        a, b = a0 * cos_a + b0 * sin_b, b0 * cos_b - a0 * sin_a
    rest, behind, c0 = first, inside, a0  # not used without a rest
    if REST > 0:
        rest = 2 * PAIRS + tl.arange(0, REST)[None, :]
        behind = (slot < heads) & (rest < DIM)
        rest_at = _gradient_at(
            d_query_ptr, d_key_ptr, d_value_ptr, token, head, rest, queries, keys,
            query_token, query_head, key_token, key_head, value_token, value_head,
        )  # fmt: skip
        c0 = tl.load(rest_at, mask=behind, other=0.0).to(tl.float32)
    c = c0
    at = (token * heads + slot) * DIM
    if NORM > 0:
        a, b, c = _through_norm(
            a, b, c, x_ptr + at, weight_ptr + head * DIM, first, second, rest, inside, behind, head, queries, keys,
            eps, offset, DIM, REST, NORM, FORM,
        )  # fmt: skip
    out_ptr += token * (heads * DIM + pad)
    to = slot.to(tl.int64) * DIM
    kind = out_ptr.dtype.element_ty
    a, b = tl.where(head < rotated, a, a0).to(kind), tl.where(head < rotated, b, b0).to(kind)
    _store_pairs(out_ptr, to, column, a, b, inside, both_inside, HEADS, PAIRS, HALF, INTERLEAVED)
    if REST > 0:
        c = tl.where(head < rotated, c, c0).to(kind)
        tl.store(out_ptr + to + rest, c, mask=behind)
    if MEASURE > 0:
        there = inside & (j < PAIRS)
        a = scaled(a, scale_ptr, to + first, there, MEASURE == 2)
        b = scaled(b, scale_ptr, to + second, there, MEASURE == 2)
        largest, squares = tl.max(tl.maximum(tl.abs(a), tl.abs(b))), tl.sum(a * a + b * b)
        if REST > 0:
            c = scaled(c, scale_ptr, to + rest, behind, MEASURE == 2)
            largest, squares = tl.maximum(largest, tl.max(tl.abs(c))), squares + tl.sum(c * c)
        store_statistics(out_ptr + heads * DIM, largest, squares, tl.program_id(1), tl.num_programs(1))


def rotate_heads_backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    x: Tensor | None,
    heads: HeadSpec,
    pad: int = 0,
    measure: Measure | None = None,
) -> Tensor:
    """As `ops.layer.rotate_heads_backward`."""
    parts = [unit_stride(part) for part in (d_query, d_key, d_value)]
    strides = [stride for part in parts for stride in part.stride()[:2]]
    out = d_query.new_empty(d_query.shape[0], heads.total * heads.dim + pad)
    cos, sin, norm = *(out if table is None else table.contiguous() for table in (cos, sin)), heads.norm
    scale, measured = measure_arguments(measure, out)
    programs, sizes = _sizes(heads, heads.total, max(1, 2048 // triton.next_power_of_2(heads.dim)), measured > 0)
    weight, eps, offset = (out, 0.0, 0.0) if norm is None else (norm.weight, norm.eps, norm.offset)
    _rotate_backward[(d_query.shape[0], programs)](
        *parts, cos, sin, out if x is None else x.contiguous(), weight, out, scale, heads.query, heads.key_value,
        *strides, pad, eps, offset, **_pairs_of(heads)._asdict(), MEASURE=measured, **sizes,
    )  # fmt: skip
    return out
