"""4-bit frozen weights in the format of QLoRA, equal to those of bitsandbytes to the bit.

A matrix is read row by row and cut into blocks of 64. Each block stores its largest magnitude, `absmax`. Each element
stores the nearest of 16 values that divide the normal distribution evenly (the code book): two codes in a byte, the
first in the high half. The absmax are quantised likewise ("double quantisation"). Their mean, `offset`, is
subtracted, groups of 256 share a float32 `scale`, and 8 bits name one of 256 values of a book whose spacing grows
with magnitude. That is 4 + 8/64 + 32/(64 * 256) = 4.127 bits per element.

    W[i] = book[codes[i]] * absmax[i // 64]        absmax[b] = absmax_book[absmax_codes[b]] * scale[b // 256] + offset

Each product and sum is rounded to float32, and the result to the compute dtype. A matrix product reads an ordinary
matrix that exists only during that product. The matrix is made in the forward and again in the backward, in pieces if
it is large.

Source: Dettmers et al. 2023, "QLoRA", section 3 and Appendix E, arXiv:2305.14314; the 8-bit book from Dettmers et al.
2021, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861; formats as bitsandbytes reads and writes them
(tests/precision/test_nf4.py compares with its recorded values).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from loratune.ops.dispatch import on_gpu
from loratune.ops.frozen import DenseWeight
from loratune.ops.products import MatrixProduct, mm
from loratune.precision.pieces import PIECE_STEP, pieces

BLOCK = 64
"""Elements that share an absmax."""

GROUP = 256
"""Blocks whose absmax share a scale."""

_QUANTISED_AT_ONCE = 1 << 22  # elements

NF4_BOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, Appendix E)."""


def nf4_book(device: torch.device) -> Tensor:
    """The 16 values of NF4, float32."""
    return torch.tensor(NF4_BOOK, dtype=torch.float32, device=device)


