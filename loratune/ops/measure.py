"""Statistics that a pass stores behind each row it writes, so that a product in 8 bits knows the row's scale.

A row is quantised to 8 bits with a scale t. If an adapter is part of the product (`precision.fp8`), t covers the
adapter columns too: low_rank = row Aᵀ, times a factor that both operands share. An exact t needs all of low_rank, so
the row would be read twice, once for the low-rank product and once for quantising. Instead t comes from two numbers
that the pass has in registers when it writes the row, its absolute maximum and its sum of squares. By Cauchy-Schwarz

    |factor · low_rank| <= bound · |row|₂      bound = factor · max |A_r|₂, one number per projection and step
    t = maximum / 448 · 2^k                    with the smallest k >= 0 for which 448 t >= bound · |row|₂

So no element saturates, however large A and B grow. Because k is an integer, the largest element stays exactly
representable, which matters for rows that a few elements dominate. With the initial A, low_rank is about
|row|₂ / sqrt(3 d), so the bound is too high by sqrt(d): six powers of two at d = 4096. Compared with the maximum it
is three or four powers higher for rows without outliers and no higher for rows with them. e4m3 has fifteen powers
above the point where it loses precision. So products keep the error of the exact maximum, 2.6 % of their norm, until
factor and A have grown a hundredfold (tests/ops/test_measure.py). The alternative bound max|row| · |A_r|₁ is higher
by another sqrt(d), and moving magnitude from A to B costs B the precision that A gains.

Storage: float32 numbers in the padding columns behind the row (`ops.layer`): `PIECES` maxima, then `PIECES` sums of
squares, because independent programs write the pieces of a wide row. Unused numbers are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
"""Largest finite number of float8 e4m3."""
INVERSE_E4M3_MAX = 1 / E4M3_MAX
"""Scales are multiplied by this factor. A division by 448 would differ between devices, because on a GPU PyTorch
multiplies by the reciprocal."""
MIN_SCALE = 2.0**-50
"""Smallest scale, for rows of zeros. Elements whose squares underflow float32, below 2^-63, are far below it."""
PIECES = 16
PAD_COLUMNS = 64
"""Padding columns for the statistics: 64 of two bytes hold 32 float32 numbers and keep rows on cache lines."""


@dataclass(frozen=True)
class Measure:
    """Column scales to apply before the statistics of a row are taken."""

    scale: Tensor | None = None
    """(K,), any float dtype; None for ones."""


def row_statistics(x: Tensor, measure: Measure) -> Tensor:
    """Absolute maxima and sums of squares of rows, as one piece; (N, K) -> (N, 2 PIECES) float32."""
    wide = x.float() if measure.scale is None else x.float() * measure.scale.float()
    found = wide.new_zeros(x.shape[0], 2 * PIECES)
    found[:, 0] = wide.abs().amax(-1)
    found[:, PIECES] = wide.square().sum(-1)
    return found


def store_statistics(padded: Tensor, width: int, measure: Measure) -> None:
    """Stores the statistics of `padded`, (N, width + at least PAD_COLUMNS), behind its first `width` columns."""
    statistics_of(padded, width).copy_(row_statistics(padded[:, :width], measure))


def statistics_of(padded: Tensor, width: int) -> Tensor:
    """The stored statistics, a view: (N, 2 PIECES) float32."""
    return padded[:, width:].view(torch.float32)[:, : 2 * PIECES]


def scales(found: Tensor, bound: Tensor | float) -> Tensor:
    """Scales of rows: neither the row nor bound · |row|₂, divided by its scale, exceeds `E4M3_MAX`.

    (N, 2 PIECES) -> (N, 1) float32.
    """
    largest = found[:, :PIECES].amax(1, keepdim=True).clamp_min(E4M3_MAX * MIN_SCALE)
    norm = found[:, PIECES:].sum(1, keepdim=True).sqrt()
    return largest * INVERSE_E4M3_MAX * power_of_two_above((norm * bound / largest).clamp_min(1.0))


def power_of_two_above(v: Tensor) -> Tensor:
    """Smallest powers of two not below v; v is positive normal float32."""
    return ((v.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
