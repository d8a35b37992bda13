"""Several frozen linear maps of one input with their adapters, as one product each way.

    y = x Wᵀ + b + (x Aᵀ) Bᵀ        W, A and B of all members side by side, B zero between members that differ

Written so, the low-rank part reads and writes y and dx once more, and on a GPU that costs a tenth of what the wide
product costs. So where W is a matrix it lies in memory with a border,

    [ W  B ]        y  = [x, x Aᵀ] [W B]ᵀ
    [ A  . ]        dx = [dy, dy B] [W]
                                    [A]

and the low-rank part rides in the wide product: R more terms in each sum, padded to a whole tile of the product. The
passes that write x and dy leave `room` for the inner columns in each row (`ops.layer`), which are filled in here.
Whether a row has room is told by its length; what comes without, such as attention's output, is added to as above.
An 8-bit weight has a border of its own (`ops.fp8`), one in 4 bits has none.

The forward and the gradients are plain functions without autograd: `ops.block` puts them into its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from loratune.ops.fp8 import Fp8Weight
from loratune.ops.frozen import Frozen


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
    """(D + room, d_in + room), W with its border, of which the weight, `lora_A` and `lora_B` are views; its padding
    is zero. None where W is not a matrix, or nothing has an adapter."""

    @property
    def room(self) -> int:
        """Columns that x and dy may have beyond their own."""
        return 0 if self.bordered is None else self.bordered.shape[0] - self.frozen.shape[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, d_in) or (N, d_in + room) -> outputs of all members (N, D), and x Aᵀ, at least R columns of it."""
        d_out, d_in = self.frozen.shape
        if self.bordered is not None and x.shape[1] > d_in:
            inner = x[:, :d_in] @ self.bordered[d_out:, :d_in].T
            x[:, d_in:] = inner  # a copy, so that who keeps `inner` does not keep x
            return linear(x, self.bordered[:d_out], self.bias), inner
        if self.lora_A is None or self.lora_B is None:
            return self.frozen.forward(x, self.bias), None
        inner = x @ self.lora_A.T
        if isinstance(self.frozen, Fp8Weight) and self.frozen.carries:
            return self.frozen.forward_carrying(x, self.bias, inner, self.lora_B), inner
        return self.frozen.forward(x, self.bias).addmm_(inner, self.lora_B.T), inner

    def d_inner(self, dy: Tensor) -> Tensor | None:
        """(N, D) or (N, D + room), which is filled in -> gradient of x Aᵀ, (N, R)."""
        if self.lora_B is None:
            return None
        d_out, d_in = self.frozen.shape
        if self.bordered is not None and dy.shape[1] > d_out:
            torch.mm(dy[:, :d_out], self.bordered[:d_out, d_in:], out=dy[:, d_out:])
            return dy[:, d_out : d_out + self.lora_B.shape[1]]
        return dy @ self.lora_B

    def d_input(self, dy: Tensor, d_inner: Tensor | None) -> Tensor:
        """Gradient of the input, (N, d_in); dy as `d_inner` left it."""
        d_out, d_in = self.frozen.shape
        if self.bordered is not None and dy.shape[1] > d_out:
            return dy @ self.bordered[:, :d_in]
        if d_inner is None or self.lora_A is None:
            return self.frozen.d_input(dy)
        if isinstance(self.frozen, Fp8Weight) and self.frozen.carries:
            return self.frozen.d_input_carrying(dy, d_inner, self.lora_A)
        return self.frozen.d_input(dy).addmm_(d_inner, self.lora_A)

    def d_adapters(self, dy: Tensor, d_inner: Tensor | None, x: Tensor, inner: Tensor | None) -> list[Tensor]:
        """Gradients of the masters: A, B of the first member with an adapter, then of the next. x may have room."""
        if d_inner is None or inner is None:
            return []
        dA = _product(d_inner.T, x[:, : self.frozen.shape[1]])
        gradients = []
        for rows, ranks, scaling in zip(self.rows, self.ranks, self.scalings, strict=True):
            dB = _product(dy[:, rows].T, inner[:, ranks])
            gradients += [dA[ranks], dB if scaling == 1.0 else dB.mul_(scaling)]
        return gradients


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the masters' precision: summed and returned in float32 where the operands have less."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    product = a @ b
    return product if product.dtype == torch.float64 else product.float()
