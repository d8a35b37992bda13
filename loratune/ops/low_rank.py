"""Products with one thin operand, the ranks of an adapter: cheap in arithmetic, bound by reading the wide operand.

    narrow      (N, K) (K, R) -> (N, R)       x Aᵀ, and dy B
    gradients   dA = (dy B)ᵀ x  and  dB = dyᵀ (x Aᵀ)  of all adapters of a projection
    widen       (N, R) (R, K) -> (N, K)       (dy B) A, which needs one of its own where dropout lies in between

Libraries cut the long sum of such a product into pieces to fill a GPU, with a launch to clear memory before and one
to add the pieces behind, and at 512 tokens that costs more than the product. On a GPU in half precision the twins in
`ops.low_rank_kernels` run: one launch each, where the last block adds up the pieces, in their order, so that
the result does not depend on which block that is. Gradients of several projections are one launch, too.

With dropout each adapter reads an x of its own (`AdapterDropout`). The kernels mask it as it is read, or before it is
written, so that no dropped x and no mask is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratune.ops.dispatch import on_gpu, with_kernel
from loratune.ops.dropout import keep_mask


@dataclass(frozen=True)
class AdapterDropout:
    """Dropout of what the adapters of one projection read: as in PEFT, each one's is its own."""

    row: Tensor
    """`ops.dropout.row_key` of the row that runs."""
    probability: float
    salts: Sequence[int]
    """`ops.dropout.layer_salt` of each adapter."""
    ranks: Sequence[slice]
    """Columns of each in x Aᵀ; together all of them, in order."""
    first: int = 0
    """Number in the row of the first of the tokens at hand."""

    @property
    def scale(self) -> float:
        """Factor of what is kept."""
        return 1 / (1 - self.probability)

    def of(self, x: Tensor, member: int) -> Tensor:
        """Dropout of x, (N, K), or of its gradient, for one adapter."""
        shape = x.shape[0], x.shape[1]
        return (x * keep_mask(self.row, self.salts[member], shape, self.probability, self.first)).mul_(self.scale)


def _half_on_gpu(wide: Tensor, thin: Tensor, *_: object, **__: object) -> bool:
    return on_gpu(wide) and wide.dtype in (torch.bfloat16, torch.float16) and wide.dtype == thin.dtype


@with_kernel(_half_on_gpu, "ops.low_rank_kernels")
def down_project(
    wide: Tensor,
    thin: Tensor,
    tail: Tensor | None = None,
    keep: bool = True,
    copy: Tensor | None = None,
    drops: AdapterDropout | None = None,
) -> Tensor:
    """wide @ thin, (N, K) (K, R) -> (N, R), any strides.

    Args:
        tail: (N, at least R), filled with the result as well and with zeros behind it, such as the room behind x.
        keep: if False `tail` itself may be returned, else the result has memory of its own.
        copy: (N, K), filled with `wide`, which has to be read anyhow.
        drops: what each adapter does not see of `wide`.
    """
    if drops is None:
        product = wide @ thin
    else:
        parts = [drops.of(wide, member) @ thin[:, ranks] for member, ranks in enumerate(drops.ranks)]
        product = torch.cat(parts, 1)
    if copy is not None:
        copy.copy_(wide)
    if tail is None:
        return product
    ranks = thin.shape[1]
    tail[:, :ranks] = product
    tail[:, ranks:] = 0
    return product if keep else tail[:, :ranks]


@with_kernel(_half_on_gpu, "ops.low_rank_kernels")
def up_project(inner: Tensor, thin: Tensor, drops: AdapterDropout) -> Tensor:
    """The gradient of x through its dropouts: (N, R) (R, K) -> (N, K), of each adapter by itself, summed."""
    total = torch.zeros(inner.shape[0], thin.shape[1], dtype=inner.dtype, device=inner.device)
    for member, ranks in enumerate(drops.ranks):
        total += drops.of(inner[:, ranks] @ thin[ranks], member)
    return total


@dataclass(frozen=True)
class AdapterSlices:
    """Where the adapters of one projection lie: member i has the rows `rows[i]` of dy and the ranks `ranks[i]`."""

    rows: Sequence[slice]
    ranks: Sequence[slice]
    scalings: Sequence[float]
    """Factors of dB; 1 for dA."""


def _halves_on_gpu(x: Tensor, d_inner: Tensor, dy: Tensor, inner: Tensor, *_: object) -> bool:
    return _half_on_gpu(x, d_inner) and _half_on_gpu(dy, inner) and x.dtype == dy.dtype


@with_kernel(_halves_on_gpu, "ops.low_rank_kernels")
def gradients(
    x: Tensor, d_inner: Tensor, dy: Tensor, inner: Tensor, members: AdapterSlices, drops: AdapterDropout | None = None
) -> list[Tensor]:
    """dA (r, d_in) and dB (d_out, r) of the first member, then of the next; summed and returned in float32.

    Args:
        x: (N, d_in), and d_inner: (N, R), the gradient of x Aᵀ.
        dy: (N, D), and inner: (N, at least R), x Aᵀ itself.
        drops: what each adapter did not see of x.
    """
    if drops is None:
        dA = _product(d_inner.T, x)
    else:
        parts = [_product(d_inner[:, ranks].T, drops.of(x, member)) for member, ranks in enumerate(drops.ranks)]
        dA = torch.cat(parts)
    found = []
    for rows, ranks, scaling in zip(members.rows, members.ranks, members.scalings, strict=True):
        dB = _product(dy[:, rows].T, inner[:, ranks])
        found += [dA[ranks], dB if scaling == 1.0 else dB.mul_(scaling)]
    return found


class GradientOperands(NamedTuple):
    """What the gradients of one projection's adapters are made of: the arguments of `gradients`."""

    x: Tensor
    d_inner: Tensor
    dy: Tensor
    inner: Tensor
    members: AdapterSlices
    drops: AdapterDropout | None = None


def _all_halves_on_gpu(works: Sequence[GradientOperands]) -> bool:
    return len(works) > 0 and all(_halves_on_gpu(*work[:4]) for work in works)


@with_kernel(_all_halves_on_gpu, "ops.low_rank_kernels")
def gradients_of(works: Sequence[GradientOperands]) -> list[list[Tensor]]:
    """`gradients` of several projections that have run on the same tokens."""
    return [gradients(*work) for work in works]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the masters' precision: summed and returned in float32 where the operands have less."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    product = a @ b
    return product if product.dtype == torch.float64 else product.float()
