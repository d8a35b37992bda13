"""AdamW on all slots of a bank at once, each with its own settings, clipping and finite check.

    norm_s = |gradient_s|        g = gradient_s / max(1, norm_s / max_norm_s)        p, m, v <- AdamW(g)

Only slots that update now are touched. A slot whose loss or norm is not finite keeps its weights and moments. The
gradient of every slot that updates is zero afterwards. Everything that differs between slots and steps is a number in
a table, so one recorded launch serves every mixture. This file is the reference: plain PyTorch, slot by slot. On a
GPU its twin in `ops.bank.kernels` takes two passes for any number of slots.

Source: Loshchilov and Hutter 2017, arXiv:1711.05101, in the order of operations of `torch.optim.AdamW`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loratune.ops.dispatch import with_kernel


class SlotUpdate(NamedTuple):
    """One slot's row of the table, (slots, 9) float32."""

    due: float
    """1 if the slot updates now, else 0."""
    rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_norm: float
    """inf for no clipping."""
    correction1: float
    """1 - beta1 ** t in update t, counted from 1."""
    correction2: float
    """sqrt(1 - beta2 ** t)"""


IDLE = SlotUpdate(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0)
"""A slot that does not update now."""


def _on_gpu(master: Tensor, *_: object) -> bool:
    return master.is_cuda and master.dtype == torch.float32


@with_kernel(_on_gpu, "ops.bank.kernels")
@torch.no_grad()
def bank_adamw(
    master: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    starts: Tensor,
    capacity: int,
    settings: Tensor,
    losses: Tensor,
) -> Tensor:
    """Clips and updates the slots whose `due` is 1, in place.

    Args:
        master, gradient, moments: (P,) each.
        starts: (slots + 1,) int64, start of each slot's slice, and P.
        capacity: elements of the largest slice.
        settings: (slots, 9), rows of `SlotUpdate`.
        losses: (slots,) of the steps that end now.
    Returns: (slots,) norms before clipping; 0 where no update was due.
    """
    bounds = starts.tolist()
    norms = torch.zeros(len(bounds) - 1, dtype=gradient.dtype, device=gradient.device)
    for slot, row in enumerate(settings.tolist()):
        due, rate, beta1, beta2, eps, weight_decay, max_norm, correction1, correction2 = row
        if not due:
            continue
        p, g, m, v = (flat[bounds[slot] : bounds[slot + 1]] for flat in (master, gradient, *moments))
        norms[slot] = g.norm()
        if norms[slot].isfinite() and losses[slot].isfinite():
            g.div_(((norms[slot] + 1e-6) / max_norm).clamp(min=1.0))
            p.mul_(1 - rate * weight_decay)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.addcdiv_(m, v.sqrt().div_(correction2).add_(eps), value=-rate / correction1)
        g.zero_()
    return norms
