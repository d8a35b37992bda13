"""Frozen weights side by side in one matrix, with a border for the adapters' working copies.

    [ W  B ]    (D + room, d_in + room); room is the sum of the ranks, padded with zeros to whole tiles of a product
    [ A  0 ]    W: the weights of projections that read the same input, one below the other

`precision.projection` says what the border is for. While it is in use the Parameters are views of the matrix, with
the
values that they had; afterwards each has memory of its own again, since not all code that saves a model can do with
rows that lie apart. Both ways one projection at a time, so a model is never held twice; on a GPU it takes
milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_TILE = 64
"""Terms of a sum that the products of GPUs take at once; the room is a multiple of it, and so rows stay aligned."""


def bordered(weights: Sequence[nn.Parameter], ranks: int) -> Tensor:
    """The matrix with room for `ranks` and a border of zeros; afterwards the Parameters are views of it.

    Args:
        weights: (d_out of each, d_in), floating point, one dtype and device.
    """
    room = -(-ranks // _TILE) * _TILE
    d_out, d_in = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    matrix = weights[0].detach().new_zeros(d_out + room, d_in + room)
    row = 0
    for weight in weights:
        part = matrix[row : row + weight.shape[0], :d_in]
        part.copy_(weight.detach())
        weight.data = part
        row += weight.shape[0]
    return matrix


def separate(weights: Iterable[nn.Parameter]) -> None:
    """Gives each Parameter memory of its own."""
    for weight in weights:
        weight.data = weight.detach().clone(memory_format=torch.contiguous_format)
