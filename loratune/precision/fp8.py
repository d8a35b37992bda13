"""A frozen weight in 8-bit floating point, and products that run in it, forward and backward.

    W ≈ diag(s) Q      Q: (d_out, d_in) e4m3    s: (d_out,) float32, powers of two that bring each row under 448,
                                                or the scales of a checkpoint (`precision.fp8_files`)
    x ≈ diag(t) X      t: (N,), computed for every x

    forward    x Wᵀ ≈ diag(t) (X Qᵀ) diag(s)            s scales the columns of the output
    backward   dy W ≈ diag(u) (D Q),  D = quantised rows of dy diag(s)

In the backward s lies along the contraction, where no product can apply it. dy is therefore multiplied with s before
its own rows are quantised, and the one stored Q serves both directions. Tensor cores want both operands contiguous
along the contraction. Q is stored that way for the forward. For the backward it is transposed for the length of one
product. That costs two passes over a byte per element, about 1 % of a step. A second copy would cost as much memory
as the first.

Everything trained stays in 16 and 32 bits; only operands of products with W have 8. Three bits of mantissa give a
relative error of at most 2^-4 per element, and about 4 % of the norm of a product of random operands.
`precision.fp8_rows` describes the operands and how they hold the low-rank part.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.measure import INVERSE_E4M3_MAX, MIN_SCALE, power_of_two_above
from loratune.ops.products import MatrixProduct, mm
from loratune.precision.fp8_rows import E4M3, QuantisedRows, adapter_columns, product, quantise_rows, transposed

_MULTIPLE = 16  # of both dimensions of a product, required by the hardware
_PART = 1024  # rows that are quantised at once
_SMALLEST_ROW = 2.0**-12  # of the largest; a smaller row uses fewer of e4m3's binary orders
_WIDEST = 8
"""A weight gets adapter columns only if they are at most 1 / `_WIDEST` of its smaller side. With more columns, a
separate sum is cheaper."""


def supported(device: torch.device) -> bool:
    """True where products in 8 bits run: compute capability 8.9 and newer, and the CPU, which emulates them."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def fits(shape: Sequence[int]) -> bool:
    """True if a weight of this shape can be an `Fp8Weight`."""
    return len(shape) == 2 and all(size % _MULTIPLE == 0 for size in shape)


@dataclass(frozen=True)
class Fp8Weight:
    """W held in 8 bits; implements `ops.frozen.FrozenWeight`. With adapter columns it serves `fp8_projection`."""

    precision: ClassVar[str] = "fp8"
    values: Tensor
    """(d_out, d_in) e4m3; the first columns of `augmented`, if there is one"""
    scale: Tensor
    """(d_out, 1) float32"""
    dtype: torch.dtype
    """Compute dtype."""
    augmented: Tensor | None = None
    """(d_out, d_in + adapter columns) e4m3, or None"""
    _ones: Tensor | None = field(default=None, repr=False)
    _short_scale: Tensor | None = field(default=None, repr=False)

    @classmethod
    def quantised(cls, weight: Tensor) -> Fp8Weight:
        """Quantises a matrix, (d_out, d_in), whose shape `fits`."""
        largest = weight.abs().amax(1, keepdim=True).float()
        # A row of zeros has no scale of its own, and B / scale would overflow if one scale were far below the others.
        least = largest.clamp_min(largest.max() * _SMALLEST_ROW)
        scale = power_of_two_above(least * INVERSE_E4M3_MAX).clamp_min(MIN_SCALE)
        values = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
        for part in range(0, weight.shape[0], _PART):  # copies only a few rows to float32 at a time
            rows = slice(part, part + _PART)
            values[rows] = (weight[rows].float() / scale[rows]).to(E4M3)
        return cls(values, scale, weight.dtype)

    @classmethod
    def joined(cls, weights: Sequence[Fp8Weight], ranks: int) -> Fp8Weight:
        """Weights of one input, one below the other, with adapter columns for `ranks` if they pay."""
        d_in = weights[0].shape[1]
        d_out = sum(weight.shape[0] for weight in weights)
        columns = _columns_that_pay(ranks, (d_out, d_in))
        whole = torch.zeros(d_out, d_in + columns, dtype=torch.uint8, device=weights[0].device)
        torch.cat([weight.values.view(torch.uint8) for weight in weights], out=whole[:, :d_in])
        augmented, scale = whole.view(E4M3), torch.cat([weight.scale for weight in weights])
        short = scale[:, 0].bfloat16()
        exact = scale.is_meta or torch.equal(short.float(), scale[:, 0])
        return cls(
            augmented[:, :d_in],
            scale,
            weights[0].dtype,
            augmented if columns else None,
            scale.new_ones(d_in),
            short if exact else scale[:, 0],
        )

    def rows(self, which: slice) -> Fp8Weight:
        """Some of the rows, in the same memory, without adapter columns."""
        return Fp8Weight(self.values[which], self.scale[which], self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Fp8Weight:
        """The same weight on another device or for another compute dtype."""
        return Fp8Weight(self.values.to(device), self.scale.to(device), dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        d_out, d_in = self.values.shape
        return d_out, d_in

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales, without adapter columns."""
        return self.values.numel() + self.scale.nbytes

    def has_adapter_columns(self, ranks: int) -> bool:
        """True if there are at least as many adapter columns as `joined` would make for `ranks`."""
        width = 0 if self.augmented is None else self.augmented.shape[1] - self.shape[1]
        return width >= _columns_that_pay(ranks, self.shape)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None, mm: MatrixProduct = mm
    ) -> Tensor:
        """x Wᵀ + b; (N, d_in) -> (N, d_out). A product in 8 bits cannot add to a tensor: `onto` is added after it."""
        y = product(quantise_rows(x), self.values, self.scale[:, 0], x.dtype, bias)
        return y if onto is None else y.add_(onto)

    def d_input(self, dy: Tensor, onto: Tensor | None = None, mm: MatrixProduct = mm) -> Tensor:
        """dy W; (N, d_out) -> (N, d_in)."""
        dx = product(quantise_rows(dy, self.row_scale), transposed(self.values), self.column_scale, dy.dtype)
        return dx if onto is None else dx.add_(onto)

    def dense(self) -> Tensor:
        """The numbers that the 8 bits represent, in the compute dtype."""
        return QuantisedRows(self.values, self.scale).dense(self.dtype)

    @property
    def row_scale(self) -> Tensor:
        """(d_out,), the scales by which dy is multiplied; in bfloat16 if that is exact, which halves the bytes."""
        return self.scale[:, 0] if self._short_scale is None else self._short_scale

    @property
    def column_scale(self) -> Tensor:
        """(d_in,) ones: in the backward no factor belongs to the columns of the result."""
        return self.scale.new_ones(self.shape[1]) if self._ones is None else self._ones


def quantise(weight: Tensor) -> FrozenWeight:
    """A matrix, (d_out, d_in), in 8 bits; unchanged, if no product in 8 bits has its shape."""
    return Fp8Weight.quantised(weight) if fits(weight.shape) else DenseWeight(weight)


def _columns_that_pay(ranks: int, shape: tuple[int, int]) -> int:
    columns = adapter_columns(ranks)
    return columns if columns * _WIDEST <= min(shape) else 0
