"""The best product B A of a given rank for a matrix, and its error.

By Eckart and Young (1936) the singular value decomposition cut at rank r is the nearest matrix of that rank in the
Frobenius norm, and its error is the root of the sum of the squared singular values that were cut. So one
decomposition gives the error of every rank, without forming a single difference.

There are three methods, by the form of the input:

- A low-rank product: two QR decompositions and the SVD of the small core. The full matrix is never formed.
- A matrix whose smaller side is at most `EXACT_SIDE`: the eigenvectors of its Gram matrix in float64, several times
  cheaper than an SVD. Squaring costs half the digits, which leaves 1e-8 of the largest singular value: less than the
  rounding of any checkpoint.
- A larger matrix: a randomised range finder with power iterations. Its basis is not quite the best one, but the error
  is measured on the matrix itself and therefore true for the resulting factors.

The singular values are split evenly between A and B, so that both have the same norm and neither overflows a narrow
format.

Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1, arXiv:0909.4061.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIDE = 2048
"""Longest smaller side of a matrix that is decomposed exactly."""

_OVERSAMPLING = 10
_POWER_ITERATIONS = 4


@dataclass(frozen=True, slots=True)
class LowRank:
    """A matrix M (d_out, d_in) as left · diag(singular_values) · right, plus a remainder."""

    left: Tensor
    """(d_out, k), float64 or float32, orthonormal columns."""
    singular_values: Tensor
    """(k,), float64, descending."""
    right: Tensor
    """(k, d_in), orthonormal rows."""
    rest: float
    """Frobenius norm of M minus the product; 0 if the product is all of M."""
    exact: bool = True
    """False if the range was found at random; another product of the same rank may then be slightly nearer."""

    @property
    def norm(self) -> float:
        """Frobenius norm of M."""
        return self.error(0)

    @property
    def significant(self) -> int:
        """Number of singular values above the rounding of float64."""
        values = self.singular_values
        return int((values > 1e-14 * values.max()).sum()) if len(values) else 0

    def error(self, rank: int) -> float:
        """Frobenius norm of M minus the product of the first `rank` singular triples."""
        return math.hypot(float(self.singular_values[rank:].norm()), self.rest)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank) in float32, padded with zeros if M has fewer singular values."""
        root = self.singular_values[:rank].sqrt().to(self.left.dtype)
        lora_A = (root[:, None] * self.right[:rank]).float()
        lora_B = (self.left[:, :rank] * root).float()
        return padded(lora_A, lora_B, rank)


def padded(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pads A with rows and B with columns of zeros up to `rank`; their product stays the same."""
    more = rank - lora_A.shape[0]
    if more <= 0:
        return lora_A, lora_B
    zeros_A, zeros_B = lora_A.new_zeros(more, lora_A.shape[1]), lora_B.new_zeros(lora_B.shape[0], more)
    return torch.cat([lora_A, zeros_A]), torch.cat([lora_B, zeros_B], dim=1)


@torch.no_grad()
def decompose_product(lora_A: Tensor, lora_B: Tensor) -> LowRank:
    """All singular triples of B A, exactly, from A (r, d_in) and B (d_out, r).

    Memory: a few tensors of the size of A and B in float64, never (d_out, d_in).
    """
    outer, core_B = torch.linalg.qr(lora_B.double())
    inner, core_A = torch.linalg.qr(lora_A.double().T)
    left, values, right = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    return LowRank(outer @ left, values, right @ inner.T, 0.0)


@torch.no_grad()
def decompose(matrix: Tensor, count: int) -> LowRank:
    """The largest singular triples of `matrix` (d_out, d_in): all of them if that is cheap, else at least `count`."""
    if min(matrix.shape) <= EXACT_SIDE:
        return _by_gram(matrix.double())
    return _by_sketch(matrix.float(), min(count, *matrix.shape))


def _by_gram(matrix: Tensor) -> LowRank:
    """Every singular triple, from the eigenvectors of M Mᵀ or Mᵀ M, whichever is smaller."""
    if matrix.shape[0] > matrix.shape[1]:
        transposed = _by_gram(matrix.T)
        return LowRank(transposed.right.T, transposed.singular_values, transposed.left.T, 0.0)
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors.flip(1)
    projected = left.T @ matrix
    values = projected.norm(dim=1)  # of the projection: exact for the factors, however small
    return LowRank(left, values, projected / values.clamp(min=torch.finfo(values.dtype).tiny)[:, None], 0.0)


def _by_sketch(matrix: Tensor, count: int) -> LowRank:
    """`count` triples by a randomised range finder with power iterations."""
    generator = torch.Generator().manual_seed(0)
    width = min(count + _OVERSAMPLING, *matrix.shape)
    basis = matrix @ torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    for _ in range(_POWER_ITERATIONS):
        basis, _ = torch.linalg.qr(basis)
        inner, _ = torch.linalg.qr(matrix.T @ basis)
        basis = matrix @ inner
    basis, _ = torch.linalg.qr(basis)
    projected = basis.T @ matrix
    left, values, right = torch.linalg.svd(projected, full_matrices=False)
    rest = float(torch.linalg.vector_norm(matrix - basis @ projected, dtype=torch.float64))
    return LowRank(basis @ left, values.double(), right, rest, exact=False)
