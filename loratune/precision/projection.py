"""Several frozen linear maps of one input with their adapters, as one product each way.

    y = x Wᵀ + b + (x Aᵀ) Bᵀ        W, A and B of all members side by side, B zero between members that differ

Written so, the low-rank part reads and writes y and dx once more, and on a GPU that costs a tenth of what the wide
product costs. So where W is a matrix it lies in memory with a border,

    [ W  B ]        y  = [x, x Aᵀ] [W B]ᵀ
    [ A  . ]        dx = [dy, dy B] [W]
                                    [A]

and the low-rank part rides in the wide product: R more terms in each sum, padded to a whole tile of the product. The
passes that write x and dy leave `room` for the inner columns in each row (`ops.layer`), which are filled in here.
Whether a row has room is told by its length. An x without room, such as attention's output, is copied on the way;
onto the low-rank part of a dy without room the wide product is added, as it is without a border.
A weight in 4 bits gets its border for the length of a product (`precision.nf4`); one in 8 bits has its own
(`precision.fp8`), and with an adapter in it a projection of its own (`precision.fp8_projection`).

Dropout lies between x and A, so y rides as before. What it does to dx is a mask over (dy B) A, one for each member,
and no longer a sum that the product could take up: the wide product is added onto it.

The forward and the gradients are plain functions without autograd: `fused.block` puts them into its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import linear

from loratune.ops import layer
from loratune.ops.frozen import Frozen
from loratune.ops.low_rank import AdapterDropout, AdapterSlices, GradientOperands, down_project, up_project
from loratune.ops.products import mm
from loratune.precision.nf4 import Nf4Weight


@dataclass(frozen=True)
class Projection:
    """Frozen linear maps of one input, stacked, and working copies of their adapters.

    Member i has the rows `rows[i]` of the weight and the columns `ranks[i]` of `lora_B`, which is zero elsewhere.
    """

    frozen: Frozen
    """(D, d_in)"""
    bias: Tensor | None
    """(D,)"""
    lora_A: Tensor | None
    """(R, d_in), compute dtype; None if no member has an adapter."""
    lora_B: Tensor | None
    """(D, R), compute dtype, the scaling multiplied in."""
    rows: Sequence[slice]
    ranks: Sequence[slice]
    scalings: Sequence[float]
    bordered: Tensor | None = None
    """(D + pad_columns, d_in + pad_columns), W with its border, of which the weight, `lora_A` and `lora_B` are views;
    its padding is zero. None where W is not a matrix, or nothing has an adapter."""
    measure_x: None = None
    measure_dy: None = None
    """What rows are measured for (`ops.measure`): nothing."""
    dropout: float = 0.0
    """Probability of zeroing an element of what an adapter reads."""
    salts: Sequence[int] = ()
    """`ops.dropout.layer_salt` of each member."""
    drops: AdapterDropout | None = None
    """The dropout of one forward and its backward; None for none."""

    def dropping(self, row: Tensor) -> Projection:
        """The same with dropout, in the row of that `ops.dropout.row_key`."""
        return (
            replace(self, drops=AdapterDropout(row, self.dropout, self.salts, self.ranks)) if self.dropout else self
        )

    def at(self, first: int) -> Projection:
        """The same on tokens from the nth of the row on."""
        return self if self.drops is None else replace(self, drops=replace(self.drops, first=first))

    @property
    def pad_columns(self) -> int:
        """Columns that x and dy may have beyond their own."""
        return 0 if self._border is None else self._border[1].shape[1]

    @property
    def _border(self) -> tuple[Tensor, Tensor] | None:
        """A, (pad_columns, d_in), and B, (D, pad_columns), that ride in the wide product; None where they do not."""
        d_out, d_in = self.frozen.shape
        if self.bordered is not None:
            return self.bordered[d_out:, :d_in], self.bordered[:d_out, d_in:]
        if self.lora_A is None or self.lora_B is None or not isinstance(self.frozen, Nf4Weight):
            return None
        return (self.lora_A, self.lora_B) if self.frozen.carries(self.lora_B.shape[1]) else None

    def _wide(self, padded: Tensor) -> Tensor:
        """[x, x Aᵀ] [W B]ᵀ + b, where there is a border."""
        if self.bordered is not None:
            weight = self.bordered[: self.frozen.shape[0]]
            return mm(padded, weight.T) if self.bias is None else linear(padded, weight, self.bias)
        assert isinstance(self.frozen, Nf4Weight)
        assert self.lora_B is not None
        return self.frozen.forward_carrying(padded, self.bias, self.lora_B)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, d_in) or (N, d_in + pad_columns) -> outputs of all members (N, D), and x Aᵀ, (N, R)."""
        d_in, border = self.frozen.shape[1], self._border
        if border is not None and self.lora_A is not None:
            padded = x if x.shape[1] > d_in else x.new_empty(x.shape[0], d_in + self.pad_columns)
            copy = None if padded is x else padded[:, :d_in]
            inner = down_project(x[:, :d_in], self.lora_A.T, padded[:, d_in:], copy=copy, drops=self.drops)
            return self._wide(padded), inner
        if self.lora_A is None or self.lora_B is None:
            return self.frozen.forward(x, self.bias), None
        inner = down_project(x, self.lora_A.T, drops=self.drops)
        return self.frozen.forward(x, self.bias, inner @ self.lora_B.T), inner

    def forward_swiglu(self, gate_up: Tensor, before: object, inner: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`forward` of swiglu(gate_up), (N, 2 d_in); `before` and `inner` are asked for by a bank's (`ops.bank`)."""
        return self.forward(layer.swiglu(gate_up, self.pad_columns))

    def swiglu_backward(
        self, gate_up: Tensor, inner: Tensor | None, d_active: Tensor, after: object, d_inner: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the activation that follows this projection, with what follows from its result here.

        Args:
            gate_up: (N, D), the output of this projection.
            d_active: (N, D / 2), gradient of swiglu(gate_up).
            inner, after, d_inner: asked for by a bank's (`ops.bank.projection`).
        Returns: gradient of gate_up, to be handed on to `d_input` and `d_adapters`; swiglu(gate_up); and `d_inner`.
        """
        d_gate_up, active = layer.swiglu_backward(gate_up, d_active, self.pad_columns)
        return d_gate_up, active, self.d_inner(d_gate_up)

    def d_inner(self, dy: Tensor) -> Tensor | None:
        """(N, D) or (N, D + pad_columns), which is filled in -> gradient of x Aᵀ, (N, R)."""
        if self.lora_B is None:
            return None
        d_out = self.frozen.shape[0]
        if dy.shape[1] > d_out:
            return down_project(dy[:, :d_out], self.lora_B, dy[:, d_out:], keep=False)
        return down_project(dy, self.lora_B)

    def d_input(self, dy: Tensor, d_inner: Tensor | None) -> Tensor:
        """Gradient of the input, (N, d_in); dy as `d_inner` left it."""
        d_out, d_in = self.frozen.shape
        if self.drops is not None and d_inner is not None and self.lora_A is not None:
            return self.frozen.d_input(dy[:, :d_out], up_project(d_inner, self.lora_A, self.drops))
        if self.bordered is not None and dy.shape[1] > d_out:
            return mm(dy, self.bordered[:, :d_in])
        if d_inner is None or self.lora_A is None:
            return self.frozen.d_input(dy)
        if isinstance(self.frozen, Nf4Weight) and dy.shape[1] > d_out:
            return self.frozen.d_input_carrying(dy, self.lora_A)
        return self.frozen.d_input(dy, d_inner @ self.lora_A)

    def d_adapters(
        self, dy: Tensor, d_inner: Tensor | None, x: Tensor, inner: Tensor | None
    ) -> GradientOperands | list[Tensor]:
        """What makes the gradients of the masters: A, B of the first member with an adapter, then of the next.

        x may have room.
        """
        if d_inner is None or inner is None:
            return []
        members = AdapterSlices(self.rows, self.ranks, self.scalings)
        return GradientOperands(x[:, : self.frozen.shape[1]], d_inner, dy, inner, members, self.drops)
