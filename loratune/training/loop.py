"""The training loop, as a generator of events: it trains, measures and saves; who iterates may draw.

One turn of the loop is one optimizer step. Everything that decides what a step computes follows from (seed, step):
the rows, the rate, dropout. So a run that was killed and resumed from a checkpoint goes the same way, to the bit,
as one that was never interrupted.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.training import checkpoint
from loratune.training.checkpoint import Progress
from loratune.training.graph import GraphStep
from loratune.training.optim import adamw, learning_rate, set_rate
from loratune.training.step import StepResult, evaluate_loss, train_step

MAX_SKIPPED_IN_A_ROW = 3
"""Steps with a non-finite loss or gradient, one after the other, before a run gives up."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step has ended."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    """Since the start of the run."""
    tokens: int
    """Tokens of this step's rows, trained or not."""
    tokens_per_second: float
    """Tokens of the rows, trained or not, over the seconds of this step."""
    memory_bytes: int
    """Peak so far: allocated on the GPU, or resident in the process on a CPU."""
    skipped: bool


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out loss was measured after `step` steps."""

    step: int
    eval_loss: float
    best: bool


@dataclass(frozen=True, slots=True)
class Unreached:
    """Adapters that the first step gave no gradient: the model computes without calling their layers."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunsSlower:
    """A fast road was tried and cannot be taken; said once."""

    why: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


