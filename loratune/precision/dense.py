"""Floating point: frozen weights that are ordinary Parameters, and the augmented matrix of stacked ones.

    [ W  B ]    (D + pad, d_in + pad); pad is the sum of the ranks, rounded up to whole tiles of a product
    [ A  0 ]    W: the weights of projections that read the same input, one below the other

`precision.projection` explains the purpose. While the matrix is in use the Parameters are views of it with unchanged
values. Afterwards each has memory of its own again, because some code that saves models cannot handle such views.
In both directions one projection is copied at a time, so a model is never held twice. This takes milliseconds on a
GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.products import MatrixProduct, mm
from loratune.precision.contract import WeightFormat
from loratune.precision.projection import AugmentedWeight

_TILE = 64
"""Terms in one tile of a GPU's product. Rows of a multiple of it are also aligned."""


@dataclass(frozen=True)
class StackedMatrix(DenseWeight):
    """The rows of a whole stack, a view of the augmented matrix."""

    matrix: Tensor
    """(D + pad, d_in + pad)"""


@dataclass(frozen=True)
class AugmentedMatrix:
    """[W B; A 0] as one matrix; implements `precision.projection.AugmentedWeight`."""

    matrix: Tensor
    """(D + pad, d_in + pad); its unused adapter columns and rows are zero."""
    shape: tuple[int, int]
    """(D, d_in)"""

    @property
    def pad_columns(self) -> int:
        """Columns beside W."""
        return self.matrix.shape[1] - self.shape[1]

    def forward(self, x: Tensor, bias: Tensor | None, mm: MatrixProduct = mm) -> Tensor:
        """(N, d_in + pad) -> (N, D)."""
        weight = self.matrix[: self.shape[0]]
        return mm(x, weight.T) if bias is None else linear(x, weight, bias)

    def d_input(self, dy: Tensor, mm: MatrixProduct = mm) -> Tensor:
        """(N, D + pad) -> (N, d_in)."""
        return mm(dy, self.matrix[:, : self.shape[1]])


class DenseFormat(WeightFormat):
    """float32, bfloat16 and float16."""

    name = "dense"
    label = "floating point"

    def quantise(self, weight: Tensor) -> FrozenWeight:
        """The matrix itself."""
        return DenseWeight(weight)

    def bytes_held(self, shape: Sequence[int], itemsize: int) -> float:
        """Bytes of the matrix."""
        count = itemsize
        for size in shape:
            count *= size
        return count

    def can_stack(self, weight: FrozenWeight) -> bool:
        """False here: only Parameters are stacked, by `stack_parameters`."""
        return False

    def working_copies(self, weight: FrozenWeight, ranks: int) -> tuple[Tensor, Tensor]:
        """Views of the augmented matrix, beside W and below it."""
        (d_out, d_in), matrix = weight.shape, cast(StackedMatrix, weight).matrix
        return matrix[d_out : d_out + ranks, :d_in], matrix[:d_out, d_in : d_in + ranks]

    def augment(self, weight: FrozenWeight, lora_A: Tensor, lora_B: Tensor) -> AugmentedWeight | None:
        """The augmented matrix, of which the weight and both working copies are views."""
        return AugmentedMatrix(cast(StackedMatrix, weight).matrix, weight.shape)


@dataclass(frozen=True)
class FrozenParameter:
    """A Parameter that holds W, or its transpose as in transformers' Conv1D."""

    parameter: nn.Parameter
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in)"""
        values = self.parameter.detach()
        return values.T if self.transposed else values

    def point_to(self, weight: Tensor) -> None:
        """Makes the Parameter a view of `weight`, (d_out, d_in)."""
        self.parameter.data = weight.T if self.transposed else weight


def stack_parameters(members: Sequence[FrozenParameter], ranks: int) -> StackedMatrix:
    """The augmented matrix with columns for `ranks`, all zero. Afterwards the Parameters are views of it.

    Args:
        members: floating point, of one dtype and device.
    """
    pad = -(-ranks // _TILE) * _TILE
    weights = [member.weight for member in members]
    d_out, d_in = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    matrix = weights[0].new_zeros(d_out + pad, d_in + pad)
    row = 0
    for member, weight in zip(members, weights, strict=True):
        part = matrix[row : row + weight.shape[0], :d_in]
        part.copy_(weight)
        member.point_to(part)
        row += weight.shape[0]
    return StackedMatrix(matrix[:d_out, :d_in], matrix)


def separate(parameters: Iterable[nn.Parameter]) -> None:
    """Gives each Parameter memory of its own."""
    for parameter in parameters:
        parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
