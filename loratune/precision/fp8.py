"""A frozen weight in 8-bit floating point, and products that run in it, forward and backward.

    W ≈ diag(s) Q      Q: (d_out, d_in) e4m3    s: (d_out,) float32, powers of two that bring each row under 448,
                                                or any numbers that a checkpoint came with (`precision.fp8_files`)
    x ≈ diag(t) X      t: (N,), found anew for every x

    forward    x Wᵀ ≈ diag(t) (X Qᵀ) diag(s)            s scales the columns of the output
    backward   dy W ≈ diag(u) (D Q),  D = quantised rows of dy diag(s)

In the backward s stands along the contraction, where no product can apply it. So dy takes it up before its own rows
are quantised, and the one stored Q serves both directions. Tensor cores want both operands contiguous along the
contraction; Q is so in the forward, and is transposed for the length of one product in the backward, which costs two
passes over a byte a weight (about 1 % of a step; a second copy would cost as much memory as the first).

The low-rank part stays in bfloat16 and still rides in the wide product, as it does in `precision.projection`. A
number v is
written as hi + lo, both e4m3, hi the nearest to v and lo the nearest to what is left: 8 bits of mantissa together,
those of bfloat16. With borders [hi, lo, hi] behind X and [hi, hi, lo] behind Q, the wide sum has
hi hi + lo hi + hi lo more: (x Aᵀ) Bᵀ but for a 2^-8th. t covers the border too, so nothing saturates on that side; on
the other, B may outgrow its row of W, and one factor for all of B, known to both sides, keeps it below 448.

x Aᵀ has to read x, and so has the quantising. `lay` does both in one reading: t is known beforehand, from what the
pass that wrote x left behind the row (`ops.measure`). Factors are powers of two as s is, so that dividing by them is
exact. What follows from A and B alone, factors, bounds and borders, is found once for all weights whenever the
working copies change (`refresh`).

Everything trained stays in bfloat16 and float32: 8 bits are only in what multiplies W. Three bits of mantissa give a
relative error of at most 2^-4 an element, and about 4 % of the norm of a product of random operands.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433. Row-wise products are
`torch._scaled_mm`; the CPU multiplies the numbers that the 8 bits stand for, which is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.measure import LEAST, PER_MOST, Measure, behind, measured, scales, upward

E4M3 = torch.float8_e4m3fn
_MULTIPLE = 16  # of both dimensions of a product, asked by the hardware
_LINE = 128  # bytes of a cache line and of a tile of the sum: a row that ends elsewhere costs the product a fifth
_PART = 1024  # rows that are quantised at once
_SMALLEST_ROW = 2.0**-12  # of the largest; a row that is smaller does with fewer of e4m3's binary orders
MARGIN = 1.02  # by which bounds are higher than they need be in exact arithmetic: 2^-8 for rounding x Aᵀ, and sums
_WIDEST_BORDER = 8  # a border is at most this part of the weight's smaller side; beyond, adding afterwards is cheaper


@dataclass(frozen=True)
class Scaled:
    """A matrix whose rows are held in 8 bits with a scale each."""

    values: Tensor
    """(N, K) e4m3"""
    scale: Tensor
    """(N, 1) float32"""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K)."""
        return (self.values.float() * self.scale).to(dtype)


def quantise_rows(x: Tensor, columns: Tensor | None = None) -> Scaled:
    """Each row of x, (N, K), times `columns` where given, in e4m3 with the largest magnitude at 448.

    Args:
        columns: (K,) float32 or bfloat16, a factor for each column.
    """
    if x.is_cuda:
        return Scaled(*_kernels().quantise_rows(x, columns))
    wide = x.float() if columns is None else x.float() * columns.float()
    scale = (wide.abs().amax(-1, keepdim=True) * PER_MOST).clamp_min(LEAST)
    return Scaled((wide * scale.reciprocal()).to(E4M3), scale)


