# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Device functions of `ops.measure` for Triton kernels, and the launch arguments that kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loratune.ops import measure

PIECES = tl.constexpr(measure.PIECES)
E4M3_MAX = tl.constexpr(measure.E4M3_MAX)
INVERSE_E4M3_MAX = tl.constexpr(measure.INVERSE_E4M3_MAX)
MIN_SCALE = tl.constexpr(measure.MIN_SCALE)


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
    """Stored value times its column scale, float32; zero outside the mask."""
    value = value.to(tl.float32)
    if SCALED:
        value *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, value, 0.0)


@triton.jit
def store_statistics(behind_ptr, largest, squares, piece, pieces):
    """Stores the statistics of one piece behind the row. The first piece also clears the numbers of unused pieces."""
    found_ptr = behind_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    slot = tl.arange(0, PIECES)
    own = slot == piece
    to_write = own | ((piece == 0) & (slot >= pieces))
    tl.store(found_ptr + slot, tl.where(own, largest, 0.0), mask=to_write)
    tl.store(found_ptr + PIECES + slot, tl.where(own, squares, 0.0), mask=to_write)


@triton.jit
def power_of_two_above(v):
    """Smallest powers of two not below v."""
    return ((v.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def scales(largest, squares, bound):
    """Scales of rows, as `ops.measure.scales`."""
    largest = tl.maximum(largest, E4M3_MAX * MIN_SCALE)
    ratio = tl.div_rn(tl.sqrt_rn(squares) * bound, largest)
    return largest * INVERSE_E4M3_MAX * power_of_two_above(tl.maximum(ratio, 1.0))


@triton.jit
def one_over(scale):
    """1 / scale with IEEE rounding, as PyTorch divides."""
    return tl.div_rn(1.0, scale)
