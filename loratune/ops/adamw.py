"""Clipping and AdamW on all parameters of an optimizer at once, with a loss or gradient that is not finite skipped.

    norm = |all gradients|        g = gradient / max(1, norm / max_norm)        p, m, v <- AdamW(g)

An adapter is hundreds of small matrices, and a pass of a library over so many tensors is several launches at a
fraction of the memory's speed, with a dozen more between them for norm, clipping and the check. Plain PyTorch here,
parameter by parameter, is the reference; its twin in `ops.adamw_kernels` is three launches, whatever their number.

Source: Loshchilov and Hutter 2017, arXiv:1711.05101, in the order of operations of `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Held(NamedTuple):
    """Parameters and what AdamW keeps of each; lists of one length."""

    parameters: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]
    steps: Sequence[Tensor]
    """Updates made, () each."""


class Settings(NamedTuple):
    """Of all updates of a run."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@torch.no_grad()
def clipped_adamw(
    held: Held,
    gradients: Sequence[Tensor | None],
    rate: Tensor | float,
    settings: Settings,
    max_norm: float,
    outcome: Tensor,
) -> None:
    """Clips by global norm and updates, in place; gradients are left as they are.

    Args:
        gradients: one for each parameter; None leaves it, its moments and its count alone.
        rate: a number or a tensor of one.
        max_norm: inf for no clipping.
        outcome: (3,): the loss, which is read; the norm before clipping, and 1 if nothing was changed because loss or
            norm is not finite, else 0, which are written.
    """
    beta1, beta2, eps, weight_decay = settings
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    norm = torch.stack(norms).norm() if norms else outcome.new_zeros(())
    finite = bool(norm.isfinite() & outcome[0].isfinite())
    outcome[1], outcome[2] = norm, float(not finite)
    if not finite:
        return
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    for gradient, p, m, v, step in zip(gradients, *held, strict=True):
        if gradient is None:
            continue
        step += 1
        g = gradient / divisor
        p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = 1 - beta1 ** float(step), (1 - beta2 ** float(step)) ** 0.5
        p.sub_(rate / correction1 * m / (v.sqrt() / correction2 + eps))