def lay(x: Tensor, thin: Tensor, columns: Tensor | None, numbers: Tensor) -> tuple[Scaled, Tensor]:
    """A row's product with a thin matrix, and the row in 8 bits with that product behind it, in one reading of x.

    Args:
        x: (N, K), or with room behind its rows, measured with the same `columns`; else it is read once more.
        thin: (K, R), Aᵀ or B.
        columns: (K,), a factor for each column of what is quantised, but not of the product; None for ones.
        numbers: (2,) float32, the factor of the border and a bound as in `ops.measure`.
    Returns: (N, K + border), the border [hi, lo, hi] and zeros up to `border_of(R)`; x thin, (N, R).
    """
    width = thin.shape[0]
    found = behind(x, width) if x.shape[1] > width else None
    x = x[:, :width]
    if x.is_cuda:
        values, scale, inner = _kernels().lay(x, found, thin, columns, numbers)
        return Scaled(values, scale), inner
    inner = x @ thin
    scale = scales(measured(x, Measure(columns)) if found is None else found, numbers[1])
    inverse = scale.reciprocal()
    wide = x.float() if columns is None else x.float() * columns.float()
    hi, lo = _split(inner.float() * (inverse * numbers[0]))
    return Scaled(_joined((wide * inverse).to(E4M3), hi, lo, hi), scale), inner


