"""What a pass leaves behind each row that it writes, so that a product in 8 bits knows the row's scale beforehand.

A row goes into 8 bits over a scale t, and where an adapter rides in the product (`precision.fp8`) t covers its
columns too:
inner = row Aᵀ times a factor that both operands know. So t would be known only when all of inner is, and the row
would be read twice: once for inner, once to be quantised. Instead t is taken from what the pass that writes the row
has in its registers anyhow, the largest magnitude and the sum of squares, since by Cauchy and Schwarz

    |factor · inner| <= bound · |row|₂        bound = factor · the largest |A_r|₂, one number a projection and step
    t = largest / 448 · 2^k                   with the least k >= 0 for which 448 t >= bound · |row|₂

Nothing can saturate, whatever A and B grow to, and with k a whole number the largest element stays one that 8 bits
hold exactly, which rows that few elements dominate live on. With A as it is initialised inner is about
|row|₂ / sqrt(3 d), so the bound is high by sqrt(d), six binary orders at d = 4096. Compared with `largest` it is
three or four orders higher where a row has no outliers, and none where it has; e4m3 has fifteen above the point where
it gets coarse. So products err by 2.6 % of their norm as with the exact maximum, until factor and A have grown a
hundredfold (tests/ops/test_measure.py). A bound of max|row| · |A_r|₁ would be high by as much again, and moving
magnitude from A to B would take from B what A gains.

Numbers ride in the room behind the row (`ops.layer`), as float32: `PIECES` maxima and as many sums of squares, since
wide rows are written in pieces by programs that do not wait for one another. Unused ones are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 448.0
"""The largest number of e4m3."""
PER_MOST = 1 / MOST
"""Scales are found by multiplying: PyTorch divides by a number on a CPU, and multiplies by its inverse on a GPU."""
LEAST = 2.0**-50
"""The smallest scale, for rows of zeros. Numbers whose squares vanish in float32, below 2^-63, are far below it."""
PIECES = 16
PAD_COLUMNS = 64
"""Columns behind a row: of two bytes these are 32 numbers in float32, and rows still begin on a cache line."""


@dataclass(frozen=True)
class Measure:
    """That a row is to be measured, and what its columns are multiplied by first."""

    scale: Tensor | None = None
    """(K,), or None for ones."""


def measured(x: Tensor, measure: Measure) -> Tensor:
    """(N, K) -> (N, 2 PIECES) float32, maxima and sums of squares of the rows, here in one piece."""
    wide = x.float() if measure.scale is None else x.float() * measure.scale.float()
    found = wide.new_zeros(x.shape[0], 2 * PIECES)
    found[:, 0] = wide.abs().amax(-1)
    found[:, PIECES] = wide.square().sum(-1)
    return found


def leave(padded: Tensor, width: int, measure: Measure) -> None:
    """Measures (N, width + at least PAD_COLUMNS) and writes what is found behind the first `width` columns."""
    behind(padded, width).copy_(measured(padded[:, :width], measure))


def behind(padded: Tensor, width: int) -> Tensor:
    """(N, 2 PIECES) float32, a view of what was left behind the rows."""
    return padded[:, width:].view(torch.float32)[:, : 2 * PIECES]


def scales(found: Tensor, bound: Tensor | float) -> Tensor:
    """(N, 2 PIECES) -> (N, 1) float32, of which neither the row nor bound · |row|₂ is more than `MOST`."""
    largest = found[:, :PIECES].amax(1, keepdim=True).clamp_min(MOST * LEAST)
    norm = found[:, PIECES:].sum(1, keepdim=True).sqrt()
    return largest * PER_MOST * upward((norm * bound / largest).clamp_min(1.0))


def upward(v: Tensor) -> Tensor:
    """The smallest powers of two that are not below v, positive normal float32."""
    return ((v.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
