"""Projection with the adapters of one run, for weights that are multiplied in floating point.

    y = x Wᵀ + b + (x Aᵀ) Bᵀ        W, A and B of all members side by side, B zero between different members

Computed as written, the low-rank part reads and writes y and dx once more, which costs a tenth of the frozen product
on a GPU. Most precisions therefore offer the augmented weight:

    [ W  B ]        y  = [x, x Aᵀ] [W B]ᵀ
    [ A  0 ]        dx = [dy, dy B] [W; A]

One product then computes both parts, with a few more terms in each sum. The pass that writes x or dy reserves padding
columns behind each row (`ops.layer`), and `x Aᵀ` or `dy B` is written into them here. The length of a row shows
whether it has padding columns. An x without them, such as attention's output, is copied. For a dy without them the
frozen product is added onto the low-rank part.

Dropout acts between x and A, so the forward stays one product. In the backward each member has a mask between
(dy B) A and dx, which cannot be part of a product. The frozen product is then added onto the masked sum.

`precision.fp8_projection` is the counterpart for products in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from loratune.ops.frozen import FrozenWeight
from loratune.ops.low_rank import AdapterDropout, GradientOperands, down_project, up_project
from loratune.ops.products import MatrixProduct
from loratune.ops.projection import StackedAdapters
from loratune.ops.state import ForwardState


class AugmentedWeight(Protocol):
    """The augmented weight [W B; A 0], which computes the frozen and the low-rank part in one product."""

    @property
    def pad_columns(self) -> int:
        """Adapter columns: the sum of the ranks, rounded up as the product needs."""

    def forward(self, x: Tensor, bias: Tensor | None, mm: MatrixProduct) -> Tensor:
        """[x, x Aᵀ] [W B]ᵀ + b; (N, d_in + pad_columns) -> (N, D)."""

    def d_input(self, dy: Tensor, mm: MatrixProduct) -> Tensor:
        """[dy, dy B] [W; A]; (N, D + pad_columns) -> (N, d_in)."""


@dataclass(frozen=True)
class LowRankProjection:
    """Stacked frozen weights with working copies of their adapters; implements `ops.projection.Projection`."""

    frozen: FrozenWeight
    """(D, d_in)"""
    bias: Tensor | None
    """(D,)"""
    lora_A: Tensor | None = None
    """(R, d_in), compute dtype; None if no member has an adapter."""
    lora_B: Tensor | None = None
    """(D, R), compute dtype, the scaling multiplied in."""
    adapters: StackedAdapters = field(default_factory=StackedAdapters)
    augmented: AugmentedWeight | None = None
    """Augmented weight over the same A and B; None if the low-rank part is added separately."""
    drops: AdapterDropout | None = None
    """Dropout of one forward and its backward; None for none."""
    measure_x: None = None
    measure_dy: None = None
    state: ForwardState = field(default_factory=ForwardState)
    """State of the forward that runs this projection."""

    @property
    def pad_columns(self) -> int:
        """Adapter columns of the augmented weight."""
        return 0 if self.augmented is None else self.augmented.pad_columns

    def with_dropout(self, row: Tensor) -> LowRankProjection:
        """The projection with its adapters' dropout in the row of key `row`."""
        adapters = self.adapters
        if not adapters.dropout:
            return self
        return replace(self, drops=AdapterDropout(row, adapters.dropout, adapters.salts, adapters.ranks))

    def from_token(self, first: int) -> LowRankProjection:
        """The projection for the tokens of a row from number `first` on."""
        return self if self.drops is None else replace(self, drops=replace(self.drops, first=first))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, d_in) or (N, d_in + pad_columns) -> output (N, D), and x Aᵀ (N, R)."""
        mm, buffers = self.state.products.mm, self.state.buffers
        if self.lora_A is None or self.lora_B is None:
            return self.frozen.forward(x, self.bias, mm=mm), None
        if self.augmented is None:
            low_rank = down_project(x, self.lora_A.T, drops=self.drops, buffers=buffers)
            return self.frozen.forward(x, self.bias, low_rank @ self.lora_B.T, mm), low_rank
        d_in = self.frozen.shape[1]
        padded = x if x.shape[1] > d_in else x.new_empty(x.shape[0], d_in + self.pad_columns)
        copy = None if padded is x else padded[:, :d_in]
        low_rank = down_project(
            x[:, :d_in], self.lora_A.T, padded[:, d_in:], copy=copy, drops=self.drops, buffers=buffers
        )
        return self.augmented.forward(padded, self.bias, mm), low_rank

    def backward(self, dy: Tensor) -> LowRankBackward:
        """Starts the backward for dy, (N, D) or (N, D + pad_columns)."""
        d_out = self.frozen.shape[0]
        if self.lora_B is None:
            return LowRankBackward(self, dy, None)
        tail = dy[:, d_out:] if dy.shape[1] > d_out else None
        d_low_rank = down_project(dy[:, :d_out], self.lora_B, tail, keep=tail is None, buffers=self.state.buffers)
        return LowRankBackward(self, dy, d_low_rank)


@dataclass(frozen=True)
class LowRankBackward:
    """Backward of a `LowRankProjection`; implements `ops.projection.ProjectionBackward`."""

    projection: LowRankProjection
    dy: Tensor
    """(N, D), or (N, D + pad_columns) with dy B behind each row."""
    d_low_rank: Tensor | None
    """(N, R)"""

    def d_input(self) -> Tensor:
        """(N, d_in)"""
        p, dy, d_out = self.projection, self.dy, self.projection.frozen.shape[0]
        mm = p.state.products.mm
        if self.d_low_rank is None or p.lora_A is None:
            return p.frozen.d_input(dy, mm=mm)
        if p.drops is not None:
            onto = up_project(self.d_low_rank, p.lora_A, p.drops, p.state.buffers)
            return p.frozen.d_input(dy[:, :d_out], onto, mm)
        if p.augmented is not None and dy.shape[1] > d_out:
            return p.augmented.d_input(dy, mm)
        return p.frozen.d_input(dy, self.d_low_rank @ p.lora_A, mm)

    def d_adapters(self, x: Tensor, low_rank: Tensor | None) -> GradientOperands | list[Tensor]:
        """See `ops.projection.ProjectionBackward`."""
        p = self.projection
        if self.d_low_rank is None or low_rank is None:
            return []
        return GradientOperands(
            x[:, : p.frozen.shape[1]],
            self.d_low_rank,
            self.dy,
            low_rank,
            p.adapters.members,
            p.drops,
            p.state.buffers,
        )