def border_of(ranks: int) -> int:
    """Columns that a low-rank part of so many ranks takes behind the rows of an operand."""
    return -(-3 * ranks // _LINE) * _LINE


def numbers_of(lora_A: Tensor, lora_B: Tensor, scale: Tensor) -> Tensor:
    """What both operands have to know of an adapter.

    Args:
        lora_A, lora_B: (R, d_in), (d_out, R).
        scale: (d_out, 1) of the weight.
    Returns: (4,) float32. Of the forward, the factor that brings B over the weight's scale to at most 448, and the
        bound of what lies behind x; of the backward, the factor of A, and the bound of what lies behind dy.
    """
    a, b = lora_A.float(), lora_B.float() / scale
    of_b, of_a = (upward(m.abs().amax() * PER_MOST) for m in (b, a))
    of_b, of_a = of_b.clamp_min(1.0), of_a.clamp_min(LEAST)
    return torch.stack([of_b, MARGIN * of_b * a.norm(dim=1).max(), of_a, MARGIN * of_a * b.norm(dim=0).max()])


def lay_border(matrix: Tensor, divisor: Tensor | None, factor: Tensor, out: Tensor) -> None:
    """Writes `matrix`, (n, R), its rows over `divisor` and all over `factor`, into `out`, (n, border) e4m3."""
    wide = matrix.float() if divisor is None else matrix.float() / divisor[:, None]
    hi, lo = _split(wide / factor)
    out.view(torch.uint8).copy_(_joined(hi[:, :0], hi, hi, lo).view(torch.uint8))


def transposed(values: Tensor, lora_A: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """(N, K) e4m3 -> (K, N), contiguous; with A, (R, K), and its factor (K, N + border), as `lay_border` fills it."""
    if values.is_cuda:
        turned: Tensor = _kernels().transposed(values, lora_A, factor)
        return turned
    rows, width = values.shape
    out = torch.zeros(width, rows + (0 if lora_A is None else border_of(lora_A.shape[0])), dtype=torch.uint8)
    out[:, :rows] = values.view(torch.uint8).T
    if lora_A is not None and factor is not None:
        lay_border(lora_A.T, None, factor, out.view(E4M3)[:, rows:])
    return out.view(E4M3)


def product(a: Scaled, b: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """a bᵀ with the columns of the result scaled, plus a bias; summed in float32.

    Args:
        a: (N, K).
        b: (M, K) e4m3.
        scale_b: (M,) float32.
        bias: (M,) or None.
    Returns: (N, M) in `dtype`.
    """
    if b.is_cuda:
        return torch._scaled_mm(
            a.values, b.T, scale_a=a.scale, scale_b=scale_b[None], bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    out = linear(a.values.float(), b.float()) * a.scale * scale_b
    return (out if bias is None else out + bias).to(dtype)


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
    """(d_out, d_in) e4m3; with a border, the first columns of `augmented`."""
    scale: Tensor
    """(d_out, 1) float32"""
    dtype: torch.dtype
    """Of what goes into the products and comes out of them."""
    augmented: Tensor | None = None
    """(d_out, d_in + border) e4m3, or None."""
    _ones: Tensor | None = field(default=None, repr=False)
    _factors: Tensor | None = field(default=None, repr=False)

    @classmethod
    def quantised(cls, weight: Tensor) -> Fp8Weight:
        """From a matrix, (d_out, d_in), whose dimensions `fits` accepts."""
        largest = weight.abs().amax(1, keepdim=True).float()
        # A row of zeros has no scale of its own, and one far below the others would send B over it out of range.
        scale = upward(largest.clamp_min(largest.max() * _SMALLEST_ROW) * PER_MOST).clamp_min(LEAST)
        values = torch.empty(weight.shape, dtype=E4M3, device=weight.device)
        for part in range(0, weight.shape[0], _PART):  # the float32 copy is of a few rows at a time
            rows = slice(part, part + _PART)
            values[rows] = (weight[rows].float() / scale[rows]).to(E4M3)
        return cls(values, scale, weight.dtype)

    @classmethod
    def stacked(cls, weights: Sequence[Fp8Weight], ranks: int) -> Fp8Weight:
        """Weights of one input, one below the other, with a border for so many ranks if that pays."""
        d_in = weights[0].shape[1]
        d_out = sum(weight.shape[0] for weight in weights)
        border = _border_that_pays(ranks, (d_out, d_in))
        whole = torch.zeros(d_out, d_in + border, dtype=torch.uint8, device=weights[0].device)
        torch.cat([weight.values.view(torch.uint8) for weight in weights], out=whole[:, :d_in])
        bordered, scale = whole.view(E4M3), torch.cat([weight.scale for weight in weights])
        short = scale[:, 0].bfloat16()
        factors = short if torch.equal(short.float(), scale[:, 0]) else scale[:, 0]
        return cls(
            bordered[:, :d_in], scale, weights[0].dtype, bordered if border else None, scale.new_ones(d_in), factors
        )

    def rows(self, which: slice) -> Fp8Weight:
        """Some of the rows, in the same memory, without the border."""
        return Fp8Weight(self.values[which], self.scale[which], self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Fp8Weight:
        """The same weight elsewhere, or for products in another dtype."""
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
        return self.values.numel() + 4 * self.scale.numel()

    def has_adapter_columns(self, ranks: int) -> bool:
        """True if `stacked` would give it no wider border for so many ranks."""
        width = 0 if self.augmented is None else self.augmented.shape[1] - self.shape[1]
        return width >= _border_that_pays(ranks, self.shape)

    def forward(self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """x Wᵀ + b; (N, d_in) -> (N, d_out). A product in 8 bits adds to nothing: `onto` comes after it."""
        y = product(quantise_rows(x), self.values, self.scale[:, 0], x.dtype, bias)
        return y if onto is None else y.add_(onto)

    def d_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """dy W; (N, d_out) -> (N, d_in)."""
        dx = product(quantise_rows(dy, self.row_scale), transposed(self.values), self.column_scale, dy.dtype)
        return dx if onto is None else dx.add_(onto)

    def dense(self) -> Tensor:
        """The numbers that the 8 bits stand for, in `dtype`."""
        return Scaled(self.values, self.scale).dense(self.dtype)

    @property
    def row_scale(self) -> Tensor:
        """(d_out,), the scale as dy takes it up: bfloat16 where that is exact, which halves what is read of it."""
        return self.scale[:, 0] if self._factors is None else self._factors

    @property
    def column_scale(self) -> Tensor:
        """(d_in,) ones, the scale of the backward's columns."""
        return self.scale.new_ones(self.shape[1]) if self._ones is None else self._ones


def quantise(weight: Tensor) -> FrozenWeight:
    """A matrix, (d_out, d_in), in 8 bits; as it is, if no product in 8 bits has its shape."""
    return Fp8Weight.quantised(weight) if fits(weight.shape) else DenseWeight(weight)


def _border_that_pays(ranks: int, shape: tuple[int, int]) -> int:
    border = border_of(ranks)
    return border if border * _WIDEST_BORDER <= min(shape) else 0


def _split(v: Tensor) -> tuple[Tensor, Tensor]:
    """v as the sum of two numbers of 8 bits, to 8 bits of mantissa."""
    hi = v.to(E4M3)
    return hi, (v - hi.float()).to(E4M3)


def _joined(first: Tensor, *groups: Tensor) -> Tensor:
    """Side by side, and zeros up to the border's width behind `first`."""
    ranks = groups[0].shape[1]
    joined = torch.cat([part.view(torch.uint8) for part in (first, *groups)], 1)
    return pad(joined, (0, border_of(ranks) - 3 * ranks)).view(E4M3)


def _kernels() -> ModuleType:
    from loratune.precision import fp8_kernels  # imports Triton, which is installed with PyTorch for CUDA only

    return fp8_kernels
