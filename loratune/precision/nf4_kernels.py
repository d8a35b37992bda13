# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""The Triton twin of `precision.nf4.dequantise`: 4-bit codes and their scales to a rectangle of a matrix, in one
launch.

A weight is read at 4.13 bits an element and written at 16, so the launch is bound by the write. A program takes
`_BLOCKS` blocks of codes; a block's scale is computed once, the 16 values of the code book come from the first-level
cache. Products and sums are rounded one by one (`enable_fp_fusion=False`), because bitsandbytes rounds them so.
This module is imported only where there is a GPU, since Triton is not installed elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 32
_WARPS = 1


@triton.jit
def _dequantise(
    codes_ptr, book_ptr, absmax_ptr, scale_ptr, offset_ptr, absmax_book_ptr, out_ptr,
    first, count, width, stride, pitch,
    NESTED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # Counted in blocks: `count` of them in rows of `width`, which begin every `stride` blocks from `first` on. Rows
    # of the output begin every `pitch` elements.
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


def dequantise(
    codes: Tensor,
    book: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    absmax_book: Tensor | None,
    *,
    group: int,
    block: int,
    d_in: int,
    rows: slice,
    columns: slice,
    out: Tensor,
) -> Tensor:
    """Writes the rectangle `rows` x `columns` of the matrix into `out`, of its shape, whose rows may lie apart.

    `d_in` and the columns' bounds are multiples of `block`; `scale` is None where `absmax` is float32 itself.
    """
    height, width, stride = rows.stop - rows.start, (columns.stop - columns.start) // block, d_in // block
    count = height * width
    _dequantise[(triton.cdiv(count, _BLOCKS),)](
        codes, book, absmax,
        absmax if scale is None else scale, absmax if offset is None else offset,
        book if absmax_book is None else absmax_book, out,
        rows.start * stride + columns.start // block, count, width, stride, out.stride(0),
        NESTED=scale is not None, GROUP=group, BLOCK=block, BLOCKS=_BLOCKS,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def usable(codes: Tensor, dtype: torch.dtype, d_in: int, block: int) -> bool:
    """Whether the kernel can take a weight: on a GPU, blocks that do not cross rows."""
    power_of_two = block & (block - 1) == 0
    return codes.is_cuda and dtype != torch.float64 and d_in % block == 0 and power_of_two and block <= 4096
