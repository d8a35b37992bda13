"""Operands and products in 8-bit floating point: quantised rows, adapter columns, transposed weights.

A product in 8 bits has a scale for each row of both operands, and sums in float32.

The low-rank part keeps the precision of 16 bits although the 8-bit product computes it. A number v is written as
hi + lo, both e4m3: hi is the nearest to v, lo the nearest to the rest. Together they have the 8 bits of mantissa of
bfloat16. With adapter columns [hi, lo, hi] behind x and [hi, hi, lo] behind W, the product gains hi hi + lo hi + hi
lo, which is (x Aᵀ) Bᵀ up to 2^-8. A row's scale covers its adapter columns too, so x Aᵀ does not saturate. B may
outgrow its row of W; one factor for all of B, known to both operands, keeps it below 448.

x Aᵀ reads x, and so does quantising. `augment_rows` does both in one reading, because the scale is known before x is
read: the pass that wrote x stored the row's statistics behind it (`ops.measure`). Factors are powers of two, so
dividing by them is exact.

The CPU multiplies the numbers that the 8 bits represent, which is the reference. On GPUs the products are
`torch._scaled_mm`, and the other functions have Triton twins in `precision.fp8_kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from loratune.ops import measure
from loratune.ops.buffers import KernelBuffers
from loratune.ops.dispatch import on_gpu, with_kernel
from loratune.ops.measure import INVERSE_E4M3_MAX, MIN_SCALE, Measure, power_of_two_above, scales, statistics_of

E4M3 = torch.float8_e4m3fn
MARGIN = 1.02
"""Factor of bounds over exact arithmetic: x Aᵀ is rounded to 2^-8, and sums are rounded."""
_LINE = 128
"""Bytes of a cache line and of a tile of the product. Rows of another length make the product a fifth slower."""
_KERNELS = "precision.fp8_kernels"


class QuantisedRows(NamedTuple):
    """A matrix whose rows are held in 8 bits with a scale each."""

    values: Tensor
    """(N, K) e4m3"""
    scale: Tensor
    """(N, 1) float32"""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K)"""
        return (self.values.float() * self.scale).to(dtype)


def _is_on_gpu(x: Tensor, *_: object) -> bool:
    return on_gpu(x)


@with_kernel(_is_on_gpu, _KERNELS)
def quantise_rows(x: Tensor, columns: Tensor | None = None) -> QuantisedRows:
    """Rows of x, (N, K), in e4m3, each scaled so that its largest magnitude is 448.

    Args:
        columns: (K,) float32 or bfloat16, a factor for each column; None for ones.
    """
    wide = x.float() if columns is None else x.float() * columns.float()
    scale = (wide.abs().amax(-1, keepdim=True) * INVERSE_E4M3_MAX).clamp_min(MIN_SCALE)
    return QuantisedRows((wide * scale.reciprocal()).to(E4M3), scale)


def quantise_augmented(
    x: Tensor, matrix: Tensor, columns: Tensor | None, factors: Tensor, buffers: KernelBuffers | None = None
) -> tuple[QuantisedRows, Tensor]:
    """Rows in 8 bits with adapter columns behind them, and the low-rank product that these columns hold.

    Args:
        x: (N, K), or padded and measured with the same `columns`; without a measure it is read once more.
        matrix: (K, R), Aᵀ or B.
        columns: (K,), a factor for each column of the quantised row, but not of the product; None for ones.
        factors: (2,) float32, the factor of the adapter columns and a bound as in `ops.measure`.
        buffers: as for `ops.low_rank.down_project`.
    Returns: (N, K + adapter columns), the latter [hi, lo, hi] and zeros up to `adapter_columns(R)`; x matrix, (N, R).
    """
    width = matrix.shape[0]
    found = statistics_of(x, width) if x.shape[1] > width else measured_rows(x, columns)
    return augment_rows(x[:, :width], found, matrix, columns, factors, buffers)


@with_kernel(_is_on_gpu, _KERNELS)
def measured_rows(x: Tensor, columns: Tensor | None) -> Tensor:
    """`ops.measure.row_statistics` for an x that no pass has measured."""
    return measure.row_statistics(x, Measure(columns))