def dynamic_book(device: torch.device) -> Tensor:
    """The 256 values of the signed 8-bit dynamic data type, ascending, float32.

    0, 1, and seven decades. Each decade has twice as many evenly spaced values of either sign as the decade below.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10.0 ** (decade - 6) * middles).tolist()
        values += (-(10.0 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class NestedScales:
    """Scales that convert 8-bit absmax to float32: one entry for each group of `GROUP` blocks."""

    scale: Tensor
    """(groups,) float32"""
    offset: Tensor
    """(groups,) float32; equal for all groups of a weight that was quantised as one"""
    book: Tensor
    """(256,) float32"""
    group: int = GROUP


@dataclass(frozen=True)
class Nf4Weight:
    """A frozen matrix of 4-bit codes; implements `ops.frozen.FrozenWeight`."""

    precision: ClassVar[str] = "nf4"
    codes: Tensor
    """(elements / 2,) uint8"""
    absmax: Tensor
    """(blocks,) uint8 with `nested`, float32 without"""
    nested: NestedScales | None
    book: Tensor
    """(16,) float32"""
    shape: tuple[int, int]
    """(d_out, d_in)"""
    dtype: torch.dtype
    """Compute dtype."""
    block: int = BLOCK

    @property
    def device(self) -> torch.device:
        """Device of the codes."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales. Books are not counted."""
        tensors = [self.codes, self.absmax, *((self.nested.scale, self.nested.offset) if self.nested else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None, mm: MatrixProduct = mm
    ) -> Tensor:
        """x Wᵀ + b; (N, d_in) -> (N, d_out)."""
        d_out, d_in = self.shape
        parts = self.row_pieces(x.shape[0])
        if len(parts) == 1:
            return DenseWeight(self.dense()).forward(x, bias, onto, mm)
        y = x.new_empty(x.shape[0], d_out) if onto is None else onto
        for rows in parts:
            part = self.rectangle(rows, slice(0, d_in)).T
            if onto is not None:
                y[:, rows].addmm_(x, part)
            elif bias is None:
                mm(x, part, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, part, out=y[:, rows])
            del part  # so that the next piece reuses its memory
        return y if onto is None or bias is None else y.add_(bias)

    def d_input(self, dy: Tensor, onto: Tensor | None = None, mm: MatrixProduct = mm) -> Tensor:
        """dy W; (N, d_out) -> (N, d_in). Pieces are columns, so that no partial sum is rounded."""
        d_out, d_in = self.shape
        parts = self.column_pieces(dy.shape[0])
        if len(parts) == 1:
            return DenseWeight(self.dense()).d_input(dy, onto, mm)
        dx = dy.new_empty(dy.shape[0], d_in) if onto is None else onto
        for columns in parts:
            part = self.rectangle(slice(0, d_out), columns)
            if onto is not None:
                dx[:, columns].addmm_(dy, part)
            else:
                mm(dy, part, out=dx[:, columns])
            del part
        return dx

    def dense(self) -> Tensor:
        """W in the compute dtype, made now."""
        if self._by_kernel:
            return self.rectangle(slice(0, self.shape[0]), slice(0, self.shape[1]))
        return dequantise(self)

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Nf4Weight:
        """The same codes on another device or for another compute dtype; not rounded again."""
        device = self.device if device is None else torch.device(device)
        nested = self.nested and NestedScales(
            self.nested.scale.to(device),
            self.nested.offset.to(device),
            self.nested.book.to(device),
            self.nested.group,
        )
        return replace(
            self,
            codes=self.codes.to(device),
            absmax=self.absmax.to(device),
            nested=nested,
            book=self.book.to(device),
            dtype=dtype or self.dtype,
        )

    def rows(self, rows: slice) -> Nf4Weight:
        """Some of the rows as a weight in the same memory; they must begin and end with a whole group."""
        d_in = self.shape[1]
        at = slice(rows.start * d_in, rows.stop * d_in)
        assert at.start % self._unit == at.stop % self._unit == 0
        blocks = slice(at.start // self.block, at.stop // self.block)
        nested = self.nested
        if nested is not None:
            groups = slice(blocks.start // nested.group, blocks.stop // nested.group)
            nested = replace(nested, scale=nested.scale[groups], offset=nested.offset[groups])
        return replace(
            self,
            codes=self.codes[at.start // 2 : at.stop // 2],
            absmax=self.absmax[blocks],
            nested=nested,
            shape=(rows.stop - rows.start, d_in),
        )

    def aligned_with(self, ranks: int) -> bool:
        """True if rows of W with `ranks` adapter columns behind them are aligned to 16 bytes."""
        return ranks * self.dtype.itemsize % 16 == 0 and self.shape[1] * self.dtype.itemsize % 16 == 0

    def row_pieces(self, tokens: int) -> list[slice]:
        """Pieces of rows, of which one at a time is dense in the forward of `tokens` tokens."""
        d_out, d_in = self.shape
        return pieces(d_out, d_in, tokens) if self._by_kernel else [slice(0, d_out)]

    def column_pieces(self, tokens: int) -> list[slice]:
        """Pieces of columns, of which one at a time is dense in the backward of `tokens` tokens."""
        d_out, d_in = self.shape
        return pieces(d_in, d_out, tokens, max(PIECE_STEP, self.block)) if self._by_kernel else [slice(0, d_in)]

    def rectangle(self, rows: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        """Part of W, dense, in `out` (whose rows may be strided) or in a new tensor."""
        if out is None:
            shape = rows.stop - rows.start, columns.stop - columns.start
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        if not self._by_kernel:
            return out.copy_(dequantise(self)[rows, columns])
        if out.is_meta:
            return out
        kernels = importlib.import_module("loratune.precision.nf4_kernels")  # imports Triton
        made: Tensor = kernels.dequantise(self, rows, columns, out)
        return made

    @property
    def _unit(self) -> int:
        """Elements that stay together: a block, or a group of blocks with nested absmax."""
        return self.block * (1 if self.nested is None else self.nested.group)

    @property
    def _by_kernel(self) -> bool:
        """True on a GPU, where blocks do not cross rows. The meta device behaves like a GPU (`ops.dispatch`)."""
        power_of_two = self.block & (self.block - 1) == 0
        fits = self.shape[1] % self.block == 0 and power_of_two and self.block <= 4096
        return on_gpu(self.codes) and self.dtype != torch.float64 and fits


@dataclass(frozen=True)
class AugmentedNf4:
    """[W B; A 0], made dense in pieces; implements `precision.projection.AugmentedWeight`."""

    weight: Nf4Weight
    lora_A: Tensor
    """(R, d_in), compute dtype"""
    lora_B: Tensor
    """(d_out, R), compute dtype"""

    @property
    def pad_columns(self) -> int:
        """R, the number of adapter columns."""
        return self.lora_B.shape[1]

    def forward(self, x: Tensor, bias: Tensor | None, mm: MatrixProduct = mm) -> Tensor:
        """[x, x Aᵀ] [W B]ᵀ + b; (N, d_in + R) -> (N, d_out)."""
        d_out, d_in = self.weight.shape
        y = x.new_empty(x.shape[0], d_out)
        for rows in self.weight.row_pieces(x.shape[0]):
            part = x.new_empty(rows.stop - rows.start, x.shape[1])
            self.weight.rectangle(rows, slice(0, d_in), part[:, :d_in])
            part[:, d_in:] = self.lora_B[rows]
            if bias is None:
                mm(x, part.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, part.T, out=y[:, rows])
            del part  # so that the next piece reuses its memory
        return y

    def d_input(self, dy: Tensor, mm: MatrixProduct = mm) -> Tensor:
        """[dy, dy B] [W; A]; (N, d_out + R) -> (N, d_in)."""
        d_out, d_in = self.weight.shape
        dx = dy.new_empty(dy.shape[0], d_in)
        for columns in self.weight.column_pieces(dy.shape[0]):
            part = dy.new_empty(dy.shape[1], columns.stop - columns.start)
            self.weight.rectangle(slice(0, d_out), columns, part[:d_out])
            part[d_out:] = self.lora_A[:, columns]
            mm(dy, part, out=dx[:, columns])
            del part
        return dx


@torch.no_grad()
def quantise(weight: Tensor, *, nested: bool = True, block: int = BLOCK) -> Nf4Weight:
    """The 4-bit form of a matrix, as bitsandbytes makes it on a GPU.

    Args:
        weight: (d_out, d_in) on any device, any float dtype but float64; its dtype becomes the compute dtype.
        nested: quantise the absmax as well.
        block: elements that share an absmax.

    Memory: some 100 MiB beside the weight and its codes, since it is quantised in pieces.
    """
    d_out, d_in = weight.shape
    book = nf4_book(weight.device)
    step = _QUANTISED_AT_ONCE // block * block
    parts = [_quantise(part, block, book) for part in weight.reshape(-1).split(step)]
    codes, absmax = (torch.cat(column) if len(parts) > 1 else column[0] for column in zip(*parts, strict=True))
    scales = None
    if nested:
        absmax_book, offset = dynamic_book(weight.device), absmax.mean()
        absmax, scale = _quantise_absmax(absmax - offset, absmax_book)
        scales = NestedScales(scale, offset.expand_as(scale).contiguous(), absmax_book)
    return Nf4Weight(codes, absmax, scales, book, (d_out, d_in), weight.dtype, block)


def dequantise(weight: Nf4Weight) -> Tensor:
    """The matrix, (d_out, d_in) in `weight.dtype`: the reference of the kernel, and the implementation on a CPU."""
    elements = weight.shape[0] * weight.shape[1]
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], 1).view(-1)[:elements]
    values = weight.book[codes.int()]
    scaled = _blocks(values, weight.block) * absmax_of(weight)[:, None]
    return scaled.view(-1)[:elements].view(weight.shape).to(weight.dtype)


def absmax_of(weight: Nf4Weight) -> Tensor:
    """The largest magnitude of each block, (blocks,) float32."""
    nested = weight.nested
    if nested is None:
        return weight.absmax
    count = weight.absmax.numel()
    scale, offset = (t.repeat_interleave(nested.group)[:count] for t in (nested.scale, nested.offset))
    return nested.book[weight.absmax.int()] * scale + offset


def join(weights: Sequence[Nf4Weight]) -> Nf4Weight:
    """All rows of the weights as one weight, so that they take one launch and one product.

    If a weight does not end with a whole group of absmax, all absmax are converted to float32. Their values stay
    equal.
    """
    first = weights[0]
    if any(not _alike(weight, first) or weight.shape[0] * weight.shape[1] % weight._unit for weight in weights):
        weights = [replace(weight, absmax=absmax_of(weight), nested=None) for weight in weights]
        first = weights[0]
    assert all(_alike(weight, first) and weight.shape[0] * weight.shape[1] % first.block == 0 for weight in weights)
    nested = first.nested
    if nested is not None:
        of_each = [weight.nested for weight in weights if weight.nested is not None]
        nested = replace(
            nested, scale=torch.cat([n.scale for n in of_each]), offset=torch.cat([n.offset for n in of_each])
        )
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in weights]),
        absmax=torch.cat([weight.absmax for weight in weights]),
        nested=nested,
        shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
    )


