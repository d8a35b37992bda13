"""One optimizer step: packed rows in, one update of the adapter out.

This module defines the step once. Eager training (`train_step`), CUDA graphs (`training.graph`) and several adapters
in one row (`many.step`, `many.graph`) call the same parts:

    DeviceRow       one row on the device, eager or in the buffers of a recording
    accumulate      forward, objective and backward of one row; returns the normalised loss
    finish_step     finite check, clipping by global norm, update
    StepResult      numbers of the finished step

Every row of a run has the same number of tokens, so memory does not depend on the data. The loss is the sum of the
objective's terms over *all* rows of the step, divided by the summed normaliser. So k micro-steps of one row equal one
step of k rows up to rounding, even if the trained tokens are spread unevenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.data.pack import Row
from loratune.ops.dropout import row_key
from loratune.training.objectives.objective import Objective, Terms, TokenBatch
from loratune.training.objectives.sft import sft


@runtime_checkable
class StepOptimizer(Protocol):
    """The update that ends a step."""

    def clipped_step(self, max_norm: float, outcome: Tensor) -> None:
        """Clips the gradients by global norm and updates; if loss or norm is not finite, changes nothing.

        Args:
            max_norm: inf for no clipping.
            outcome: (3,), see `new_outcome`; the loss is read, the other two are written.
        """


class ClippedOptimizer(torch.optim.Optimizer):
    """Base of the package's optimizers. Subclasses may replace any method by a faster one."""

    grad_scale: Tensor
    found_inf: Tensor
    """Both are set during `clipped_step` on a GPU. `step` divides gradients by `grad_scale`, and skips if
    `found_inf`."""

    def clipped_step(self, max_norm: float, outcome: Tensor) -> None:
        """See `StepOptimizer`. On a GPU nothing waits for the device, so that a CUDA graph can record it."""
        if not outcome.is_cuda:
            clip_and_step(self, max_norm, outcome)
            return
        norm = nn.utils.get_total_norm(_gradients(self))
        skipped = (~(norm.isfinite() & outcome[0].isfinite())).float()
        # `step` divides the gradients by `grad_scale` in its own pass, so that clipping costs no pass.
        self.grad_scale, self.found_inf = ((norm + 1e-6) / max_norm).clamp(min=1.0).float(), skipped
        try:
            self.step()
        finally:
            del self.grad_scale, self.found_inf
        outcome[1], outcome[2] = norm, skipped

    def move_moments_to_host(self) -> None:
        """Moves the moments to host memory that the GPU can address. Does nothing unless a subclass overrides it."""


@dataclass(frozen=True)
class HostClipped:
    """Any optimizer of PyTorch as a `StepOptimizer`. It waits for the device, so no CUDA graph can record it."""

    optimizer: torch.optim.Optimizer

    def clipped_step(self, max_norm: float, outcome: Tensor) -> None:
        """See `StepOptimizer`."""
        clip_and_step(self.optimizer, max_norm, outcome)


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float, outcome: Tensor) -> None:
    """The reference of `StepOptimizer.clipped_step`: the host reads loss and norm, then decides."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    finite = math.isfinite(outcome[0]) and math.isfinite(norm)
    outcome[1], outcome[2] = norm, float(not finite)
    if finite:
        optimizer.step()


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Numbers of one optimizer step."""

    loss: float
    """Sum of the objective's terms, divided by the normaliser. For SFT the mean over trained tokens, in nats."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    trained_tokens: int
    skipped: bool
    """True if loss or gradient was not finite; the adapter is then unchanged."""

    @classmethod
    def read(cls, outcome: Tensor, trained_tokens: int) -> Self:
        """Waits for the device and reads the outcome of a step."""
        loss, grad_norm, skipped = outcome.tolist()
        return cls(loss, grad_norm, trained_tokens, bool(skipped))


def new_outcome(device: torch.device) -> Tensor:
    """(3,) zeros on the device: the step's loss, the norm before clipping, and 1 if the update was skipped.

    Float32 on a GPU, for the kernels. Float64 on a CPU, so that the losses of many rows add without rounding.
    """
    return torch.zeros(3, dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One packed row of T tokens on the model's device, of which N positions are scored."""

    tokens: Tensor
    position_ids: Tensor
    """(T,) int64, like `tokens`."""
    cu_seqlens: Tensor
    """(documents + 1,) int32: on the CPU if `longest` is None, else on the device."""
    predicting: Tensor | None
    """(N,) int64 positions to score; None for all in order."""
    targets: Tensor
    """(N,) int64"""
    batch: TokenBatch
    longest: int | None = None
    """Upper bound of the documents' lengths, in a recording."""

    @classmethod
    def send(cls, row: Row, device: torch.device, columns: Sequence[str] = ()) -> Self:
        """Copies a row to the device; the positions with a weight are scored."""
        at = row.weights.nonzero().squeeze(1)
        document = documents_of(row)[at]
        extra = {name: row.columns[name][at].to(device) for name in columns}
        batch = TokenBatch(row.weights[at].to(device), document.to(device), len(row.cu_seqlens) - 1, extra)
        tokens, position_ids = row.tokens.to(device), row.position_ids.to(device)
        return cls(tokens, position_ids, row.cu_seqlens, at.to(device), row.targets[at].to(device), batch)

    def logprobs(self, forward: PackedForward) -> Tensor:
        """(N,) float32: log p(target) at the scored positions."""
        return forward.logprobs(
            self.tokens, self.position_ids, self.cu_seqlens, self.predicting, self.targets, longest=self.longest
        )


