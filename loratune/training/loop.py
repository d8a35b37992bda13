"""The training loop, as a generator of events: it trains, evaluates and saves, and the caller displays.

One iteration is one optimizer step. Everything that decides a step follows from (seed, step): rows, rate, dropout. A
run that was killed and resumed from a checkpoint therefore equals the uninterrupted run to the bit.
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
from loratune.lora.rates import output_factors
from loratune.ops.dropout import dropout_key
from loratune.training import checkpoint
from loratune.training.checkpoint import Progress
from loratune.training.course import Course, Evaluated, Reason, Rows, StepDone
from loratune.training.graph import GraphStep
from loratune.training.objectives import objective_named
from loratune.training.optim import never_updated, optimizer_of, set_rate
from loratune.training.step import HeldOut, StepResult, evaluate_loss, train_step


@dataclass(frozen=True, slots=True)
class Unreached:
    """Adapters without a gradient after the first step, because the model computes without calling their layers."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunsSlower:
    """A faster way to run steps failed, so a slower one is used; reported once."""

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
    finite: bool = True
    """False if the adapter in memory has infinite or NaN values. It is then not saved."""
    saved_step: int | None = None
    """Step of the newest checkpoint."""


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
    """Folder for checkpoints; None writes none."""
    stop: Callable[[], bool] = lambda: False
    """Called after every step; True saves and ends the run."""
    run_id: str = ""
    """Of the run, for the checkpoints' manifests."""

    def __post_init__(self) -> None:
        self._course = Course(self.rows, self.config)
        self._objective = objective_named(self.config.objective)
        self._optimizer = optimizer_of(self.parameters.values(), self.config, output_factors(self.forward.model))
        self._graph = GraphStep.for_device(
            self.forward, list(self.parameters.values()), self._optimizer, self.config.max_grad_norm, self._objective
        )
        self._saved_step: int | None = None
        self._finite = True
        self._evaluate_alone = False
        self._unreached: tuple[str, ...] = ()
        self._trained_modules = [
            m for m in self.forward.model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
        ]

    def resume(self, path: Path) -> None:
        """Restores optimizer state and progress from a checkpoint. The caller has loaded the adapter."""
        self._course.progress = checkpoint.resumed_progress(path, self.run_id)
        self._saved_step = self.progress.step
        checkpoint.restore_optimizer(path, self.parameters, self._optimizer, self.progress)

    @property
    def progress(self) -> Progress:
        """Counters of the run so far."""
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
        """True after the last step, or when early stopping has run out of patience."""
        return self._course.finished

    def run(self) -> Iterator[Event]:
        """Trains to the end and yields events; the last one gives the reason for the end.

        The model's attention is set up for packed rows until then, so do not generate with it between events.

        Raises: OutputError: a checkpoint cannot be written.
        """
        course = self._course
        reason: Reason = "early stop" if course.out_of_patience else "done"
        planned = self.forward.plan is not None and self.forward.plan.optimizer_on_host
        if planned or self.config.optim == "adamw_offload":
            self._optimizer.move_moments_to_host()
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
                if not self._finite:
                    break
            yield from self._save()
        yield Ended(reason if self._finite else "diverged", self.progress, self._finite, self._saved_step)

    def _step(self) -> StepDone:
        started = time.perf_counter()
        step = self.progress.step
        set_rate(self._optimizer, self._course.rate)
        rows = self._course.next_rows()
        with torch.random.fork_rng(devices=_cuda_devices(self.forward)), _training_mode(self._trained_modules):
            torch.manual_seed(self.config.seed * 1_000_003 + step)  # dropout follows from (seed, step) alone
            result = self._run_step(rows)
            if step == 0 and not result.skipped:
                optimizer = self._optimizer
                self._unreached = tuple(path for path, p in self.parameters.items() if never_updated(optimizer, p))
        seconds = time.perf_counter() - started
        tokens = sum(len(row.tokens) for row in rows)
        return self._course.stepped(result, tokens, seconds, peak_memory_bytes(self.forward.model.device))

    def _run_step(self, rows: Sequence[Row]) -> StepResult:
        key = dropout_key(self.config.seed, self.progress.step)
        if self._graph is not None and self._graph.why_not is None:
            return self._graph(rows, self._course.next_rows(ahead=1), key=key)
        return train_step(
            self.forward,
            rows,
            list(self.parameters.values()),
            self._optimizer,
            max_grad_norm=self.config.max_grad_norm,
            objective=self._objective,
            # A document that runs alone has no position in the row, so torch's generator draws its dropout.
            key=key if self.forward.in_one_call else None,
        )

    def _evaluate(self) -> Evaluated:
        started = time.perf_counter()
        return self._course.evaluated(self._held_out(), time.perf_counter() - started)

    def _held_out(self) -> HeldOut:
        """Evaluates the held-out rows; frees the recordings first if memory does not suffice for both."""
        if self._graph is not None and self._evaluate_alone:
            self._graph.free_memory()
        try:
            return evaluate_loss(self.forward, self.rows.held_out, self._objective)
        except torch.OutOfMemoryError:
            if self._graph is None or self._evaluate_alone:
                raise
        self._evaluate_alone = True
        return self._held_out()

    def _save(self) -> Iterator[CheckpointSaved]:
        """Writes a checkpoint, unless there is one or the adapter is not finite."""
        if self._saved_step == self.progress.step:
            return
        self._finite = checkpoint.all_finite(self.parameters.values())
        if self.checkpoints is not None and self._finite:
            path = checkpoint.write(
                self.checkpoints,
                self.forward.model,
                self.adapter,
                self.parameters,
                self._optimizer,
                self.progress,
                self.run_id,
            )
            self._saved_step = self.progress.step
            yield CheckpointSaved(self.progress.step, path)


@contextmanager
def _training_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Turns dropout on in trained modules. The base stays in evaluation mode: its dropout would only add noise."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cuda_devices(forward: PackedForward) -> list[torch.device]:
    device = forward.model.device
    return [device] if device.type == "cuda" else []