def _alike(weight: Nf4Weight, other: Nf4Weight) -> bool:
    """True if both have the same books, blocks and dtype."""
    same = (weight.block, weight.dtype, weight.nested is None) == (other.block, other.dtype, other.nested is None)
    if not same or not _equal(weight.book, other.book):
        return False
    if weight.nested is None or other.nested is None:
        return True
    return weight.nested.group == other.nested.group and _equal(weight.nested.book, other.nested.book)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Books without data, on the meta device, count as equal."""
    return a is b or a.is_meta or torch.equal(a, b)


def _quantise(flat: Tensor, block: int, book: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes, two to a byte, and absmax in float32."""
    absmax, unit = _normalised(flat, block)
    unit = unit.view(-1)[: flat.numel() + flat.numel() % 2]
    codes = torch.bucketize(unit, _midpoints(book), out_int32=True).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax


def _quantise_absmax(absmax: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of numbers around zero, and the scale of each group.

    A number halfway between two values of the book gets the even code, as in the binary search of bitsandbytes'
    kernel.
    """
    scale, unit = _normalised(absmax, GROUP)
    unit, bounds = unit.view(-1)[: absmax.numel()], _midpoints(book)
    lower, upper = (torch.bucketize(unit, bounds, out_int32=True, right=right) for right in (False, True))
    return torch.where(lower % 2 == 0, lower, upper).to(torch.uint8), scale


def _normalised(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """absmax of each block, and the blocks times its reciprocal; a block of zeros stays zero."""
    blocks = _blocks(flat.float(), block)
    absmax = blocks.abs().amax(1)
    return absmax, blocks * absmax.clamp(min=1e-38).reciprocal()[:, None]


def _midpoints(book: Tensor) -> Tensor:
    return (book[:-1] + book[1:]) / 2


def _blocks(flat: Tensor, block: int) -> Tensor:
    """(n,) -> (blocks, block), the last one padded with zeros."""
    return pad(flat, (0, -flat.numel() % block)).view(-1, block)