@with_kernel(_is_on_gpu, _KERNELS)
def augment_rows(
    x: Tensor,
    found: Tensor,
    matrix: Tensor,
    columns: Tensor | None,
    factors: Tensor,
    buffers: KernelBuffers | None = None,
) -> tuple[QuantisedRows, Tensor]:
    """`quantise_augmented` of an unpadded x, (N, K), with the statistics `found` of its rows."""
    low_rank = x @ matrix
    scale = scales(found, factors[1])
    inverse = scale.reciprocal()
    wide = x.float() if columns is None else x.float() * columns.float()
    hi, lo = split(low_rank.float() * (inverse * factors[0]))
    return QuantisedRows(side_by_side((wide * inverse).to(E4M3), hi, lo, hi), scale), low_rank


def adapter_columns(ranks: int) -> int:
    """Adapter columns behind an 8-bit row for the low-rank part of `ranks` ranks."""
    return -(-3 * ranks // _LINE) * _LINE


def adapter_factors(lora_A: Tensor, lora_B: Tensor, scale: Tensor) -> Tensor:
    """Factors and bounds of an adapter, which both operands of a product use.

    Args:
        lora_A, lora_B: (R, d_in), (d_out, R).
        scale: (d_out, 1) of the weight.
    Returns: (4,) float32. For the forward, the factor that brings B over the weight's scale to at most 448, and the
        bound of the adapter columns behind x. For the backward, the factor of A, and the bound of the adapter columns
        behind dy.
    """
    a, b = lora_A.float(), lora_B.float() / scale
    of_b, of_a = (power_of_two_above(m.abs().amax() * INVERSE_E4M3_MAX) for m in (b, a))
    of_b, of_a = of_b.clamp_min(1.0), of_a.clamp_min(MIN_SCALE)
    return torch.stack([of_b, MARGIN * of_b * a.norm(dim=1).max(), of_a, MARGIN * of_a * b.norm(dim=0).max()])


def write_adapter_columns(matrix: Tensor, divisor: Tensor | None, factor: Tensor, out: Tensor) -> None:
    """Writes the adapter columns of `matrix`, (n, R), into `out`, (n, adapter columns) e4m3.

    The values are `matrix` / `divisor` / `factor`, with one divisor for each row, or none.
    """
    wide = matrix.float() if divisor is None else matrix.float() / divisor[:, None]
    hi, lo = split(wide / factor)
    out.view(torch.uint8).copy_(side_by_side(hi[:, :0], hi, hi, lo).view(torch.uint8))


@with_kernel(_is_on_gpu, _KERNELS)
def transposed(values: Tensor, lora_A: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """(N, K) e4m3 -> (K, N), contiguous; with A, (R, K), and its factor, (K, N + adapter columns)."""
    rows, width = values.shape
    columns = 0 if lora_A is None else adapter_columns(lora_A.shape[0])
    out = torch.zeros(width, rows + columns, dtype=torch.uint8, device=values.device)
    out[:, :rows] = values.view(torch.uint8).T
    if lora_A is not None and factor is not None:
        write_adapter_columns(lora_A.T, None, factor, out.view(E4M3)[:, rows:])
    return out.view(E4M3)


def product(a: QuantisedRows, b: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a bᵀ with scaled columns, plus a bias; summed in float32.

    Args:
        a: (N, K).
        b: (M, K) e4m3.
        scale_b: (M,) float32, the scale of each column of the result.
        bias: (M,) or None.
    Returns: (N, M) in `dtype`.
    """
    if on_gpu(b):
        return torch._scaled_mm(
            a.values, b.T, scale_a=a.scale, scale_b=scale_b[None], bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    out = linear(a.values.float(), b.float()) * a.scale * scale_b
    return (out if bias is None else out + bias).to(dtype)


def split(v: Tensor) -> tuple[Tensor, Tensor]:
    """v as the sum of two e4m3 numbers, hi and lo, to 8 bits of mantissa."""
    hi = v.to(E4M3)
    return hi, (v - hi.float()).to(E4M3)


def side_by_side(first: Tensor, *groups: Tensor) -> Tensor:
    """`first`, the groups behind it, and zeros up to the width of `adapter_columns`."""
    ranks = groups[0].shape[1]
    joined = torch.cat([part.view(torch.uint8) for part in (first, *groups)], 1)
    return pad(joined, (0, adapter_columns(ranks) - 3 * ranks)).view(E4M3)
