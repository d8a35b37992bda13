"""The course of one run: the rows and rate of each step, when to evaluate and to save, when and why the run ends.

Nothing here computes with tensors. `training.loop` follows one course with one adapter; `many.jobs` follows many
courses at once over one base. So a job takes the same steps in a sweep as alone. All decisions follow from the
settings, the seed and `Progress`, and `Progress` is the only state that a checkpoint needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from loratune.config import TrainConfig
from loratune.data.pack import Row
from loratune.training.checkpoint import Progress
from loratune.training.optim import learning_rate
from loratune.training.step import HeldOut, StepResult

MAX_SKIPPED_IN_A_ROW = 3
"""Consecutive steps with a non-finite loss or gradient after which a run ends."""

Reason = Literal["done", "early stop", "interrupted", "diverged", "dropped"]
"""Reason for the end of a run. "dropped": successive halving ended the job of a sweep."""


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
    """Trained tokens since the start of the run."""
    tokens: int
    """Tokens of this step's rows, trained or not."""
    tokens_per_second: float
    """`tokens` divided by the seconds of this step."""
    memory_bytes: int
    """Peak so far: allocated on the GPU, or resident in the process on a CPU."""
    skipped: bool


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out rows were evaluated after `step` steps."""

    step: int
    eval_loss: float
    best: bool
    """True for the lowest finite loss so far."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The objective's metrics; empty for SFT."""


@dataclass(frozen=True)
class Rows:
    """Rows of a run: training rows by epoch, and held-out rows."""

    of_epoch: Callable[[int], Sequence[Row]]
    """Epoch, from 0 -> its rows in order; every epoch has the same number of rows."""
    held_out: Sequence[Row]


@dataclass
class Course:
    """Schedule and progress of one run."""

    rows: Rows
    config: TrainConfig
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._epoch, self._epoch_rows = 0, self.rows.of_epoch(0)
        self._last_rows: tuple[int, list[Row]] = -1, []
        self.rows_per_epoch = len(self._epoch_rows)
        accumulation = self.config.rows_per_step
        by_epochs = math.ceil(self.rows_per_epoch * self.config.passes / accumulation)
        self.total_steps = self.config.max_steps or by_epochs
        self.total_rows = (
            self.total_steps * accumulation if self.config.max_steps else self.rows_per_epoch * self.config.passes
        )
        self.eval_every = self.config.eval_every_steps or max(1, math.ceil(self.total_steps / 10))
        self.save_every = self.config.save_every_steps or self.eval_every

    @property
    def last(self) -> bool:
        """True after the last step."""
        return self.progress.step >= self.total_steps

    @property
    def out_of_patience(self) -> bool:
        """True if as many evaluations as the settings allow have passed without a lower held-out loss."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    @property
    def diverged(self) -> bool:
        """True if the loss or gradient was not finite in `MAX_SKIPPED_IN_A_ROW` consecutive steps."""
        return self.progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    @property
    def finished(self) -> bool:
        """True if no step remains."""
        return self.last or self.out_of_patience

    @property
    def evaluation_due(self) -> bool:
        """True if an evaluation follows the last finished step."""
        return bool(self.rows.held_out) and (self.last or self.progress.step % self.eval_every == 0)

    @property
    def save_due(self) -> bool:
        """True if a checkpoint follows the last finished step even without an evaluation."""
        return not self.last and self.progress.step % self.save_every == 0

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.progress.step, self.total_steps, self.config)

    def next_rows(self, ahead: int = 0) -> list[Row]:
        """The micro-steps of the next step, or of the step `ahead` steps later; empty after the last step."""
        accumulation, step = self.config.rows_per_step, self.progress.step + ahead
        if self._last_rows[0] == step:
            return self._last_rows[1]
        rows: list[Row] = []
        for n in range(step * accumulation, min((step + 1) * accumulation, self.total_rows)):
            epoch, index = divmod(n, self.rows_per_epoch)
            if epoch != self._epoch:
                self._epoch, self._epoch_rows = epoch, self.rows.of_epoch(epoch)
            rows.append(self._epoch_rows[index])
        self._last_rows = step, rows
        return rows

    def stepped(self, result: StepResult, tokens: int, seconds: float, memory_bytes: int) -> StepDone:
        """Counts a finished step.

        Args:
            tokens: tokens in the rows of the step.
            seconds: duration of the step.
        """
        rate, progress = self.rate, self.progress
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
        progress.step += 1
        progress.skipped_steps += result.skipped
        progress.optimizer_steps += not result.skipped
        progress.trained_tokens += result.trained_tokens
        progress.seconds += seconds
        return StepDone(
            step=progress.step,
            total_steps=self.total_steps,
            epoch=min(progress.step * self.config.rows_per_step, self.total_rows) / self.rows_per_epoch,
            loss=result.loss,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            trained_tokens=progress.trained_tokens,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            memory_bytes=memory_bytes,
            skipped=result.skipped,
        )

    def evaluated(self, held_out: HeldOut, seconds: float) -> Evaluated:
        """Counts an evaluation after the last finished step. A loss that is not finite is never the best."""
        progress, loss = self.progress, held_out.loss
        before = progress.best_eval_loss
        best = math.isfinite(loss) and (before is None or not math.isfinite(before) or loss < before)
        if best:
            progress.best_step, progress.best_eval_loss = progress.step, loss
        progress.evaluations_without_gain = 0 if best else progress.evaluations_without_gain + 1
        progress.seconds += seconds
        return Evaluated(progress.step, loss, best, held_out.metrics)
