"""The shape of an autograd node's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def own_shape(out: Tensor, shape: Sequence[int]) -> Tensor:
    """Gives `out` another shape without a copy; autograd does not see the result as a view.

    A caller may change the output of any module in place, but autograd refuses this for a view that was made inside
    a custom function. `out` must not be used afterwards.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(out, shape)
    return shaped
