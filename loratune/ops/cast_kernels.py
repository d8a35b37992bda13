# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Casts the float32 weights of all adapters to half precision in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cast(table_ptr, scale_ptr, like_ptr, BLOCK: tl.constexpr):
    entry = tl.program_id(0)
    count, width = tl.load(table_ptr + entry * 5 + 2), tl.load(table_ptr + entry * 5 + 3)
    stride = tl.load(table_ptr + entry * 5 + 4)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK < count:
        source = tl.load(table_ptr + entry * 5).to(tl.pointer_type(tl.float32))
        target = tl.load(table_ptr + entry * 5 + 1).to(tl.pointer_type(like_ptr.dtype.element_ty))
        value = tl.load(source + at, mask=at < count, other=0.0) * tl.load(scale_ptr + entry)
        tl.store(target + (at // width) * stride + at % width, value, mask=at < count)


class CastAll:
    """Casts float32 matrices, each times a factor, into matrices of half precision with strided rows: one launch.

    Addresses are read once, when the object is made. A program casts 4,096 elements of one matrix.
    """

    def __init__(self, sources: Sequence[Tensor], targets: Sequence[Tensor], scales: Sequence[float]) -> None:
        rows: list[list[int]] = []
        for source, target in zip(sources, targets, strict=True):
            assert source.dtype == torch.float32
            assert source.is_contiguous()
            rows.append([source.data_ptr(), target.data_ptr(), source.numel(), source.shape[1], target.stride(0)])
        self._held = (sources, targets)  # their addresses are in the table
        self._table = torch.tensor(rows, dtype=torch.int64).to(sources[0].device)
        self._scales = torch.tensor(scales, dtype=torch.float32).to(sources[0].device)
        self._grid = (len(rows), triton.cdiv(max(row[2] for row in rows), 4096))

    def __call__(self) -> None:
        """Casts the current values of the sources."""
        _cast[self._grid](self._table, self._scales, self._held[1][0], BLOCK=4096)