Reason = Literal["done", "early stop", "interrupted", "diverged"]


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a run."""

    reason: Reason
    progress: Progress


Event = StepDone | Evaluated | Unreached | RunsSlower | Saved | Ended


@dataclass(frozen=True)
class Rows:
    """Where rows come from: training rows by epoch, and the held-out ones."""

    of_epoch: Callable[[int], Sequence[Row]]
    """Epoch, from 0, to its rows in order; every epoch has the same number."""
    held_out: Sequence[Row]


@dataclass
class Loop:
    """One training run over one active adapter. `run` may be called once."""

    forward: PackedForward
    adapter: str
    parameters: Mapping[str, nn.Parameter]
    rows: Rows
    config: TrainConfig
    checkpoints: Path | None
    """Folder for checkpoints, or None to keep none."""
    stop: Callable[[], bool] = lambda: False
    """Asked after every step; True saves and ends the run."""

    def __post_init__(self) -> None:
        self._epoch, self._epoch_rows = 0, self.rows.of_epoch(0)
        self.rows_per_epoch = len(self._epoch_rows)
        accumulation = self.config.gradient_accumulation_steps
        by_epochs = math.ceil(self.rows_per_epoch * self.config.epochs / accumulation)
        self.total_steps = self.config.max_steps or by_epochs
        self.total_rows = (
            self.total_steps * accumulation if self.config.max_steps else self.rows_per_epoch * self.config.epochs
        )
        self.eval_every = self.config.eval_every_steps or max(1, math.ceil(self.total_steps / 10))
        self.save_every = self.config.save_every_steps or self.eval_every
        self._optimizer = adamw(self.parameters.values(), self.config)
        self._graph = GraphStep.for_device(
            self.forward, list(self.parameters.values()), self._optimizer, self.config.max_grad_norm
        )
        self.progress = Progress()
        self._skipped_in_a_row = 0
        self._saved_step: int | None = None
        self._unreached: tuple[str, ...] = ()
        self._trained_modules = [
            m for m in self.forward.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
        ]

    def resume(self, path: Path) -> None:
        """Takes up the optimizer's state and the progress of a checkpoint; the adapter is already loaded."""
        self.progress = checkpoint.read_progress(path)
        self._saved_step = self.progress.step
        checkpoint.restore_optimizer(path, self.parameters, self._optimizer, self.progress)

    @property
    def finished(self) -> bool:
        """No step is left: the last is done, or the held-out loss has not fallen for too long."""
        return self.progress.step >= self.total_steps or self._out_of_patience()

    def run(self) -> Iterator[Event]:
        """Trains to the end, yielding what happens; the last event says why it ended.

        The model's attention is that of packed rows until then, so do not generate with it between events.

        Raises: OutputError: a checkpoint cannot be written.
        """
        reason: Reason = "early stop" if self._out_of_patience() else "done"
        with self.forward.installed():
            while not self.finished:
                yield self._step()
                if self._unreached:
                    yield Unreached(self._unreached)
                    self._unreached = ()
                if self._graph is not None and self._graph.why_not is not None:
                    yield RunsSlower(self._graph.why_not)
                    self._graph = None
                if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    reason = "diverged"
                    break
                last = self.progress.step == self.total_steps
                if self.rows.held_out and (last or self.progress.step % self.eval_every == 0):
                    evaluated = self._evaluate()
                    yield evaluated
                    if evaluated.best:
                        yield from self._save()
                    if self._out_of_patience():
                        reason = "early stop"
                        break
                if self.stop():
                    reason = "interrupted"
                    break
                if not last and self.progress.step % self.save_every == 0:
                    yield from self._save()
            yield from self._save()
        yield Ended(reason, self.progress)

    def _step(self) -> StepDone:
        started = time.perf_counter()
        step = self.progress.step
        rate = learning_rate(step, self.total_steps, self.config)
        set_rate(self._optimizer, rate)
        rows = self._rows_of_step(step)
        with torch.random.fork_rng(devices=_cuda_devices(self.forward)), _training_mode(self._trained_modules):
            torch.manual_seed(self.config.seed * 1_000_003 + step)  # dropout follows from (seed, step) alone
            result = self._take_step(rows)
            if step == 0 and not result.skipped:
                self._unreached = tuple(path for path, p in self.parameters.items() if p not in self._optimizer.state)
        seconds = time.perf_counter() - started
        tokens = sum(len(row.tokens) for row in rows)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if result.skipped else 0
        progress = self.progress
        progress.step += 1
        progress.skipped_steps += result.skipped
        progress.optimizer_steps += not result.skipped
        progress.trained_tokens += result.trained_tokens
        progress.seconds += seconds
        return StepDone(
            step=progress.step,
            total_steps=self.total_steps,
            epoch=min(progress.step * self.config.gradient_accumulation_steps, self.total_rows) / self.rows_per_epoch,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            trained_tokens=progress.trained_tokens,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            memory_bytes=peak_memory_bytes(self.forward.model.device),
            skipped=result.skipped,
        )

    def _take_step(self, rows: Sequence[Row]) -> StepResult:
        if self._graph is not None and self._graph.why_not is None:
            return self._graph(rows)
        return train_step(
            self.forward,
            rows,
            list(self.parameters.values()),
            self._optimizer,
            max_grad_norm=self.config.max_grad_norm,
        )

    def _rows_of_step(self, step: int) -> list[Row]:
        accumulation = self.config.gradient_accumulation_steps
        rows = []
        for n in range(step * accumulation, min((step + 1) * accumulation, self.total_rows)):
            epoch, index = divmod(n, self.rows_per_epoch)
            if epoch != self._epoch:
                self._epoch, self._epoch_rows = epoch, self.rows.of_epoch(epoch)
            rows.append(self._epoch_rows[index])
        return rows

    def _evaluate(self) -> Evaluated:
        started = time.perf_counter()
        progress = self.progress
        eval_loss, _ = evaluate_loss(self.forward, self.rows.held_out)
        best = progress.best_eval_loss is None or eval_loss < progress.best_eval_loss
        if best:
            progress.best_step, progress.best_eval_loss = progress.step, eval_loss
        progress.evaluations_without_gain = 0 if best else progress.evaluations_without_gain + 1
        progress.seconds += time.perf_counter() - started
        return Evaluated(progress.step, eval_loss, best)

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _save(self) -> Iterator[Saved]:
        if self.checkpoints is not None and self._saved_step != self.progress.step:
            path = checkpoint.write(
                self.checkpoints, self.forward.model, self.adapter, self.parameters, self._optimizer, self.progress
            )
            self._saved_step = self.progress.step
            yield Saved(self.progress.step, path)


@contextmanager
def _training_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Turns dropout on in what trains. The frozen base stays in evaluation mode: its dropout would only add noise."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cuda_devices(forward: PackedForward) -> list[torch.device]:
    device = forward.model.device
    return [device] if device.type == "cuda" else []
