"""The training loop, as a generator of events: it trains, measures and saves; who iterates may draw.

One turn of the loop is one optimizer step. Everything that decides what a step computes follows from (seed, step):
the rows, the rate, dropout. So a run that was killed and resumed from a checkpoint goes the same way, to the bit,
as one that was never interrupted.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from loratune.base.forward import PackedForward
from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.ops.dropout import dropout_key
from loratune.training import checkpoint
from loratune.training.checkpoint import Progress
from loratune.training.course import Course, Evaluated, Reason, Rows, StepDone
from loratune.training.graph import GraphStep
from loratune.training.optim import moments_on_host, never_updated, optimizer_of, set_rate
from loratune.training.step import StepResult, evaluate_loss, train_step


@dataclass(frozen=True, slots=True)
class Unreached:
    """Adapters that the first step gave no gradient: the model computes without calling their layers."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunsSlower:
    """A fast road was tried and cannot be taken; said once."""

    why: str


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a run."""

    reason: Reason
    progress: Progress


Event = StepDone | Evaluated | Unreached | RunsSlower | CheckpointSaved | Ended


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
        self._course = Course(self.rows, self.config)
        self._optimizer = optimizer_of(self.parameters.values(), self.config)
        self._graph = GraphStep.for_device(
            self.forward, list(self.parameters.values()), self._optimizer, self.config.max_grad_norm
        )
        self._saved_step: int | None = None
        self._tight = False
        self._unreached: tuple[str, ...] = ()
        self._trained_modules = [
            m for m in self.forward.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
        ]

    def resume(self, path: Path) -> None:
        """Takes up the optimizer's state and the progress of a checkpoint; the adapter is already loaded."""
        self._course.progress = checkpoint.read_progress(path)
        self._saved_step = self.progress.step
        checkpoint.restore_optimizer(path, self.parameters, self._optimizer, self.progress)

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self._course.progress

    @property
    def rows_per_epoch(self) -> int:
        """Packed rows in one pass over the training data."""
        return self._course.rows_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._course.total_steps

    @property
    def finished(self) -> bool:
        """No step is left: the last is done, or the held-out loss has not fallen for too long."""
        return self._course.finished

    def run(self) -> Iterator[Event]:
        """Trains to the end, yielding what happens; the last event says why it ended.

        The model's attention is that of packed rows until then, so do not generate with it between events.

        Raises: OutputError: a checkpoint cannot be written.
        """
        course = self._course
        reason: Reason = "early stop" if course.out_of_patience else "done"
        planned = self.forward.plan is not None and self.forward.plan.optimizer_on_host
        if planned or self.config.optim == "adamw_offload":
            moments_on_host(self._optimizer)
        with self.forward.installed():
            while not course.finished:
                yield self._step()
                if self._unreached:
                    yield Unreached(self._unreached)
                    self._unreached = ()
                if self._graph is not None and self._graph.why_not is not None:
                    yield RunsSlower(self._graph.why_not)
                    self._graph = None
                if course.diverged:
                    reason = "diverged"
                    break
                if course.evaluation_due:
                    evaluated = self._evaluate()
                    yield evaluated
                    if evaluated.best:
                        yield from self._save()
                    if course.out_of_patience:
                        reason = "early stop"
                        break
                if self.stop():
                    reason = "interrupted"
                    break
                if course.save_due:
                    yield from self._save()
            yield from self._save()
        yield Ended(reason, self.progress)

    def _step(self) -> StepDone:
        started = time.perf_counter()
        step = self.progress.step
        set_rate(self._optimizer, self._course.rate)
        rows = self._course.next_rows()
        with torch.random.fork_rng(devices=_cuda_devices(self.forward)), _training_mode(self._trained_modules):
            torch.manual_seed(self.config.seed * 1_000_003 + step)  # dropout follows from (seed, step) alone
            result = self._take_step(rows)
            if step == 0 and not result.skipped:
                optimizer = self._optimizer
                self._unreached = tuple(path for path, p in self.parameters.items() if never_updated(optimizer, p))
        seconds = time.perf_counter() - started
        tokens = sum(len(row.tokens) for row in rows)
        return self._course.stepped(result, tokens, seconds, peak_memory_bytes(self.forward.model.device))

    def _take_step(self, rows: Sequence[Row]) -> StepResult:
        key = dropout_key(self.config.seed, self.progress.step)
        if self._graph is not None and self._graph.why_not is None:
            return self._graph(rows, self._course.next_rows(ahead=1), key=key)
        return train_step(
            self.forward,
            rows,
            list(self.parameters.values()),
            self._optimizer,
            max_grad_norm=self.config.max_grad_norm,
            # A document by itself does not know where in the row it is: there dropout is left to torch's generator.
            key=None if self.forward.road == "one by one" else key,
        )

    def _evaluate(self) -> Evaluated:
        started = time.perf_counter()
        return self._course.evaluated(self._held_out_loss(), time.perf_counter() - started)

    def _held_out_loss(self) -> float:
        """Beside the memory that recordings hold; where there is no room for that, in their place."""
        if self._graph is not None and self._tight:
            self._graph.give_back()
        try:
            return evaluate_loss(self.forward, self.rows.held_out)[0]
        except torch.OutOfMemoryError:
            if self._graph is None or self._tight:
                raise
        self._tight = True
        return self._held_out_loss()

    def _save(self) -> Iterator[CheckpointSaved]:
        if self.checkpoints is not None and self._saved_step != self.progress.step:
            path = checkpoint.write(
                self.checkpoints, self.forward.model, self.adapter, self.parameters, self._optimizer, self.progress
            )
            self._saved_step = self.progress.step
            yield CheckpointSaved(self.progress.step, path)


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
