"""Rows of many jobs as one CUDA graph, whatever the mixture: forward, backward, losses, clipping and updates.

What differs from row to row is written to fixed addresses before the replay: the row itself, whose each token is
(`many.bank`), the owner of each trained position, which slots update now, and each slot's rate, betas, decay,
clipping norm and bias corrections. So jobs may join, leave, end a step or be swapped for others between two replays
of the same recording.

A loss is summed for each slot apart by selecting, not by multiplying with zero, and one slot's update looks at its
own loss and norm alone. What is not finite in one slot stays there.
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
from loratune.many.step import BankStep, MicroStep, join_parts
from loratune.ops.bank.adamw import IDLE, Settings, bank_adamw
from loratune.ops.bank.projection import Segment
from loratune.ops.products import choosing
from loratune.training.checkpoint import MOMENTS
from loratune.training.graph import RowBuffers, RowLayout, layout_for, logprobs_in
from loratune.training.recordings import Recordings
from loratune.training.step import StepResult


def step_of(forward: PackedForward, bank: Bank, tokens: int) -> BankStep | BankGraph:
    """The step of rows of at most `tokens` tokens: one recording where there are CUDA graphs, else the plain step.

    Raises: ModelError: the model cannot run documents together.
    """
    if bank.pool.device.type != "cuda":
        return BankStep(forward, bank)
    return BankGraph(forward, bank, tokens)


class _Joined(NamedTuple):
    """A job in a slot."""

    config: TrainConfig
    steps: int
    """Updates that its optimizer has made."""
    trained: int
    """Trained tokens of the step that is under way."""


class _QueuedRow(NamedTuple):
    """A row, laid out on the host."""

    parts: tuple[MicroStep, ...]
    segments: Sequence[Segment]
    layout: RowLayout
    buffer: int
    """Of the two, which take turns."""
    tables: Tensor | None
    """`Bank.prepare_row`"""


class BankGraph:
    """Steps of the jobs in a bank, recorded and replayed; called as `BankStep` is, inside `forward.installed()`."""

    def __init__(self, forward: PackedForward, bank: Bank, tokens: int, *, record: bool = True) -> None:
        """Args:
        tokens: of every row; shorter ones are filled up.
        record: False runs the same work launch by launch.
        """
        self._plain = BankStep(forward, bank)
        self._forward, self._bank = forward, bank
        self._tokens = -(-tokens // bank.block) * bank.block
        self._recordings = Recordings(record)
        self._layouts: dict[bool, RowLayout] = {}
        self._jobs: dict[int, _Joined] = {}
        pool, slots = bank.pool, bank.slots
        self._moments = torch.zeros_like(pool.master), torch.zeros_like(pool.master)
        self._starts = torch.tensor(pool.starts, device=pool.device)
        self._room = int(self._starts.diff().max())
        self._inputs = RowBuffers(self._tokens, pool.device)
        self._ahead: _QueuedRow | None = None
        self._turn = 0
        pinned = pool.device.type == "cuda"
        self._host_owners = torch.zeros(2, self._tokens, dtype=torch.int32, pin_memory=pinned)
        self._host_settings = torch.zeros(2, slots, len(IDLE) + 1, pin_memory=pinned)
        self._owners = torch.zeros(self._tokens, dtype=torch.int32, device=pool.device)
        self._slots = torch.arange(slots, dtype=torch.int32, device=pool.device)[:, None]
        self._settings = torch.zeros(slots, len(IDLE) + 1, device=pool.device)
        """One row of `Settings` for each slot, and whether its loss starts anew."""
        self._losses = torch.zeros(slots, device=pool.device)
        self._outcome = torch.zeros(2, slots, device=pool.device)  # losses, norms

    @property
    def why_not(self) -> str | None:
        """One line for the user once recording has failed; rows then run launch by launch."""
        return self._recordings.why_not

    def join(self, slot: int, config: TrainConfig) -> None:
        """Prepares the optimizer of the job that has been placed in `slot`."""
        self._jobs[slot] = _Joined(config, 0, 0)
        for flat in self._moments:
            self._bank.pool.slot(flat, slot).zero_()

    def leave(self, slot: int) -> None:
        """Forgets the job in `slot` and frees its place."""
        self._jobs.pop(slot, None)
        self._bank.clear(slot)

    @choosing()
    def run(
        self,
        parts: Sequence[MicroStep],
        rates: Mapping[int, float],
        upcoming: Callable[[], Sequence[MicroStep]] = tuple,
    ) -> dict[int, StepResult]:
        """As `BankStep.run`; the row of `upcoming`, asked for and laid out while the device works, costs no time."""
        ahead, self._ahead = self._ahead, None
        laid = ahead if ahead is not None and _same(ahead.parts, parts) else self._lay(parts)
        self._send(laid, rates)
        self._recordings.run("row", laid.layout, lambda: self._work(laid.layout))
        self._bank.pool.segments = ()
        if following := upcoming():
            self._ahead = self._lay(following)
        losses, norms = self._outcome.tolist()
        for part in parts:
            job, trained = self._jobs[part.slot], int((part.row.weights != 0).sum())
            self._jobs[part.slot] = job._replace(trained=job.trained + trained)
        results = {}
        for slot in rates:
            job = self._jobs[slot]
            skipped = not (math.isfinite(losses[slot]) and math.isfinite(norms[slot]))
            results[slot] = StepResult(losses[slot], norms[slot], job.trained, skipped)
            self._jobs[slot] = job._replace(steps=job.steps + (not skipped), trained=0)
        return results

    def evaluate(self, parts: Sequence[MicroStep]) -> float:
        """The objective of `parts`, of one row, summed."""
        return self._plain.evaluate(parts)

    def moments(self, slot: int) -> dict[str, Tensor]:
        """AdamW's moments of the job in `slot`, as `checkpoint` keeps them; empty before the first update."""
        if not self._jobs[slot].steps:
            return {}
        flats = [self._bank.pool.slot(flat, slot) for flat in self._moments]
        named = {moment: self._bank.named(slot, flat) for moment, flat in zip(MOMENTS, flats, strict=True)}
        return {f"{path}.{moment}": view for moment, views in named.items() for path, view in views.items()}

    def restore(self, slot: int, moments: Mapping[str, Tensor], optimizer_steps: int) -> None:
        """Puts moments back, after `join`."""
        self._jobs[slot] = self._jobs[slot]._replace(steps=optimizer_steps if moments else 0)
        for moment, flat in zip(MOMENTS, self._moments, strict=True):
            for path, view in self._bank.named(slot, self._bank.pool.slot(flat, slot)).items():
                if (key := f"{path}.{moment}") in moments:
                    view.copy_(moments[key])

    def _lay(self, parts: Sequence[MicroStep]) -> _QueuedRow:
        """Lays a row out on the host, in the buffers of the row before last, which have left by now."""
        self._turn = 1 - self._turn
        row, segments = join_parts(parts, self._bank.block)
        row = _filled_up(row, self._tokens)
        weights, owners = row.weights.clone(), torch.full((self._tokens,), -1, dtype=torch.int32)
        for part, segment in zip(parts, segments, strict=True):
            tokens = slice(segment.start, segment.stop)
            weights[tokens] /= part.normaliser
            owners[tokens] = part.slot
        row = replace(row, weights=weights)
        layout = layout_for(row, self._layouts)
        self._inputs.lay(row, layout, 1.0, self._turn)
        host = self._host_owners[self._turn]
        if layout.trained == self._tokens:
            host.copy_(owners)
        else:
            own = owners[weights.nonzero().squeeze(1)]
            host.fill_(-1)
            host[: len(own)] = own
        return _QueuedRow(tuple(parts), segments, layout, self._turn, self._bank.prepare_row(segments))

    def _send(self, laid: _QueuedRow, rates: Mapping[int, float]) -> None:
        """Brings what is special about this row to where the recording looks."""
        self._bank.set_row(laid.segments, laid.tables)
        self._inputs.send(laid.buffer)
        fresh = {part.slot for part in laid.parts if not self._jobs[part.slot].trained}
        table = [(*self._settings_of(slot, rates), float(slot in fresh)) for slot in range(self._bank.slots)]
        self._host_settings[laid.buffer] = torch.tensor(table)
        self._settings.copy_(self._host_settings[laid.buffer], non_blocking=True)
        self._owners.copy_(self._host_owners[laid.buffer], non_blocking=True)

    def _settings_of(self, slot: int, rates: Mapping[int, float]) -> Settings:
        if slot not in rates:
            return IDLE
        config, step = self._jobs[slot].config, self._jobs[slot].steps + 1
        return Settings(
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

    def _work(self, layout: RowLayout) -> None:
        """Everything on the device: what is recorded."""
        values, pool = self._inputs.device, self._bank.pool
        logprobs = logprobs_in(self._forward, values, layout)
        weighted = -(values["weights"][: layout.trained] * logprobs)
        weighted.sum().backward()  # the gradient of each summand is 1, whatever the others are
        with torch.no_grad():
            own = torch.where(self._owners[: layout.trained] == self._slots, weighted.detach(), 0.0).sum(1)
            started = torch.where(self._settings[:, -1] > 0, 0.0, self._losses)
            self._losses.copy_(started + own)
            norms = bank_adamw(
                pool.master, pool.gradient, self._moments, self._starts, self._room,
                self._settings[:, :-1].contiguous(), self._losses,
            )  # fmt: skip
            self._outcome[0].copy_(self._losses)
            self._outcome[1].copy_(norms)


def _same(parts: Sequence[MicroStep], others: Sequence[MicroStep]) -> bool:
    return len(parts) == len(others) and all(map(operator.is_, parts, others))


def _filled_up(row: Row, tokens: int) -> Row:
    """The row with padding up to `tokens`, in documents no longer than the longest that is there."""
    gap = tokens - len(row.tokens)
    assert gap >= 0, "the parts of a row are longer than it"
    if gap == 0:
        return row
    step = max(1, int(row.cu_seqlens.diff().max()))
    ends = torch.arange(len(row.tokens) + step, tokens + step, step, dtype=torch.int32).clamp(max=tokens)
    fields = {
        name: torch.cat([getattr(row, name), getattr(row, name).new_zeros(gap)])
        for name in ("tokens", "position_ids", "targets", "weights")
    }
    return Row(cu_seqlens=torch.cat([row.cu_seqlens, ends]), **fields)
