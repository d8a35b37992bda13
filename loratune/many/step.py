"""One packed row of several jobs: a forward and a backward for all, and for each its own loss, clipping and update.

A job's micro-step is one packed row of its own, as in `training.step`. Here it becomes a part of a longer row: its
documents without their padding, laid beside those of other jobs, every token meeting its own job's adapter alone
(`many.bank`). Each part's loss is divided by the normaliser of its own job and step, and the parts are only ever
added, so that the gradient of each is what it would be alone, and what is not finite in one stays there.

An update is due when the last part of a job's step has run; jobs with several parts collect their gradients over
several rows, whatever the others do meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.errors import ConfigError, ModelError
from loratune.many.bank import Bank
from loratune.ops.bank.projection import Segment
from loratune.training.checkpoint import MOMENTS
from loratune.training.optim import adamw, set_rate
from loratune.training.step import StepResult


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One micro-step of one job, to be laid into a row."""

    slot: int
    row: Row
    """Without padding, see `trim`."""
    normaliser: float
    """Summed weight of all trained tokens of the job's step."""
    key: int | None
    """Of the step's dropout, see `ops.dropout`; None for no dropout."""
    position: int
    """Number of the first token within the job's step, counting padding, which is what dropout goes by."""


class BankStep:
    """Steps of the jobs in a bank, one row at a time. Must be used inside `forward.installed()`."""

    why_not: str | None = None

    def __init__(self, forward: PackedForward, bank: Bank) -> None:
        if forward.road == "one by one" or forward.head is None:
            raise ModelError(
                f"{type(forward.model).__name__} cannot train several adapters in one row: "
                f"{forward.notes[0] if forward.notes else 'its documents do not run together'}"
            )
        self._forward, self._bank = forward, bank
        self._updates: dict[int, _SlotOptimizer] = {}
        self._losses: dict[int, float] = {}
        self._trained: dict[int, int] = {}

    def join(self, slot: int, config: TrainConfig) -> None:
        """Prepares the optimizer of the job that has been placed in `slot`."""
        self._updates[slot] = _SlotOptimizer(self._bank, slot, config)
        self._losses[slot], self._trained[slot] = 0.0, 0

    def leave(self, slot: int) -> None:
        """Forgets the job in `slot` and frees its place."""
        self._updates.pop(slot, None)
        self._bank.clear(slot)

    def run(
        self,
        parts: Sequence[MicroStep],
        rates: Mapping[int, float],
        upcoming: Callable[[], Sequence[MicroStep]] = tuple,
    ) -> dict[int, StepResult]:
        """Trains on one row, and updates the jobs whose step ends with it.

        Args:
            parts: together at most one row of tokens.
            rates: slot -> learning rate, for those whose last part of a step is among `parts`.
            upcoming: what the next row will likely be; of use to `BankGraph` only.

        Returns: slot -> what its step did, for the slots in `rates`. A loss or gradient that is not finite leaves
        the slot's adapter and optimizer as they were.
        """
        row, segments = join_parts(parts, self._bank.block)
        with self._bank.row(segments):
            losses = self._objectives(parts, row)
            losses.sum().backward()  # the gradient of each part is 1, whatever the others are
        for part, loss in zip(parts, losses.tolist(), strict=True):
            self._losses[part.slot] += loss
            self._trained[part.slot] += int((part.row.weights != 0).sum())
        results = {}
        for slot, rate in rates.items():
            loss, trained = self._losses[slot], self._trained[slot]
            self._losses[slot], self._trained[slot] = 0.0, 0
            norm = self._updates[slot](rate, finite=math.isfinite(loss))
            results[slot] = StepResult(loss, norm, trained, not (math.isfinite(loss) and math.isfinite(norm)))
        return results

    @torch.no_grad()
    def evaluate(self, parts: Sequence[MicroStep]) -> float:
        """The objective of `parts`, of one row, summed."""
        row, segments = join_parts(parts, self._bank.block)
        with self._bank.row(segments):
            return float(self._objectives(parts, row).sum())

    def moments(self, slot: int) -> dict[str, Tensor]:
        """AdamW's moments of the job in `slot`, as `checkpoint` keeps them; empty before the first update."""
        return self._updates[slot].moments()

    def restore(self, slot: int, moments: Mapping[str, Tensor], optimizer_steps: int) -> None:
        """Puts moments back, after `join`."""
        self._updates[slot].restore(moments, optimizer_steps)

    def _objectives(self, parts: Sequence[MicroStep], row: Row) -> Tensor:
        """(parts,): each part's negative log-likelihood over its normaliser; `row` is all of them joined."""
        device = self._forward.model.device
        predicting = row.weights.nonzero().squeeze(1)
        logprobs = self._forward.logprobs(
            row.tokens.to(device),
            row.position_ids.to(device),
            row.cu_seqlens,
            predicting.to(device),
            row.targets[predicting].to(device),
        )
        weighted = -(row.weights[predicting].to(device) * logprobs)
        counts = [int((part.row.weights != 0).sum()) for part in parts]
        sums = [own.sum() / part.normaliser for own, part in zip(weighted.split(counts), parts, strict=True)]
        return torch.stack(sums)


