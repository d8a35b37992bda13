"""One optimizer step: packed rows in, one update of the adapter out.

Every micro-step sees one row of the same number of tokens, so its memory does not depend on the data. The loss is
the objective summed over the trained tokens of *all* rows of the step, divided by their summed weight: k micro-steps
of one row equal one step of k rows to rounding, however unevenly the trained tokens fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.data.pack import Row
from loratune.ops.dropout import row_key
from loratune.training.objectives.sft import Objective, sft


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean over the trained tokens of the step; natural logarithm."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    trained_tokens: int
    skipped: bool
    """True if loss or gradient was not finite; the adapter is then unchanged."""


def train_step(
    forward: PackedForward,
    rows: Sequence[Row],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    objective: Objective = sft,
    key: int | None = None,
) -> StepResult:
    """Accumulates the gradients of `rows`, clips them by global norm, and updates `parameters`.

    Must run inside `forward.installed()`. A non-finite loss or gradient leaves parameters and optimizer untouched.

    Args:
        rows: the micro-steps; together they are the batch of this step.
        max_grad_norm: 0 turns clipping off.
        key: of the step's dropout, `ops.dropout.dropout_key`; None leaves dropout to torch's generator.
    """
    normaliser = sum(float(row.weights.sum()) for row in rows)
    total, position = 0.0, 0
    for row in rows:
        with forward.state.dropout(None if key is None else row_key(key, position, forward.model.device)):
            loss = row_loss(forward, row, objective) / normaliser
            loss.backward()
        total += float(loss.detach())
        position += len(row.tokens)
    grad_norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    finite = math.isfinite(total) and math.isfinite(grad_norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, grad_norm, sum(int((row.weights != 0).sum()) for row in rows), not finite)


@torch.no_grad()
def evaluate_loss(forward: PackedForward, rows: Iterable[Row]) -> tuple[float, int]:
    """Mean negative log-likelihood over the trained tokens of `rows`, and how many there were.

    Must run inside `forward.installed()`.
    """
    total, weight, tokens = 0.0, 0.0, 0
    for row in rows:
        total += float(row_loss(forward, row))
        weight += float(row.weights.sum())
        tokens += int((row.weights != 0).sum())
    return (total / weight if weight else math.nan), tokens


def row_loss(forward: PackedForward, row: Row, objective: Objective = sft) -> Tensor:
    """The objective summed over one row, a scalar."""
    device = forward.model.device
    predicting = row.weights.nonzero().squeeze(1)
    targets, weights = row.targets[predicting], row.weights[predicting]
    logprobs = forward.logprobs(
        row.tokens.to(device),
        row.position_ids.to(device),
        row.cu_seqlens,
        predicting.to(device),
        targets.to(device),
    )
    return objective(logprobs, weights.to(device))
