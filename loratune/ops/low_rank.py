"""Low-rank products: matrix products with one operand as narrow as the rank of an adapter.

    down_project   (N, K) (K, R) -> (N, R)       x Aᵀ in the forward, dy B in the backward
    up_project     (N, R) (R, K) -> (N, K)       (dy B) A; a product of its own only if dropout lies in between
    gradients      dA = (dy B)ᵀ x  and  dB = dyᵀ (x Aᵀ)  of all adapters of a projection

They do little arithmetic and are bound by reading the wide operand. Libraries split the long reduction of such a
product to fill a GPU, with one launch before it to clear memory and one after it to add the parts. At 512 tokens
these launches cost more than the product. So on a GPU in half precision the twins in `ops.low_rank_kernels` run. Each
is one launch, in which the last thread block adds the parts in their order, so the bits do not depend on the
scheduling. The gradients of several projections can share a launch.

With dropout, every adapter of a projection has a mask of its own (`AdapterDropout`), as in PEFT. The kernels mask
numbers while they are read or before they are written, so neither the masked x nor a mask is stored.

Source of dropout on the adapter's input: Hu et al. 2021, arXiv:2106.09685, and PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loratune.ops.buffers import KernelBuffers
from loratune.ops.dispatch import on_gpu, with_kernel
from loratune.ops.dropout import keep_mask


@dataclass(frozen=True)
class AdapterDropout:
    """Dropout of the input of each adapter of one projection."""

    row: Tensor
    """`ops.dropout.row_key` of the current row."""
    probability: float
    salts: Sequence[int]
    """`ops.dropout.layer_salt` of each adapter."""
    ranks: Sequence[slice]
    """Columns of each adapter in x Aᵀ, in order and without gaps."""
    first: int = 0
    """Number in the row of the first token of the operands."""

    @property
    def scale(self) -> float:
        """Factor of kept elements, 1 / (1 - probability)."""
        return 1 / (1 - self.probability)

    def of(self, x: Tensor, member: int) -> Tensor:
        """x or its gradient, (N, K), after the dropout of one adapter."""
        shape = x.shape[0], x.shape[1]
        return (x * keep_mask(self.row, self.salts[member], shape, self.probability, self.first)).mul_(self.scale)


def _half_on_gpu(wide: Tensor, factor: Tensor, *_: object, **__: object) -> bool:
    return on_gpu(wide) and wide.dtype in (torch.bfloat16, torch.float16) and wide.dtype == factor.dtype


@with_kernel(_half_on_gpu, "ops.low_rank_kernels")
def down_project(
    wide: Tensor,
    factor: Tensor,
    tail: Tensor | None = None,
    keep: bool = True,
    copy: Tensor | None = None,
    drops: AdapterDropout | None = None,
    buffers: KernelBuffers | None = None,
) -> Tensor:
    """wide @ factor, (N, K) (K, R) -> (N, R), any strides.

    Args:
        tail: (N, at least R), usually the padding columns of `wide`; filled with the result, then with zeros.
        keep: True returns memory of its own; False may return columns of `tail`.
        copy: (N, K), filled with `wide` in the same pass.
        drops: dropout of `wide` for each adapter; `factor` holds the adapters' ranks side by side.
        buffers: buffers of the current forward (`ops.state`); None makes new ones, which costs a GPU one more launch.
    """
    if drops is None:
        product = wide @ factor
    else:
        parts = [drops.of(wide, member) @ factor[:, ranks] for member, ranks in enumerate(drops.ranks)]
        product = torch.cat(parts, 1)
    if copy is not None:
        copy.copy_(wide)
    if tail is None:
        return product
    ranks = factor.shape[1]
    tail[:, :ranks] = product
    tail[:, ranks:] = 0
    return product if keep else tail[:, :ranks]


@with_kernel(_half_on_gpu, "ops.low_rank_kernels")
def up_project(
    low_rank: Tensor, factor: Tensor, drops: AdapterDropout, buffers: KernelBuffers | None = None
) -> Tensor:
    """Gradient of x through the adapters and their dropout: (N, R) (R, K) -> (N, K), summed over the adapters.

    Args:
        buffers: as for `down_project`.
    """
    total = torch.zeros(low_rank.shape[0], factor.shape[1], dtype=low_rank.dtype, device=low_rank.device)
    for member, ranks in enumerate(drops.ranks):
        total += drops.of(low_rank[:, ranks] @ factor[ranks], member)
    return total


@dataclass(frozen=True)
class AdapterSlices:
    """Layout of the adapters of one projection: adapter i has columns `rows[i]` of dy and ranks `ranks[i]`."""

    rows: Sequence[slice]
    ranks: Sequence[slice]
    scalings: Sequence[float]
    """Factor of each dB; dA has none."""


def _halves_on_gpu(x: Tensor, d_low_rank: Tensor, dy: Tensor, low_rank: Tensor, *_: object, **__: object) -> bool:
    return _half_on_gpu(x, d_low_rank) and _half_on_gpu(dy, low_rank) and x.dtype == dy.dtype


@with_kernel(_halves_on_gpu, "ops.low_rank_gradient_kernels")
def gradients(
    x: Tensor,
    d_low_rank: Tensor,
    dy: Tensor,
    low_rank: Tensor,
    members: AdapterSlices,
    drops: AdapterDropout | None = None,
    buffers: KernelBuffers | None = None,
) -> list[Tensor]:
    """dA (r, d_in) and dB (d_out, r) of the first adapter, then of the next; summed and returned in float32.

    Args:
        x, dy: (N, d_in) and (N, D), input and output gradient of the projection.
        d_low_rank, low_rank: (N, R) and (N, at least R), the gradient of x Aᵀ, and x Aᵀ.
        members: layout of the adapters.
        drops: dropout of x for each adapter in the forward.
        buffers: as for `down_project`.
    """
    if drops is None:
        dA = _product(d_low_rank.T, x)
    else:
        parts = [_product(d_low_rank[:, ranks].T, drops.of(x, member)) for member, ranks in enumerate(drops.ranks)]
        dA = torch.cat(parts)
    found = []
    for rows, ranks, scaling in zip(members.rows, members.ranks, members.scalings, strict=True):
        dB = _product(dy[:, rows].T, low_rank[:, ranks])
        found += [dA[ranks], dB if scaling == 1.0 else dB.mul_(scaling)]
    return found


class GradientOperands(NamedTuple):
    """Arguments of `gradients` for one projection, to be computed together with other projections."""

    x: Tensor
    d_low_rank: Tensor
    dy: Tensor
    low_rank: Tensor
    members: AdapterSlices
    drops: AdapterDropout | None = None
    buffers: KernelBuffers | None = None


def _all_halves_on_gpu(projections: Sequence[GradientOperands]) -> bool:
    return len(projections) > 0 and all(_halves_on_gpu(*operands[:4]) for operands in projections)


@with_kernel(_all_halves_on_gpu, "ops.low_rank_gradient_kernels")
def gradients_of(projections: Sequence[GradientOperands]) -> list[list[Tensor]]:
    """`gradients` of several projections that ran on the same tokens."""
    return [gradients(*operands) for operands in projections]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed and returned in float32 if the operands have less precision."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    product = a @ b
    return product if product.dtype == torch.float64 else product.float()
