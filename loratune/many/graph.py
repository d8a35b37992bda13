"""Rows of many jobs as one CUDA graph for every mixture: forward, backward, losses, clipping and updates.

The numbers that differ between rows are written to fixed addresses before the replay: the row itself, the slot of
each token (`many.bank`) and of each document, the slots that update now, and each slot's rate, betas, decay, clipping
norm, bias corrections and normaliser. So jobs may join, leave, end a step or be replaced between two replays of the
same recording.

A slot's loss is the sum of its selected terms; terms of other slots are not multiplied by zero. A slot's update reads
only its own loss and norm. So a non-finite value stays inside its slot. `ops.bank.adamw` ends the steps of all slots
in two passes; it does for each slot the work of `training.step.finish_step`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.many.bank import Bank
from loratune.many.step import BankStep, MicroStep, check_training, extend, join_micro_steps, segment_of_documents
from loratune.ops.bank.adamw import IDLE, SlotUpdate, bank_adamw
from loratune.ops.bank.pool import Segment
from loratune.training.checkpoint import MOMENTS
from loratune.training.graph import RowBuffers, RowLayout, layout_for
from loratune.training.objectives.objective import Objective, Terms
from loratune.training.objectives.sft import sft
from loratune.training.recordings import Recordings
from loratune.training.step import ObjectiveSums, StepResult, accumulate, trained_tokens

_COLUMNS = len(IDLE) + 2
"""Columns of the table of slots: AdamW's settings, the normaliser, and 1 if the slot's step starts with this row."""


def step_of(forward: PackedForward, bank: Bank, tokens: int, objective: Objective = sft) -> BankStep | BankGraph:
    """The step for rows of at most `tokens` tokens: one recording on a GPU, else the eager step.

    Raises: ModelError: the model cannot run documents together.
    """
    if bank.pool.device.type != "cuda":
        return BankStep(forward, bank, objective)
    return BankGraph(forward, bank, tokens, objective)


class _RecordedJob(NamedTuple):
    """A job in a slot."""

    config: TrainConfig
    steps: int
    """Number of updates of its optimizer."""
    trained: int
    """Trained tokens of the current step so far."""


class _QueuedRow(NamedTuple):
    """A row in host buffers."""

    micro_steps: tuple[MicroStep, ...]
    segments: Sequence[Segment]
    layout: RowLayout
    buffer: int
    """Number of the host buffer, 0 or 1; rows alternate between them."""
    tables: Tensor | None
    """Result of `Bank.prepare_row`."""


class BankGraph:
    """Steps of the jobs in a bank, recorded and replayed; used like `BankStep`, inside `forward.installed()`."""

    def __init__(
        self, forward: PackedForward, bank: Bank, tokens: int, objective: Objective = sft, *, record: bool = True
    ) -> None:
        """Args:
        tokens: tokens in every row; shorter rows are padded.
        record: False runs the same work launch by launch.
        """
        self._eager = BankStep(forward, bank, objective)
        self._forward, self._bank, self._objective = forward, bank, objective
        self._tokens = -(-tokens // bank.block) * bank.block
        self._recordings = Recordings(record)
        self._layouts: dict[bool, RowLayout] = {}
        self._jobs: dict[int, _RecordedJob] = {}
        pool, slots = bank.pool, bank.slots
        self._moments = torch.zeros_like(pool.master), torch.zeros_like(pool.master)
        self._starts = torch.tensor(pool.starts, device=pool.device)
        self._capacity = int(self._starts.diff().max())
        self._buffers = RowBuffers(self._tokens, pool.device, objective.columns)
        self._ahead: _QueuedRow | None = None
        self._odd = 0
        pinned = pool.device.type == "cuda"
        self._host_owners = torch.zeros(2, self._tokens + 1, dtype=torch.int32, pin_memory=pinned)
        self._host_table = torch.zeros(2, slots, _COLUMNS, pin_memory=pinned)
        self._owners = torch.zeros(self._tokens + 1, dtype=torch.int32, device=pool.device)
        """Document -> slot; -1 for padding and for unused places."""
        self._slots = torch.arange(slots, dtype=torch.int32, device=pool.device)[:, None]
        self._table = torch.zeros(slots, _COLUMNS, device=pool.device)
        self._losses = torch.zeros(slots, device=pool.device)
        self._outcome = torch.zeros(2, slots, device=pool.device)  # losses, norms

    @property
    def why_not(self) -> str | None:
        """One line for the user once recording has failed; rows then run launch by launch."""
        return self._recordings.why_not

    def join(self, slot: int, config: TrainConfig) -> None:
        """Prepares the optimizer of the job in `slot`."""
        check_training(config)
        self._jobs[slot] = _RecordedJob(config, 0, 0)
        for flat in self._moments:
            self._bank.pool.slot(flat, slot).zero_()

    def leave(self, slot: int) -> None:
        """Removes the job in `slot` and frees the slot."""
        self._jobs.pop(slot, None)
        self._bank.clear(slot)

    def run(
        self, micro_steps: Sequence[MicroStep], rates: Mapping[int, float],
        upcoming: Callable[[], Sequence[MicroStep]] = tuple,
    ) -> dict[int, StepResult]:  # fmt: skip
        """See `BankStep.run`. The row of `upcoming` is requested and prepared while the device works."""
        ahead, self._ahead = self._ahead, None
        same = ahead is not None and _same(ahead.micro_steps, micro_steps)
        queued = ahead if ahead is not None and same else self._prepare(micro_steps)
        self._send(queued, rates)
        with self._forward.state.products.choosing():
            self._recordings.run("row", queued.layout, lambda: self._work(queued.layout))
        self._bank.pool.segments = ()
        if following := upcoming():
            self._ahead = self._prepare(following)
        losses, norms = self._outcome.tolist()
        for one in micro_steps:
            job = self._jobs[one.slot]
            self._jobs[one.slot] = job._replace(trained=job.trained + trained_tokens(one.row))
        results = {}
        for slot in rates:
            job = self._jobs[slot]
            skipped = not (math.isfinite(losses[slot]) and math.isfinite(norms[slot]))
            results[slot] = StepResult(losses[slot], norms[slot], job.trained, skipped)
            self._jobs[slot] = job._replace(steps=job.steps + (not skipped), trained=0)
        return results

    def evaluate(self, micro_steps: Sequence[MicroStep]) -> ObjectiveSums:
        """Sums of loss and metrics over the micro-steps of one row, not divided by a normaliser."""
        return self._eager.evaluate(micro_steps)

    def moments(self, slot: int) -> dict[str, Tensor]:
        """AdamW's moments of the job in `slot`, named as in a checkpoint; empty before the first update."""
        if not self._jobs[slot].steps:
            return {}
        flats = [self._bank.pool.slot(flat, slot) for flat in self._moments]
        named = {moment: self._bank.named(slot, flat) for moment, flat in zip(MOMENTS, flats, strict=True)}
        return {f"{path}.{moment}": view for moment, views in named.items() for path, view in views.items()}

    def restore(self, slot: int, moments: Mapping[str, Tensor], optimizer_steps: int) -> None:
        """Restores moments; call it after `join`."""
        self._jobs[slot] = self._jobs[slot]._replace(steps=optimizer_steps if moments else 0)
        for moment, flat in zip(MOMENTS, self._moments, strict=True):
            for path, view in self._bank.named(slot, self._bank.pool.slot(flat, slot)).items():
                if (key := f"{path}.{moment}") in moments:
                    view.copy_(moments[key])

    def _prepare(self, micro_steps: Sequence[MicroStep]) -> _QueuedRow:
        """Writes a row to host buffers. Rows alternate between two sets, because the last copy may still run."""
        self._odd = 1 - self._odd
        row, segments = join_micro_steps(micro_steps, self._bank.block)
        row = _padded(row, self._tokens)
        layout = layout_for(row, self._layouts)
        self._buffers.prepare(row, layout, 1.0, self._odd)
        slots = torch.tensor([*(one.slot for one in micro_steps), -1], dtype=torch.int32)
        owners = slots[segment_of_documents(row, segments)]
        host = self._host_owners[self._odd].fill_(-1)
        host[: len(owners)] = owners
        return _QueuedRow(tuple(micro_steps), segments, layout, self._odd, self._bank.prepare_row(segments))

    def _send(self, queued: _QueuedRow, rates: Mapping[int, float]) -> None:
        """Copies a row and its tables to the addresses that the recording reads."""
        self._bank.set_row(queued.segments, queued.tables)
        self._buffers.send(queued.buffer)
        normalisers = {one.slot: one.normaliser for one in queued.micro_steps}
        starting = {slot for slot in normalisers if not self._jobs[slot].trained}
        table = [
            (*self._settings_of(slot, rates), normalisers.get(slot, 1.0), float(slot in starting))
            for slot in range(self._bank.slots)
        ]
        self._host_table[queued.buffer] = torch.tensor(table)
        self._table.copy_(self._host_table[queued.buffer], non_blocking=True)
        self._owners.copy_(self._host_owners[queued.buffer], non_blocking=True)

    def _settings_of(self, slot: int, rates: Mapping[int, float]) -> SlotUpdate:
        if slot not in rates:
            return IDLE
        config, step = self._jobs[slot].config, self._jobs[slot].steps + 1
        return SlotUpdate(
            due=1.0,
            rate=rates[slot],
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_norm=config.max_grad_norm or math.inf,
            correction1=1 - config.adam_beta1**step,
            correction2=math.sqrt(1 - config.adam_beta2**step),
        )

    def _losses_of(self, terms: Terms) -> Tensor:
        """(slots,): each slot's terms, summed and divided by its normaliser."""
        owned = self._owners[terms.documents] == self._slots
        return torch.where(owned, terms.values, 0.0).sum(1) / self._table[:, -2]

    def _work(self, layout: RowLayout) -> None:
        """All work of one row on the device; this is recorded."""
        pool = self._bank.pool
        losses = accumulate(self._forward, self._buffers.row(layout), self._objective, self._losses_of)
        with torch.no_grad():
            before = torch.where(self._table[:, -1] > 0, 0.0, self._losses)
            self._losses.copy_(before + losses)
            norms = bank_adamw(
                pool.master, pool.gradient, self._moments, self._starts, self._capacity,
                self._table[:, : len(IDLE)].contiguous(), self._losses,
            )  # fmt: skip
            self._outcome[0].copy_(self._losses)
            self._outcome[1].copy_(norms)


def _same(some: Sequence[MicroStep], others: Sequence[MicroStep]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _padded(row: Row, tokens: int) -> Row:
    """The row with padding up to `tokens`. Documents of padding are no longer than the row's longest document."""
    gap = tokens - len(row.tokens)
    assert gap >= 0, "micro-steps are longer than a row"
    if gap == 0:
        return row
    step = max(1, int(row.cu_seqlens.diff().max()))
    ends = torch.arange(len(row.tokens) + step, tokens + step, step, dtype=torch.int32).clamp(max=tokens)
    return replace(extend(row, gap), cu_seqlens=torch.cat([row.cu_seqlens, ends]))
