"""One packed row of several jobs: one forward and backward for all, and a loss, clipping and update for each.

A job's micro-step is one packed row, as in `training.step`. Here it becomes a segment of a longer row: its documents
without padding, beside the segments of other jobs. Each token meets only its own job's adapter (`many.bank`). The
objective runs over the whole row. Each term belongs to a document, and each document to a segment. So every segment
has its own loss, divided by the normaliser of its own job and step. Losses are only added, so the gradient of each is
the gradient of the job alone, and a non-finite value stays inside its job.

An update is due when the last micro-step of a job's step has run. Jobs with several micro-steps accumulate gradients
over several rows, independent of the other jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.base import row_layers
from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.errors import ConfigError, ModelError
from loratune.many.bank import Bank
from loratune.ops.bank.pool import Segment
from loratune.training.checkpoint import MOMENTS
from loratune.training.objectives.objective import Objective, Terms
from loratune.training.objectives.sft import sft
from loratune.training.optim import adamw, set_rate
from loratune.training.step import (
    DeviceRow,
    ObjectiveSums,
    StepResult,
    accumulate,
    finish_step,
    new_outcome,
    objective_sums,
    trained_tokens,
)


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One row of one job, to become a segment of a shared row."""

    slot: int
    row: Row
    """The row without padding (`trim`)."""
    normaliser: float
    """Sum of `Objective.normaliser` over all rows of the job's step."""
    key: int | None
    """Dropout key of the step, see `ops.dropout`; None for no dropout."""
    position: int
    """Number of the row's first token within the job's step, counting padding; dropout depends on it."""


class BankStep:
    """Steps of the jobs in a bank, one row at a time. Must be used inside `forward.installed()`."""

    why_not: str | None = None

    def __init__(self, forward: PackedForward, bank: Bank, objective: Objective = sft) -> None:
        if not forward.in_one_call or forward.head is None:
            raise ModelError(
                f"{type(forward.model).__name__} cannot train several adapters in one row: "
                f"{forward.notes[0] if forward.notes else 'its documents do not run together'}"
            )
        if row_layers.count(forward.model):
            # They multiply tokens of other documents by zero, so a diverging adapter would reach its neighbours.
            raise ModelError(
                f"{type(forward.model).__name__} cannot train several adapters in one row: its recurrent layers "
                "would let a diverging adapter disturb the others"
            )
        self._forward, self._bank, self._objective = forward, bank, objective
        self._jobs: dict[int, _SlotStep] = {}

    def join(self, slot: int, config: TrainConfig) -> None:
        """Prepares the optimizer of the job in `slot`."""
        self._jobs[slot] = _SlotStep(self._bank, slot, config)

    def leave(self, slot: int) -> None:
        """Removes the job in `slot` and frees the slot."""
        self._jobs.pop(slot, None)
        self._bank.clear(slot)

    def run(
        self, micro_steps: Sequence[MicroStep], rates: Mapping[int, float],
        upcoming: Callable[[], Sequence[MicroStep]] = tuple,
    ) -> dict[int, StepResult]:  # fmt: skip
        """Trains on one row, and updates the jobs whose step ends with it.

        Args:
            micro_steps: segments of the row; together at most as many tokens as a row has.
            rates: slot -> learning rate, for jobs whose last micro-step of a step is in this row.
            upcoming: returns the likely content of the next row; only `BankGraph` calls it.

        Returns: slot -> result of its step, for the slots in `rates`. A non-finite loss or gradient leaves the slot's
        adapter and optimizer unchanged.
        """
        row, segments = join_micro_steps(micro_steps, self._bank.block)
        device = self._forward.model.device
        owners = segment_of_documents(row, segments).to(device)
        with self._bank.row(segments):
            on_device = DeviceRow.send(row, device, self._objective.columns)
            losses = accumulate(
                self._forward, on_device, self._objective, lambda terms: _losses(terms, owners, micro_steps)
            )
        for one, loss in zip(micro_steps, losses, strict=True):
            self._jobs[one.slot].add(loss, trained_tokens(one.row))
        return {slot: self._jobs[slot].finish(rate) for slot, rate in rates.items()}

    def evaluate(self, micro_steps: Sequence[MicroStep]) -> ObjectiveSums:
        """Sums of loss and metrics over the micro-steps of one row, not divided by a normaliser."""
        row, segments = join_micro_steps(micro_steps, self._bank.block)
        owners = segment_of_documents(row, segments).to(self._forward.model.device)
        with self._bank.row(segments):
            return objective_sums(
                self._forward, row, self._objective, lambda terms: _losses(terms, owners, micro_steps).sum()
            )

    def moments(self, slot: int) -> dict[str, Tensor]:
        """AdamW's moments of the job in `slot`, named as in a checkpoint; empty before the first update."""
        return self._jobs[slot].moments()

    def restore(self, slot: int, moments: Mapping[str, Tensor], optimizer_steps: int) -> None:
        """Restores moments; call it after `join`."""
        self._jobs[slot].restore(moments, optimizer_steps)


