"""Several frozen linear maps of one input with their adapters, where W is held in 8 bits and carries A and B.

The counterpart of `precision.projection.Projection`, with the same methods. There the passes that write x and dy
leave room
for the inner columns; here they leave a measure of each row in it (`ops.measure`), from which `precision.fp8.lay`
knows the
row's scale, and makes x Aᵀ and the row in 8 bits, with x Aᵀ behind it, in one reading. An x or dy without a measure,
such as attention's output, is read once more for it.

A and B change between steps only, so what follows from them alone is found then, for all projections (`refresh`):
factors and bounds, B's border behind W, and A's behind W transposed where that is kept. Where it is not, it is made
for the length of one product, A's border with it: two passes over a byte a weight, or as much memory as W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.ops import layer
from loratune.ops.low_rank import AdapterSlices, GradientOperands
from loratune.ops.measure import PAD_COLUMNS, Measure
from loratune.precision.fp8 import Fp8Weight, Scaled, border_of, lay, lay_border, numbers_of, product, transposed


@dataclass
class Laid:
    """Made when the first of the two methods asks, so that dy in 8 bits is held no longer than it must be."""

    values: Tensor | None = None
    """The gradient of x Aᵀ, (N, R)."""
    rows: Scaled | None = None
    """dy in 8 bits with the values behind it, until `d_input` has multiplied it."""


@dataclass(frozen=True)
class Fp8Projection:
    """Frozen linear maps of one input, stacked, and working copies of their adapters, as in `Projection`."""

    frozen: Fp8Weight
    """(D, d_in), with a border wide enough for R ranks."""
    bias: Tensor | None
    """(D,)"""
    lora_A: Tensor
    """(R, d_in)"""
    lora_B: Tensor
    """(D, R)"""
    rows: Sequence[slice]
    ranks: Sequence[slice]
    scalings: Sequence[float]
    numbers: Tensor
    """(4,) float32, see `precision.fp8.numbers_of`."""
    turned: Tensor | None = None
    """(d_in, D + border) e4m3, W transposed with its border, where it is kept."""
    pad_columns: int = PAD_COLUMNS
    """Columns that x and dy may have beyond their own."""

    @classmethod
    def around(
        cls,
        frozen: Fp8Weight,
        bias: Tensor | None,
        adapter: tuple[Tensor, Tensor],
        members: AdapterSlices,
        *,
        both_ways: bool,
    ) -> Fp8Projection:
        """Of a weight that carries; `both_ways` keeps it transposed as well. To be refreshed before it is used."""
        lora_A, lora_B = adapter
        numbers = torch.zeros(4, device=frozen.device)
        assert frozen.bordered is not None
        frozen.bordered[:, frozen.shape[1] :].view(torch.uint8).zero_()  # of an adapter before this one
        turned = transposed(frozen.values, lora_A, numbers.new_ones(1)) if both_ways else None
        return cls(frozen, bias, lora_A, lora_B, members.rows, members.ranks, members.scalings, numbers, turned)

    def dropping(self, _: Tensor) -> Fp8Projection:
        """The same: with dropout, A and B do not ride, and the weight is in an `precision.projection.Projection`."""
        return self

    def at(self, _: int) -> Fp8Projection:
        """The same: without dropout it does not matter which tokens of the row run."""
        return self

    @property
    def measure_x(self) -> Measure:
        """What x is to be measured for."""
        return Measure()

    @property
    def measure_dy(self) -> Measure:
        """What dy is to be measured for."""
        return Measure(self.frozen.row_scale)

    @property
    def bordered(self) -> Tensor:
        """(D, d_in + border) e4m3, W with the border that so many ranks take."""
        assert self.frozen.bordered is not None
        return self.frozen.bordered[:, : self.frozen.shape[1] + border_of(self.lora_A.shape[0])]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, d_in), or with room as measured -> outputs of all members (N, D), and x Aᵀ, (N, R)."""
        rows, inner = lay(x, self.lora_A.T, None, self.numbers[:2])
        return product(rows, self.bordered, self.frozen.scale[:, 0], x.dtype, self.bias), inner

    def forward_swiglu(self, gate_up: Tensor, before: object, inner: Tensor | None) -> tuple[Tensor, Tensor]:
        """`forward` of swiglu(gate_up), (N, 2 d_in); `before` and `inner` are asked for by a bank's (`ops.bank`)."""
        return self.forward(layer.swiglu(gate_up, self.pad_columns, self.measure_x))

    def swiglu_backward(
        self, gate_up: Tensor, inner: Tensor | None, d_active: Tensor, after: object, d_inner: object
    ) -> tuple[Tensor, Tensor, Laid]:
        """As `Projection.swiglu_backward`."""
        d_gate_up, active = layer.swiglu_backward(gate_up, d_active, self.pad_columns, self.measure_dy)
        return d_gate_up, active, self.d_inner(d_gate_up)

    def d_inner(self, dy: Tensor) -> Laid:
        """(N, D), or with room as measured -> what `d_input` and `d_adapters` share, still empty."""
        return Laid()

    def d_input(self, dy: Tensor, d_inner: Laid) -> Tensor:
        """Gradient of the input, (N, d_in). Lets go of dy in 8 bits, so it is called once."""
        self._lay(dy, d_inner)
        rows, d_inner.rows = d_inner.rows, None
        assert rows is not None, "d_input is called once"
        turned = self.turned
        if turned is None:
            turned = transposed(self.frozen.values, self.lora_A, self.numbers[2:3])
        return product(rows, turned, self.frozen.column_scale, dy.dtype)

    def d_adapters(self, dy: Tensor, d_inner: Laid, x: Tensor, inner: Tensor | None) -> GradientOperands:
        """As `Projection.d_adapters`."""
        assert inner is not None
        members = AdapterSlices(self.rows, self.ranks, self.scalings)
        return GradientOperands(x[:, : self.frozen.shape[1]], self._lay(dy, d_inner), dy, inner, members)

    def _lay(self, dy: Tensor, d_inner: Laid) -> Tensor:
        if d_inner.values is None:
            d_inner.rows, d_inner.values = lay(dy, self.lora_B, self.frozen.row_scale, self.numbers[2:])
        return d_inner.values

    def refresh(self) -> None:
        """Brings numbers and borders up to A and B; on a GPU `refresher` does it for many at once."""
        d_out, d_in = self.frozen.shape
        self.numbers.copy_(numbers_of(self.lora_A, self.lora_B, self.frozen.scale))
        lay_border(self.lora_B, self.frozen.scale[:, 0], self.numbers[0], self.bordered[:, d_in:])
        if self.turned is not None:
            lay_border(self.lora_A.T, None, self.numbers[2], self.turned[:, d_out:])


def refresher(projections: Sequence[Fp8Projection]) -> Callable[[], None]:
    """What to call whenever working copies have changed."""
    if projections[0].lora_A.is_cuda:
        from loratune.precision.fp8_kernels import Adapter, RefreshAll  # imports Triton

        return RefreshAll(
            [
                Adapter(
                    p.lora_A,
                    p.lora_B,
                    p.frozen.scale,
                    p.bordered[:, p.frozen.shape[1] :],
                    None if p.turned is None else p.turned[:, p.frozen.shape[0] :],
                    p.numbers,
                )
                for p in projections
            ]
        )

    def each() -> None:
        for projection in projections:
            projection.refresh()

    return each