def documents_of(row: Row) -> Tensor:
    """(T,) int32: the number of each token's document."""
    lengths = row.cu_seqlens.diff()
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)


def accumulate(
    forward: PackedForward, row: DeviceRow, objective: Objective, losses_of: Callable[[Terms], Tensor]
) -> Tensor:
    """Runs one row forward and backward, which adds to the gradients.

    Args:
        losses_of: sums the terms and divides by the normaliser: a scalar, or one loss for each job of a shared row.
            Each loss gets gradient 1, so a job's gradient does not depend on the other jobs.
    Returns: the losses, detached.
    """
    losses = losses_of(objective.terms(row.logprobs(forward), row.batch))
    losses.backward(torch.ones_like(losses))
    return losses.detach()


def finish_step(optimizer: StepOptimizer, max_grad_norm: float, outcome: Tensor) -> None:
    """Ends a step whose rows have all been accumulated: finite check, clipping and update.

    This is the only place between accumulation and update. Training on several ranks sums loss and gradients here.

    Args:
        max_grad_norm: 0 turns clipping off.
        outcome: the step's loss is read, norm and skip are written.
    """
    optimizer.clipped_step(max_grad_norm or math.inf, outcome)


def train_step(
    forward: PackedForward,
    rows: Sequence[Row],
    parameters: Sequence[nn.Parameter],
    optimizer: StepOptimizer | torch.optim.Optimizer,
    *,
    max_grad_norm: float,
    objective: Objective = sft,
    key: int | None = None,
) -> StepResult:
    """Accumulates the gradients of `rows` and updates `parameters`.

    Must run inside `forward.installed()`. A non-finite loss or gradient leaves parameters and optimizer unchanged.

    Args:
        rows: the micro-steps of this step.
        parameters: the parameters of `optimizer`; their gradients are None afterwards.
        optimizer: an optimizer of `training.optim` or of PyTorch.
        max_grad_norm: 0 turns clipping off.
        key: dropout key of the step, from `ops.dropout.dropout_key`; None draws from torch's generator.
    """
    device = forward.model.device
    normaliser = sum(map(objective.normaliser, rows))
    outcome, position = new_outcome(device), 0
    for row in rows:
        on_device = DeviceRow.send(row, device, objective.columns)
        with forward.state.dropout(None if key is None else row_key(key, position, device)):
            outcome[0] += accumulate(forward, on_device, objective, lambda terms: total_of(terms) / normaliser)
        position += len(row.tokens)
    optimizer = optimizer if isinstance(optimizer, StepOptimizer) else HostClipped(optimizer)
    finish_step(optimizer, max_grad_norm, outcome)
    for parameter in parameters:
        parameter.grad = None
    return StepResult.read(outcome, sum(map(trained_tokens, rows)))


def trained_tokens(row: Row) -> int:
    """Number of the row's tokens that have a weight."""
    return int((row.weights != 0).sum())


def row_loss(forward: PackedForward, row: Row, objective: Objective = sft) -> Tensor:
    """Sum of the objective's terms over one row, not divided by a normaliser: a scalar with a gradient."""
    on_device = DeviceRow.send(row, forward.model.device, objective.columns)
    return total_of(objective.terms(on_device.logprobs(forward), on_device.batch))


def total_of(terms: Terms) -> Tensor:
    """The sum of all terms, a scalar."""
    return terms.values.sum()


class ObjectiveSums(NamedTuple):
    """Sums of a row's loss and metrics, not divided by a normaliser."""

    loss: float
    metrics: dict[str, float]


@torch.no_grad()
def objective_sums(
    forward: PackedForward, row: Row, objective: Objective, total: Callable[[Terms], Tensor] = total_of
) -> ObjectiveSums:
    """Measures one row without gradients; `total` sums terms to a scalar."""
    on_device = DeviceRow.send(row, forward.model.device, objective.columns)
    logprobs = on_device.logprobs(forward)
    loss = float(total(objective.terms(logprobs, on_device.batch)))
    metrics = objective.metrics(logprobs, on_device.batch)
    return ObjectiveSums(loss, {name: float(total(terms)) for name, terms in metrics.items()})


class HeldOut(NamedTuple):
    """Loss and metrics over held-out rows."""

    loss: float
    """NaN if the summed normaliser of the rows is 0."""
    trained_tokens: int
    metrics: dict[str, float]


@dataclass(slots=True)
class HeldOutSums:
    """Running sums over held-out rows."""

    objective: Objective
    loss: float = 0.0
    normaliser: float = 0.0
    trained_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, rows: Iterable[Row], sums: ObjectiveSums) -> None:
        """Adds the sums of some rows."""
        for row in rows:
            self.normaliser += self.objective.normaliser(row)
            self.trained_tokens += trained_tokens(row)
        self.loss += sums.loss
        for name, value in sums.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value

    def mean(self) -> HeldOut:
        """The sums, divided by the summed normaliser."""
        divisor = self.normaliser or math.nan
        metrics = {name: value / divisor for name, value in self.metrics.items()}
        return HeldOut(self.loss / divisor, self.trained_tokens, metrics)


def evaluate_loss(forward: PackedForward, rows: Iterable[Row], objective: Objective = sft) -> HeldOut:
    """Loss and metrics of an objective over `rows`, without gradients. Must run inside `forward.installed()`."""
    sums = HeldOutSums(objective)
    for row in rows:
        sums.add([row], objective_sums(forward, row, objective))
    return sums.mean()
