"""Projection with the adapters of one run, for weights that are multiplied in 8 bits.

The counterpart of `precision.projection.LowRankProjection`. There, the passes that write x and dy reserve padding
columns for the low-rank activation. Here they leave a measure of each row in those columns (`ops.measure`).
`fp8_rows.quantise_augmented` derives the row's scale from the measure. It then computes x Aᵀ and the row in 8 bits,
with x Aᵀ behind it, in one reading. An x or dy without a measure, such as attention's output, is read once more.

A and B change only between steps. `refresh` then updates everything derived from them alone, for all projections:
factors and bounds, B's adapter columns beside W, and A's adapter columns beside W transposed if that copy is held. If
it is not held, it is made for the length of one product. That costs two passes over a byte for each element of W, and
saves as much memory as W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loratune.ops.low_rank import GradientOperands
from loratune.ops.measure import PAD_COLUMNS, Measure
from loratune.ops.projection import StackedAdapters
from loratune.ops.state import ForwardState
from loratune.precision.fp8 import Fp8Weight
from loratune.precision.fp8_rows import (
    QuantisedRows,
    adapter_columns,
    adapter_factors,
    product,
    quantise_augmented,
    transposed,
    write_adapter_columns,
)


@dataclass(frozen=True)
class Fp8Projection:
    """Stacked 8-bit weights with their adapters; implements `ops.projection.Projection`."""

    frozen: Fp8Weight
    """(D, d_in), with adapter columns for R ranks"""
    bias: Tensor | None
    """(D,)"""
    lora_A: Tensor
    """(R, d_in), compute dtype"""
    lora_B: Tensor
    """(D, R), compute dtype, the scaling multiplied in"""
    adapters: StackedAdapters
    factors: Tensor
    """(4,) float32, see `precision.fp8_rows.adapter_factors`"""
    transposed: Tensor | None = None
    """(d_in, D + adapter columns) e4m3, a held copy of W transposed with A; None to make it for each backward."""
    pad_columns: int = PAD_COLUMNS
    state: ForwardState = field(default_factory=ForwardState)
    """State of the forward that runs this projection."""

    @classmethod
    def of(
        cls,
        frozen: Fp8Weight,
        bias: Tensor | None,
        copies: tuple[Tensor, Tensor],
        adapters: StackedAdapters,
        *,
        hold_transposed: bool,
        state: ForwardState | None = None,
    ) -> Fp8Projection:
        """A projection over a weight with adapter columns. `refresh` must run before its first use."""
        lora_A, lora_B = copies
        factors = torch.zeros(4, device=frozen.device)
        assert frozen.augmented is not None
        frozen.augmented[:, frozen.shape[1] :].view(torch.uint8).zero_()  # an earlier adapter may have filled them
        held = transposed(frozen.values, lora_A, factors.new_ones(1)) if hold_transposed else None
        return cls(frozen, bias, lora_A, lora_B, adapters, factors, held, state=state or ForwardState())

    def with_dropout(self, row: Tensor) -> Fp8Projection:
        """Returns itself: adapters with dropout have a `precision.projection.LowRankProjection` instead."""
        return self

    def from_token(self, first: int) -> Fp8Projection:
        """Returns itself: without dropout, the result does not depend on a token's number."""
        return self

    @property
    def measure_x(self) -> Measure:
        """Statistics of the rows of x, without column scales."""
        return Measure()

    @property
    def measure_dy(self) -> Measure:
        """Statistics of the rows of dy, whose columns are multiplied by the weight's row scales."""
        return Measure(self.frozen.row_scale)

    @property
    def augmented(self) -> Tensor:
        """(D, d_in + adapter columns) e4m3: W and the adapter columns of R ranks."""
        assert self.frozen.augmented is not None
        return self.frozen.augmented[:, : self.frozen.shape[1] + adapter_columns(self.lora_A.shape[0])]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, d_in), or padded and measured -> output (N, D), and x Aᵀ, (N, R)."""
        rows, low_rank = quantise_augmented(x, self.lora_A.T, None, self.factors[:2], self.state.buffers)
        return product(rows, self.augmented, self.frozen.scale[:, 0], x.dtype, self.bias), low_rank

    def backward(self, dy: Tensor) -> Fp8Backward:
        """Starts the backward for dy, (N, D), or padded and measured; nothing is computed yet."""
        return Fp8Backward(self, dy)

    def refresh(self) -> None:
        """Updates factors and adapter columns after a change of A and B. `refresher` does so for many projections."""
        d_out, d_in = self.frozen.shape
        self.factors.copy_(adapter_factors(self.lora_A, self.lora_B, self.frozen.scale))
        write_adapter_columns(self.lora_B, self.frozen.scale[:, 0], self.factors[0], self.augmented[:, d_in:])
        if self.transposed is not None:
            write_adapter_columns(self.lora_A.T, None, self.factors[2], self.transposed[:, d_out:])


class Fp8Backward:
    """Backward of an `Fp8Projection`; implements `ops.projection.ProjectionBackward`.

    dy is quantised when the first result is requested, and freed by `d_input`, so that it is held briefly.
    """

    def __init__(self, projection: Fp8Projection, dy: Tensor) -> None:
        self.projection, self.dy = projection, dy
        self._d_low_rank: Tensor | None = None
        self._rows: QuantisedRows | None = None

    @property
    def d_low_rank(self) -> Tensor:
        """(N, R)"""
        if self._d_low_rank is None:
            p = self.projection
            self._rows, self._d_low_rank = quantise_augmented(
                self.dy, p.lora_B, p.frozen.row_scale, p.factors[2:], p.state.buffers
            )
        return self._d_low_rank

    def d_input(self) -> Tensor:
        """(N, d_in); called at most once, since it frees the quantised dy."""
        assert self.d_low_rank is not None  # quantises dy
        p, rows, self._rows = self.projection, self._rows, None
        assert rows is not None, "d_input is called once"
        weight = p.transposed
        if weight is None:
            weight = transposed(p.frozen.values, p.lora_A, p.factors[2:3])
        return product(rows, weight, p.frozen.column_scale, self.dy.dtype)

    def d_adapters(self, x: Tensor, low_rank: Tensor | None) -> GradientOperands:
        """See `ops.projection.ProjectionBackward`."""
        assert low_rank is not None
        p = self.projection
        return GradientOperands(
            x[:, : p.frozen.shape[1]], self.d_low_rank, self.dy, low_rank, p.adapters.members, buffers=p.state.buffers
        )


def refresher(projections: Sequence[Fp8Projection]) -> Callable[[], None]:
    """A function that updates all projections; call it whenever the working copies have changed."""
    if projections[0].lora_A.is_cuda:
        from loratune.precision.fp8_kernels import AdapterTensors, RefreshAll  # imports Triton

        return RefreshAll(
            [
                AdapterTensors(
                    p.lora_A,
                    p.lora_B,
                    p.frozen.scale,
                    p.augmented[:, p.frozen.shape[1] :],
                    None if p.transposed is None else p.transposed[:, p.frozen.shape[0] :],
                    p.factors,
                )
                for p in projections
            ]
        )

    def each() -> None:
        for projection in projections:
            projection.refresh()

    return each
