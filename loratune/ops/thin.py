"""Products with one thin operand, the ranks of an adapter: cheap in arithmetic, bound by reading the wide operand.

    narrow      (N, K) (K, R) -> (N, R)       x Aᵀ, and dy B
    gradients   dA = (dy B)ᵀ x  and  dB = dyᵀ (x Aᵀ)  of all adapters of a projection

Libraries cut the long sum of such a product into pieces to fill a GPU, with a launch to clear memory before and one
to add the pieces behind, and at 512 tokens that costs more than the product. On a GPU in half precision the twins in
`ops.thin_kernels` run: one launch each, where the block that comes last adds up the pieces, in their order, so that
the result does not depend on which block that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.ops.layer import with_kernel


def _half_on_gpu(wide: Tensor, thin: Tensor, *_: object, **__: object) -> bool:
    return wide.is_cuda and wide.dtype in (torch.bfloat16, torch.float16) and wide.dtype == thin.dtype


@with_kernel(_half_on_gpu, "thin_kernels")
def narrow(
    wide: Tensor, thin: Tensor, tail: Tensor | None = None, keep: bool = True, copy: Tensor | None = None
) -> Tensor:
    """wide @ thin, (N, K) (K, R) -> (N, R), any strides.

    Args:
        tail: (N, at least R), filled with the result as well and with zeros behind it, such as the room behind x.
        keep: if False `tail` itself may be returned, else the result has memory of its own.
        copy: (N, K), filled with `wide`, which has to be read anyhow.
    """
    product = wide @ thin
    if copy is not None:
        copy.copy_(wide)
    if tail is None:
        return product
    ranks = thin.shape[1]
    tail[:, :ranks] = product
    tail[:, ranks:] = 0
    return product if keep else tail[:, :ranks]


@dataclass(frozen=True)
class Members:
    """Where the adapters of one projection lie: member i has the rows `rows[i]` of dy and the ranks `ranks[i]`."""

    rows: Sequence[slice]
    ranks: Sequence[slice]
    scalings: Sequence[float]
    """Factors of dB; 1 for dA."""


def _halves_on_gpu(x: Tensor, d_inner: Tensor, dy: Tensor, inner: Tensor, _: Members) -> bool:
    return _half_on_gpu(x, d_inner) and _half_on_gpu(dy, inner) and x.dtype == dy.dtype


@with_kernel(_halves_on_gpu, "thin_kernels")
def gradients(x: Tensor, d_inner: Tensor, dy: Tensor, inner: Tensor, members: Members) -> list[Tensor]:
    """dA (r, d_in) and dB (d_out, r) of the first member, then of the next; summed and returned in float32.

    Args:
        x: (N, d_in), and d_inner: (N, R), the gradient of x Aᵀ.
        dy: (N, D), and inner: (N, at least R), x Aᵀ itself.
    """
    dA = _product(d_inner.T, x)
    found = []
    for rows, ranks, scaling in zip(members.rows, members.ranks, members.scalings, strict=True):
        dB = _product(dy[:, rows].T, inner[:, ranks])
        found += [dA[ranks], dB if scaling == 1.0 else dB.mul_(scaling)]
    return found


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the masters' precision: summed and returned in float32 where the operands have less."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    product = a @ b
    return product if product.dtype == torch.float64 else product.float()
