"""Gradient clipping and AdamW for all parameters of an optimizer at once. Non-finite steps are skipped.

    norm = |all gradients|        g = gradient / max(1, norm / max_norm)        p, m, v <- AdamW(g)

An adapter is hundreds of small matrices. PyTorch's fused optimizer takes several launches for them at a fraction of
the memory bandwidth, and a dozen more for the norm, the clipping and the check. The reference here goes parameter by
parameter. Its twin in `ops.adamw_kernels` is three launches for any number of parameters.

Source: Loshchilov and Hutter 2017, arXiv:1711.05101, in the order of operations of `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AdamWState(NamedTuple):
    """Parameters and their AdamW moments; lists of equal length."""

    parameters: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    steps: Sequence[Tensor]
    """Number of updates so far, shape () each."""


class AdamWSettings(NamedTuple):
    """Hyperparameters that stay the same during a run."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@torch.no_grad()
def clipped_adamw(
    state: AdamWState,
    gradients: Sequence[Tensor | None],
    rate: Tensor | float,
    settings: AdamWSettings,
    max_norm: float,
    outcome: Tensor,
) -> None:
    """Clips by the global norm and updates in place. Gradients are not changed.

    Args:
        gradients: one for each parameter. None skips the parameter, its moments and its count.
        rate: learning rate, a number or a tensor with one element.
        max_norm: inf for no clipping.
        outcome: (3,). Reads the loss from [0]. Writes the norm before clipping to [1], and to [2] 1 if the loss or
            the norm is not finite and nothing was updated, else 0.
    """
    beta1, beta2, eps, weight_decay = settings
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    norm = torch.stack(norms).norm() if norms else outcome.new_zeros(())
    finite = bool(norm.isfinite() & outcome[0].isfinite())
    outcome[1], outcome[2] = norm, float(not finite)
    if not finite:
        return
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    for gradient, p, m, v, step in zip(gradients, *state, strict=True):
        if gradient is None:
            continue
        step += 1
        g = gradient / divisor
        p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = 1 - beta1 ** float(step), (1 - beta2 ** float(step)) ** 0.5
        p.sub_(rate / correction1 * m / (v.sqrt() / correction2 + eps))
