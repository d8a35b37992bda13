# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""What `ops.measure` says, inside a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loratune.ops import measure

PIECES = tl.constexpr(measure.PIECES)
MOST = tl.constexpr(measure.MOST)
PER_MOST = tl.constexpr(measure.PER_MOST)
LEAST = tl.constexpr(measure.LEAST)


def measure_arguments(asked: measure.Measure | None, unused: Tensor) -> tuple[Tensor, int]:
    """Column scales, or any tensor if there are none, and MEASURE: 0 for none, 1 without scales, 2 with scales."""
    if asked is None or asked.scale is None:
        return unused, 0 if asked is None else 1
    return asked.scale, 2


def warps(block: int) -> int:
    """Warps of a program that takes `block` elements."""
    return 4 if block <= 2048 else 8 if block <= 4096 else 16


@triton.jit
def scaled(value, scale_ptr, column, inside, SCALED: tl.constexpr):
    """What is measured of a value that is stored; float32, zero outside."""
    value = value.to(tl.float32)
    if SCALED:
        value *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, value, 0.0)


@triton.jit
def leave(behind_ptr, largest, squares, piece, pieces):
    """Writes the numbers of one piece behind the row; the first piece also clears those that nobody writes."""
    found_ptr = behind_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    slot = tl.arange(0, PIECES)
    own = slot == piece
    to_write = own | ((piece == 0) & (slot >= pieces))
    tl.store(found_ptr + slot, tl.where(own, largest, 0.0), mask=to_write)
    tl.store(found_ptr + PIECES + slot, tl.where(own, squares, 0.0), mask=to_write)


@triton.jit
def upward(v):
    """The smallest powers of two that are not below v."""
    return ((v.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def scales(largest, squares, bound):
    """The scales of rows."""
    largest = tl.maximum(largest, MOST * LEAST)
    ratio = tl.div_rn(tl.sqrt_rn(squares) * bound, largest)
    return largest * PER_MOST * upward(tl.maximum(ratio, 1.0))


@triton.jit
def one_over(scale):
    """Rounded as PyTorch rounds."""
    return tl.div_rn(1.0, scale)
