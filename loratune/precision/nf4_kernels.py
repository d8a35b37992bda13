# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twin of `precision.nf4.dequantise`: 4-bit codes and their scales to a rectangle of a matrix, in one launch.

A program takes `_BLOCKS` blocks of codes. It computes a block's scale once, and reads the 16 values of the code book
from the first-level cache. Products and sums are rounded one by one (`enable_fp_fusion=False`), as in bitsandbytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loratune.precision.nf4 import Nf4Weight

_BLOCKS = 32
_WARPS = 1


@triton.jit
def _dequantise(
    codes_ptr, book_ptr, absmax_ptr, scale_ptr, offset_ptr, absmax_book_ptr, out_ptr,
    first, count, width, stride, pitch,
    NESTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The blocks of a rectangle: `count` blocks in rows of `width`, one row every `stride` blocks from `first` on.

    Rows of the output begin every `pitch` elements. One program per `BLOCKS` blocks.
    """
    target = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = target < count
    source = first + target // width * stride + target % width
    if NESTED:
        code = tl.load(absmax_ptr + source, mask=inside, other=0).to(tl.int32)
        group = source // GROUP
        scale = tl.load(scale_ptr + group, mask=inside, other=0.0)
        offset = tl.load(offset_ptr + group, mask=inside, other=0.0)
        absmax = tl.load(absmax_book_ptr + code) * scale + offset
    else:
        absmax = tl.load(absmax_ptr + source, mask=inside, other=0.0)
    half = tl.arange(0, BLOCK // 2)[None, :]
    pair = tl.load(codes_ptr + source[:, None] * (BLOCK // 2) + half, mask=inside[:, None], other=0).to(tl.int32)
    even = tl.load(book_ptr + (pair >> 4)) * absmax[:, None]
    odd = tl.load(book_ptr + (pair & 15)) * absmax[:, None]
    at = (target // width * pitch + target % width * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, tl.interleave(even, odd).to(out_ptr.dtype.element_ty), mask=inside[:, None])


def dequantise(weight: Nf4Weight, rows: slice, columns: slice, out: Tensor) -> Tensor:
    """Writes the rectangle `rows` x `columns` of W into `out`, of its shape; rows of `out` may be strided.

    Bounds of the columns are multiples of `weight.block`. Bytes moved: 0.52 read and 2 written per element of a
    bfloat16 `out`, so the launch is bound by the write.
    """
    block, nested = weight.block, weight.nested
    height, width, stride = rows.stop - rows.start, (columns.stop - columns.start) // block, weight.shape[1] // block
    count = height * width
    scale, offset, absmax_book, group = weight.absmax, weight.absmax, weight.book, 1
    if nested is not None:
        scale, offset, absmax_book, group = nested.scale, nested.offset, nested.book, nested.group
    _dequantise[(triton.cdiv(count, _BLOCKS),)](
        weight.codes, weight.book, weight.absmax, scale, offset, absmax_book, out,
        rows.start * stride + columns.start // block, count, width, stride, out.stride(0),
        NESTED=nested is not None, GROUP=group, BLOCK=block, BLOCKS=_BLOCKS,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