class _SlotOptimizer:
    """AdamW over the flat master of one slot, with the job's own clipping."""

    def __init__(self, bank: Bank, slot: int, config: TrainConfig) -> None:
        if config.optim != "adamw":
            raise ConfigError(f"optim {config.optim}: a bank of adapters keeps float32 moments; train it by itself")
        self._bank, self._slot = bank, slot
        self._master = nn.Parameter(bank.master(slot))  # shares the memory
        self._master.grad = bank.gradient(slot)
        self._optimizer = adamw([self._master], config)
        self._max_grad_norm = config.max_grad_norm or math.inf

    def __call__(self, rate: float, *, finite: bool) -> float:
        """Clips, updates unless something is not finite, and zeroes the gradient. Returns its norm from before."""
        norm = float(nn.utils.clip_grad_norm_([self._master], self._max_grad_norm))
        if finite and math.isfinite(norm):
            set_rate(self._optimizer, rate)
            self._optimizer.step()
        self._bank.gradient(self._slot).zero_()
        return norm

    def moments(self) -> dict[str, Tensor]:
        """Named as the job's parameters are."""
        state = self._optimizer.state[self._master]
        views = {moment: self._bank.named(self._slot, state[moment]) for moment in MOMENTS if moment in state}
        return {f"{path}.{moment}": view for moment, named in views.items() for path, view in named.items()}

    def restore(self, moments: Mapping[str, Tensor], optimizer_steps: int) -> None:
        """The inverse of `moments`; a parameter without any had never been reached."""
        device = self._master.device
        state: dict[str, Tensor] = {"step": torch.tensor(float(optimizer_steps), device=device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(self._master)
            for path, view in self._bank.named(self._slot, state[moment]).items():
                if (key := f"{path}.{moment}") in moments:
                    view.copy_(moments[key])
        if moments:
            self._optimizer.state[self._master] = state


def trim(row: Row) -> Row:
    """A row without its padding tail."""
    start, end = (int(bound) for bound in row.cu_seqlens[-2:])
    if row.weights[start:].any() or row.position_ids[start:].any() or start == 0:
        return row  # the last document is a real one: only padding stays at position 0
    assert end == len(row.tokens)
    return Row(
        row.tokens[:start], row.position_ids[:start], row.targets[:start], row.weights[:start], row.cu_seqlens[:-1]
    )


def join_parts(parts: Sequence[MicroStep], block: int) -> tuple[Row, list[Segment]]:
    """Lays parts end to end, each beginning at a multiple of `block`; the gaps are padding that belongs to nobody."""
    fields: dict[str, list[Tensor]] = {"tokens": [], "position_ids": [], "targets": [], "weights": []}
    bounds, segments, at = [torch.zeros(1, dtype=torch.int32)], list[Segment](), 0
    for part in parts:
        length = len(part.row.tokens)
        gap = -length % block
        for name, pieces in fields.items():
            piece: Tensor = getattr(part.row, name)
            pieces += [piece, piece.new_zeros(gap)] if gap else [piece]
        bounds.append(part.row.cu_seqlens[1:] + at)
        if gap:
            bounds.append(torch.tensor([at + length + gap], dtype=torch.int32))
        segments.append(Segment(part.slot, at, at + length, part.key, part.position))
        at += length + gap
    joined = {name: torch.cat(pieces) for name, pieces in fields.items()}
    return Row(cu_seqlens=torch.cat(bounds), **joined), segments
