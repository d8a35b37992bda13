# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twin of the softmax in `ops.logprobs`, for bfloat16 and float16 on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _logprobs_of(
    logits_ptr,
    targets_ptr,
    logprobs_ptr,
    scale,
    softcap,
    vocabulary: tl.constexpr,
    CAP: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    """log p(target) of a row of logits, and its gradient in place of the logits.

    One program takes a row. A first loop finds the normaliser with a running maximum, a second writes the gradient.
    Each of LANES lanes keeps its own maximum for EACH neighbouring logits and rescales its sum once for all of them,
    because exponentials are as much of a bound here as memory. Moves 6 bytes for each logit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocabulary
    target = tl.load(targets_ptr + row)
    chosen = tl.load(logits_ptr + target).to(tl.float32) * scale  # before the gradient overwrites it
    if CAP:
        chosen = softcap * (2 * tl.sigmoid(2 * chosen / softcap) - 1)
    column = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None]
    most, total = tl.full((LANES,), float("-inf"), tl.float32), tl.zeros((LANES,), tl.float32)
    for start in range(0, vocabulary, LANES * EACH):
        z = tl.load(logits_ptr + start + column, mask=start + column < vocabulary, other=float("-inf")).to(tl.float32)
        z = z * scale
        if CAP:
            z = tl.where(start + column < vocabulary, softcap * (2 * tl.sigmoid(2 * z / softcap) - 1), float("-inf"))
        higher = tl.maximum(most, tl.max(z, 1))
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - reference) + tl.sum(tl.exp(z - reference[:, None]), 1)
        most = higher
    top = tl.max(most)
    normaliser = top + tl.log(tl.sum(total * tl.exp(most - top)))
    tl.store(logprobs_ptr + row, chosen - normaliser)
    for start in range(0, vocabulary, LANES * EACH):
        inside = start + column < vocabulary
        z = tl.load(logits_ptr + start + column, mask=inside, other=0.0).to(tl.float32) * scale
        slope = scale
        if CAP:
            z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
            slope = scale * (1 - (z / softcap) * (z / softcap))
        gradient = (tl.where(start + column == target, 1.0, 0.0) - tl.exp(z - normaliser)) * slope
        tl.store(logits_ptr + start + column, gradient, mask=inside)


def logprobs_of(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """As `ops.logprobs.logprobs_of`; the gradient overwrites the logits."""
    logprobs = torch.empty(logits.shape[0], device=logits.device)
    lanes = min(4096, max(32, triton.next_power_of_2(logits.shape[1]) // 8))
    _logprobs_of[(logits.shape[0],)](
        logits, targets, logprobs, scale, softcap or 1.0, logits.shape[1], CAP=softcap is not None,
        LANES=lanes, EACH=8, num_warps=max(1, lanes // 128),
    )  # fmt: skip
    return logprobs, logits
