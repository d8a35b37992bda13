"""Contract of a projection: frozen linear maps of one input, stacked, with the adapters of their members.

    y = x Wᵀ + b + (x Aᵀ) Bᵀ        W, A and B of all members one below the other, B zero between different members

Fused decoder layers compute with projections only. They never read a weight or an adapter themselves, so a precision,
a bank of adapters or a sharded weight changes a layer's arithmetic by providing another projection.

    precision.projection      adapters of one run, in floating point and 4 bits
    precision.fp8_projection  adapters of one run, in 8 bits
    ops.bank.projection       several adapters, each with its own tokens

An MLP has an activation between two projections. A `LinkedActivation` knows both projections, because the
activation's kernel may add their low-rank parts.

All methods are plain functions of tensors without autograd; `fused.block` calls them from its autograd nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from loratune.ops.frozen import FrozenWeight
from loratune.ops.low_rank import AdapterSlices, GradientOperands
from loratune.ops.measure import Measure


class ProjectionBackward(Protocol):
    """Backward of one `Projection.forward` for one output gradient."""

    @property
    def d_low_rank(self) -> Tensor | None:
        """(N, R), gradient of the low-rank activation x Aᵀ; None without an adapter."""

    def d_input(self) -> Tensor:
        """(N, d_in), gradient of the input. Called at most once."""

    def d_adapters(self, x: Tensor, low_rank: Tensor | None) -> GradientOperands | list[Tensor]:
        """Gradients of the adapters' masters: A and B of the first adapted member, then of the next.

        Args:
            x: (N, at least d_in), the input of the forward.
            low_rank: second result of the forward.
        Returns: the gradients, or operands from which `ops.low_rank.gradients_of` computes the gradients of several
            projections in one launch.
        """


class Projection(Protocol):
    """Frozen linear maps of one input with their adapters.

    Inputs and output gradients may have `pad_columns` columns behind those of the weight. Padding columns hold the
    low-rank activation, or the measure of the row (`ops.measure`). The pass that writes x or dy reserves them.
    Without them the projection copies or rereads its operand.
    """

    @property
    def frozen(self) -> FrozenWeight:
        """(D, d_in), the weights of all members one below the other."""

    @property
    def pad_columns(self) -> int:
        """Padding columns that x and dy should have."""

    @property
    def measure_x(self) -> Measure | None:
        """Statistics to store in the padding columns of x; None for none."""

    @property
    def measure_dy(self) -> Measure | None:
        """Statistics to store in the padding columns of dy; None for none."""

    def with_dropout(self, row: Tensor) -> Projection:
        """The projection with its adapters' dropout in the row of key `row` (`ops.dropout.row_key`)."""

    def from_token(self, first: int) -> Projection:
        """The projection for the tokens of a row from number `first` on. Dropout depends on the number."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, d_in) or (N, d_in + pad_columns) -> output (N, D), and x Aᵀ (N, R) or None without an adapter."""

    def backward(self, dy: Tensor) -> ProjectionBackward:
        """Starts the backward for dy, (N, D) or (N, D + pad_columns). Overwrites the padding columns of dy."""


class Activation(Protocol):
    """Elementwise function between two projections, plain or gated, with its gradient written by hand."""

    @property
    def kind(self) -> str:
        """Name of the nonlinearity, such as "silu"."""

    @property
    def gated(self) -> bool:
        """True for f(gate) · up of stacked columns [gate, up]."""

    def forward(self, x: Tensor, pad_columns: int, measure: Measure | None) -> Tensor:
        """(N, D) -> (N, m + pad_columns), where m is D, or D / 2 if gated."""

    def backward(self, x: Tensor, d_out: Tensor, pad_columns: int, measure: Measure | None) -> tuple[Tensor, Tensor]:
        """Gradient of x, (N, D + pad_columns), and the activation recomputed, (N, m)."""


class LinkedActivation(Protocol):
    """An activation between two projections of an MLP."""

    def forward(self, y: Tensor, low_rank: Tensor | None) -> Tensor:
        """Results of the first projection's forward -> input of the second projection."""

    def backward(
        self, y: Tensor, low_rank: Tensor | None, d_out: Tensor, following: ProjectionBackward
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the first projection's output, and the activation recomputed, (N, m).

        Args:
            y, low_rank: results of the first projection's forward.
            d_out: (N, m), the second projection's `d_input`.
            following: the second projection's backward.
        """


@dataclass(frozen=True)
class PaddedActivation:
    """The usual `LinkedActivation`: both projections add their low-rank parts themselves."""

    activation: Activation
    first: Projection
    second: Projection

    def forward(self, y: Tensor, low_rank: Tensor | None) -> Tensor:
        """(N, D) -> (N, m), padded and measured for the second projection."""
        return self.activation.forward(y, self.second.pad_columns, self.second.measure_x)

    def backward(
        self, y: Tensor, low_rank: Tensor | None, d_out: Tensor, following: ProjectionBackward
    ) -> tuple[Tensor, Tensor]:
        """Gradient of y, padded and measured for the first projection, and the activation, (N, m)."""
        return self.activation.backward(y, d_out, self.first.pad_columns, self.first.measure_dy)


@dataclass(frozen=True)
class StackedAdapters:
    """Layout of the adapters of a projection: member i has rows `rows[i]` of W and B, ranks `ranks[i]` of A and B."""

    rows: Sequence[slice] = ()
    ranks: Sequence[slice] = ()
    scalings: Sequence[float] = ()
    dropout: float = 0.0
    """Probability of zeroing an element of an adapter's input."""
    salts: Sequence[int] = ()
    """`ops.dropout.layer_salt` of each member."""

    @property
    def total(self) -> int:
        """Sum of the ranks."""
        return self.ranks[-1].stop if self.ranks else 0

    @property
    def members(self) -> AdapterSlices:
        """The same layout, as an argument of `ops.low_rank.gradients`."""
        return AdapterSlices(self.rows, self.ranks, self.scalings)
