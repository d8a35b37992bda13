"""The shape of an autograd node's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def own_shape(out: Tensor, shape: Sequence[int]) -> Tensor:
    """`out` in another shape, without a copy, and not a view to autograd.

    A caller may change the output of any module in place, but autograd refuses this for a view that was made inside
    a custom function. The other name of the memory must not be used any more.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(out, shape)
    return shaped