def check_training(config: TrainConfig) -> None:
    """Raises ConfigError if a bank of adapters cannot train with these settings."""
    if config.optim != "adamw":
        raise ConfigError(f"optim {config.optim}: a bank of adapters has float32 moments; train this job alone")
    if config.loraplus_lr_ratio != 1:
        ratio = f"{config.loraplus_lr_ratio:g}"
        raise ConfigError(f"loraplus_lr_ratio {ratio}: adapters of a bank have one rate each; train this job alone")


class _SlotStep:
    """The step of one slot: AdamW over its flat master, with the job's own loss and clipping."""

    def __init__(self, bank: Bank, slot: int, config: TrainConfig) -> None:
        check_training(config)
        self._bank, self._slot = bank, slot
        self._master = nn.Parameter(bank.master(slot))  # shares the memory
        self._master.grad = bank.gradient(slot)
        self._optimizer = adamw([self._master], config)
        self._max_grad_norm = config.max_grad_norm
        self._outcome, self._trained = new_outcome(self._master.device), 0

    def add(self, loss: Tensor, trained: int) -> None:
        """Adds the loss and trained tokens of one micro-step."""
        self._outcome[0] += loss
        self._trained += trained

    def finish(self, rate: float) -> StepResult:
        """Ends the job's step and zeroes its gradient."""
        set_rate(self._optimizer, rate)
        finish_step(self._optimizer, self._max_grad_norm, self._outcome)
        self._bank.gradient(self._slot).zero_()
        result = StepResult.read(self._outcome, self._trained)
        self._outcome.zero_()
        self._trained = 0
        return result

    def moments(self) -> dict[str, Tensor]:
        """AdamW's moments of the job, as views named "PARAMETER.exp_avg" and "PARAMETER.exp_avg_sq"."""
        state = self._optimizer.state[self._master]
        views = {moment: self._bank.named(self._slot, state[moment]) for moment in MOMENTS if moment in state}
        return {f"{path}.{moment}": view for moment, named in views.items() for path, view in named.items()}

    def restore(self, moments: Mapping[str, Tensor], optimizer_steps: int) -> None:
        """The inverse of `moments`. A parameter without moments was never updated and gets zeros."""
        device = self._master.device
        state: dict[str, Tensor] = {"step": torch.tensor(float(optimizer_steps), device=device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(self._master)
            for path, view in self._bank.named(self._slot, state[moment]).items():
                if (key := f"{path}.{moment}") in moments:
                    view.copy_(moments[key])
        if moments:
            self._optimizer.state[self._master] = state


def _losses(terms: Terms, owners: Tensor, micro_steps: Sequence[MicroStep]) -> Tensor:
    """Sums the terms of each micro-step and divides by its normaliser: (micro-steps,).

    Args:
        owners: result of `segment_of_documents`.
    """
    owner = owners[terms.documents]
    return torch.stack([terms.values[owner == nth].sum() / one.normaliser for nth, one in enumerate(micro_steps)])


def trim(row: Row) -> Row:
    """A row without its padding tail."""
    start, end = (int(bound) for bound in row.cu_seqlens[-2:])
    if row.weights[start:].any() or row.position_ids[start:].any() or start == 0:
        return row  # the last document is real: only padding stays at position 0
    assert end == len(row.tokens)
    return Row(
        row.tokens[:start], row.position_ids[:start], row.targets[:start], row.weights[:start], row.cu_seqlens[:-1],
        {name: column[:start] for name, column in row.columns.items()},
    )  # fmt: skip


def join_micro_steps(micro_steps: Sequence[MicroStep], block: int) -> tuple[Row, list[Segment]]:
    """Joins micro-steps into one row; each starts at a multiple of `block`. Gaps are padding without an owner."""
    bounds, segments, at = [torch.zeros(1, dtype=torch.int32)], list[Segment](), 0
    gaps = [-len(one.row.tokens) % block for one in micro_steps]
    for one, gap in zip(micro_steps, gaps, strict=True):
        length = len(one.row.tokens)
        bounds.append(one.row.cu_seqlens[1:] + at)
        if gap:
            bounds.append(torch.tensor([at + length + gap], dtype=torch.int32))
        segments.append(Segment(one.slot, at, at + length, one.key, one.position))
        at += length + gap
    rows = [extend(one.row, gap) for one, gap in zip(micro_steps, gaps, strict=True)]
    fields = {name: torch.cat([getattr(row, name) for row in rows]) for name in _FIELDS}
    columns = {name: torch.cat([row.columns[name] for row in rows]) for name in rows[0].columns}
    return Row(cu_seqlens=torch.cat(bounds), columns=columns, **fields), segments


_FIELDS = ("tokens", "position_ids", "targets", "weights")


def extend(row: Row, gap: int) -> Row:
    """The row with `gap` zeros behind each of its fields; the document boundaries stay."""
    if not gap:
        return row

    def longer(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(gap)])

    fields = {name: longer(getattr(row, name)) for name in _FIELDS}
    return Row(cu_seqlens=row.cu_seqlens, columns={n: longer(c) for n, c in row.columns.items()}, **fields)


def segment_of_documents(row: Row, segments: Sequence[Segment]) -> Tensor:
    """(documents + 1,) int64: each document's index in `segments`, -1 for padding and for unused places."""
    starts = row.cu_seqlens
    owners = torch.full((len(starts),), -1)
    for nth, segment in enumerate(segments):
        owners[(starts >= segment.start) & (starts < segment.stop)] = nth
    return owners
