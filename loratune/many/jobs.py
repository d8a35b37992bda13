"""Many training runs at once over one base: each job has its own adapter, data, batch, rate and end; rows are shared.

A job differs from a run in one respect: the frozen base computes for all jobs together (`many.bank`, `many.step`).
Its rows, rates, evaluations, checkpoints and end come from the same `Course` that `training.loop` follows. So its
result equals the result of the run alone, up to the rounding of float32 sums, independent of the other jobs.

    queue      jobs wait in order of arrival; a job that ends leaves its slot to the next one, without a reload
    fairness   a row is filled with micro-steps of the job that is furthest behind, counted in its own optimizer steps
               since it joined. So all jobs advance at the same pace. A gap in a row is padded rather than filled with
               a job that would get a whole step ahead
    failure    a job that diverges, cannot write its checkpoint or does not fit the model ends alone

Like the loop, this is a generator of events. Jobs may be added between events.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratune.base.forward import PackedForward
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import Row
from loratune.errors import ConfigError, LoratuneError
from loratune.lora.files import read_tensors
from loratune.lora.peft_keys import PREFIX
from loratune.many.bank import Bank
from loratune.many.graph import step_of
from loratune.many.step import MicroStep, trim
from loratune.ops.dropout import dropout_key
from loratune.training import checkpoint
from loratune.training.course import Course, Evaluated, Reason, Rows, StepDone
from loratune.training.loop import CheckpointSaved, Ended, peak_memory_bytes
from loratune.training.objectives import objective_named
from loratune.training.objectives.objective import Objective
from loratune.training.objectives.sft import sft
from loratune.training.step import HeldOutSums, StepResult


@dataclass(frozen=True)
class Job:
    """One training run that shares rows with others."""

    name: str
    lora: LoraConfig
    training: TrainConfig
    rows: Rows
    checkpoints: Path | None = None
    """Folder for checkpoints; None writes none."""
    resume_from: Path | None = None
    """Checkpoint to continue from."""
    pause_at: int | None = None
    """Step after which the job saves and leaves, to be added again later; None for no pause."""
    run_id: str = ""
    """Of the run, for the checkpoints' manifests."""


@dataclass(frozen=True, slots=True)
class Started:
    """A job has got a slot."""

    slot: int
    step: int
    """Steps done before it was resumed."""
    total_steps: int


@dataclass(frozen=True, slots=True)
class Paused:
    """A job has reached its `pause_at`, saved, and left."""

    step: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A job has ended with an error that does not affect the others."""

    why: str


JobEvent = Started | StepDone | Evaluated | CheckpointSaved | Paused | Failed | Ended


@dataclass
class _RunningJob:
    """A job in a slot."""

    job: Job
    slot: int
    course: Course
    joined_at: float
    """Pace of the slowest job when this one joined, in steps."""
    first_step: int
    remaining: deque[MicroStep] = field(default_factory=deque)
    """Micro-steps of the current step that are not in a row yet."""
    following: list[MicroStep] = field(default_factory=list)
    """All micro-steps of the next step, once they have been looked up."""
    of_step: int = 1
    """Micro-steps of the current step."""
    placed: int = 0
    """Micro-steps of the current step that are in rows."""
    tokens: int = 0
    seconds: float = 0.0
    saved_step: int | None = None
    finite: bool = True
    """False once the adapter has infinite or NaN values."""

    @property
    def pace(self) -> float:
        """Steps done since it joined, plus the pace of the others at that time; see `_JobPosition.pace`."""
        return _JobPosition.current(self).pace


@dataclass
class _JobPosition:
    """Progress of a job while a row is filled: the current row, or a predicted one."""

    job: _RunningJob
    steps: float
    """Steps done since it joined, plus the pace of the others at that time."""
    placed: int
    of_step: int
    remaining: deque[MicroStep]

    @classmethod
    def current(cls, job: _RunningJob) -> _JobPosition:
        """The position of a job now."""
        steps = job.joined_at + job.course.progress.step - job.first_step
        return cls(job, steps, job.placed, job.of_step, job.remaining)

    @property
    def pace(self) -> float:
        """Steps done, including the fraction of the current one."""
        return self.steps + self.placed / self.of_step


class Jobs:
    """The jobs of one bank."""

    def __init__(
        self,
        forward: PackedForward,
        bank: Bank,
        tokens: int,
        stop: Callable[[], bool] = lambda: False,
        objective: Objective = sft,
    ) -> None:
        """Prepares the step of a bank.

        Args:
            forward: prepared after the bank was attached.
            tokens: tokens in one shared row, at least as many as in a row of any job.
            stop: called after every row; True saves every job and ends.
            objective: objective of all jobs.

        Raises: ModelError: the model cannot run documents together.
        """
        self._forward, self._bank, self._stop, self._objective = forward, bank, stop, objective
        self._tokens = -(-tokens // bank.block) * bank.block
        self._step = step_of(forward, bank, tokens, objective)
        self._queue: deque[Job] = deque()
        self._running: list[_RunningJob] = []
        self._removed: set[str] = set()

    @property
    def why_not(self) -> str | None:
        """One line for the user if rows cannot be recorded as a CUDA graph, which makes them slower."""
        return self._step.why_not

    @property
    def running(self) -> list[str]:
        """Names of the jobs in slots."""
        return [one.job.name for one in self._running]

    def add(self, job: Job) -> None:
        """Appends a job to the queue; it starts once a slot is free. May be called while others run."""
        self._queue.append(job)

    def remove(self, name: str) -> None:
        """Removes a running job before the next row, without an event. May be called while others run."""
        self._removed.add(name)

    def run(self) -> Iterator[tuple[str, JobEvent]]:
        """Trains until no job is left; yields (name of the job, event).

        The model's attention is set up for packed rows until then, so do not generate with it between events.
        """
        with self._forward.installed():
            while self._running or self._queue:
                yield from self._fill_slots()
                for one in [one for one in self._running if one.job.name in self._removed]:
                    self._leave(one)
                self._removed.clear()
                if not self._running:
                    continue
                for one, event in self._train_row():
                    yield one.job.name, event
                if self._stop():
                    for one in list(self._running):
                        for event in self._end(one, "interrupted"):
                            yield one.job.name, event
                    self._queue.clear()

    def _fill_slots(self) -> Iterator[tuple[str, JobEvent]]:
        for slot in self._bank.free():
            if not self._queue:
                return
            job = self._queue.popleft()
            try:
                one = self._start(job, slot)
            except LoratuneError as error:
                self._step.leave(slot)
                yield job.name, Failed(str(error))
                continue
            yield job.name, Started(slot, one.course.progress.step, one.course.total_steps)
            if one.course.finished:
                reason: Reason = "early stop" if one.course.out_of_patience else "done"
                for event in self._end(one, reason):
                    yield job.name, event

    def _start(self, job: Job, slot: int) -> _RunningJob:
        if objective_named(job.training.objective) != self._objective:
            raise ConfigError(f"objective {job.training.objective}: all jobs of a bank share one objective")
        course = Course(job.rows, job.training)
        self._bank.place(slot, job.lora, job.training.seed)
        self._step.join(slot, job.training)
        if job.resume_from is not None:
            course.progress = checkpoint.resumed_progress(job.resume_from, job.run_id)
            parameters = self._bank.named(slot)
            tensors = read_tensors(job.resume_from)
            self._bank.load(slot, {path: tensors[f"{PREFIX}{path}.weight"] for path in parameters})
            moments = checkpoint.read_moments(job.resume_from, parameters, course.progress)
            self._step.restore(slot, moments, course.progress.optimizer_steps)
        pace = min((other.pace for other in self._running), default=0.0)
        step = course.progress.step
        one = _RunningJob(job, slot, course, pace, step, saved_step=step if job.resume_from else None)
        self._running.append(one)
        return one

    def _train_row(self) -> Iterator[tuple[_RunningJob, JobEvent]]:
        """Trains one shared row, then handles the jobs whose step ends with it."""
        started = time.perf_counter()
        chosen = self._fill_row()
        complete = [one for one in self._running if one.placed and not one.remaining]
        rates = {one.slot: one.course.rate for one in complete}
        results = self._step.run([micro_step for _, micro_step in chosen], rates, self._upcoming)
        seconds = (time.perf_counter() - started) / sum(len(micro_step.row.tokens) for _, micro_step in chosen)
        for one, micro_step in chosen:
            one.tokens += len(micro_step.row.tokens)
            one.seconds += seconds * len(micro_step.row.tokens)  # a job's share of the row's time
        for one in complete:
            try:
                for event in self._after_step(one, results[one.slot]):
                    yield one, event
            except LoratuneError as error:
                self._leave(one)
                yield one, Failed(str(error))

    def _fill_row(self) -> list[tuple[_RunningJob, MicroStep]]:
        """The next micro-steps of the jobs that are furthest behind, as many as fit."""
        for one in self._running:
            if not one.remaining:
                one.remaining = deque(one.following or self._micro_steps_of(one))
                one.following, one.of_step = [], len(one.remaining)
        chosen = self._choose([_JobPosition.current(one) for one in self._running])
        for one, _ in chosen:
            one.placed += 1
        return chosen

    def _upcoming(self) -> list[MicroStep]:
        """The next row, if every job continues and none joins; empty if a job has no next step."""
        positions = []
        for one in self._running:
            position = _JobPosition.current(one)
            if one.remaining:
                position.remaining = one.remaining.copy()
            else:
                one.following = one.following or self._micro_steps_of(one, ahead=1)
                position.steps, position.placed, position.of_step = position.steps + 1, 0, len(one.following)
                position.remaining = deque(one.following)
            if not position.remaining:
                return []
            positions.append(position)
        return [micro_step for _, micro_step in self._choose(positions)]

    def _choose(self, positions: Sequence[_JobPosition]) -> list[tuple[_RunningJob, MicroStep]]:
        """Takes the micro-steps of one row from `positions`, furthest behind first."""
        free, chosen = self._tokens, list[tuple[_RunningJob, MicroStep]]()
        while True:
            limit = min(position.pace for position in positions) + 1
            fitting = [p for p in positions if p.remaining and self._tokens_of(p.remaining[0]) <= free]
            if not fitting or min(position.pace for position in fitting) >= limit:
                return chosen  # a gap is better than a job that runs ahead
            position = min(fitting, key=lambda position: position.pace)  # the first of equals
            micro_step = position.remaining.popleft()
            position.placed += 1
            free -= self._tokens_of(micro_step)
            chosen.append((position.job, micro_step))

    def _tokens_of(self, micro_step: MicroStep) -> int:
        """Tokens of a shared row that a micro-step occupies."""
        block = self._bank.block
        return -(-len(micro_step.row.tokens) // block) * block

    def _micro_steps_of(self, one: _RunningJob, ahead: int = 0) -> list[MicroStep]:
        """The micro-steps of the next optimizer step, or of the step `ahead` steps later; empty after the last."""
        rows: Sequence[Row] = one.course.next_rows(ahead)
        normaliser = sum(map(self._objective.normaliser, rows))
        training, dropout = one.job.training, one.job.lora.lora_dropout
        key = dropout_key(training.seed, one.course.progress.step + ahead) if dropout else None
        starts = [sum(len(row.tokens) for row in rows[:n]) for n in range(len(rows))]
        parts = zip(rows, starts, strict=True)
        return [MicroStep(one.slot, trim(row), normaliser, key, start) for row, start in parts]

    def _after_step(self, one: _RunningJob, result: StepResult) -> Iterator[JobEvent]:
        """Reports, evaluates, saves and ends like `training.loop` after a step."""
        course = one.course
        memory = peak_memory_bytes(self._forward.model.device)
        yield course.stepped(result, one.tokens, one.seconds, memory)
        one.placed, one.tokens, one.seconds = 0, 0, 0.0
        reason: Reason | None = "diverged" if course.diverged else None
        if reason is None and course.evaluation_due:
            evaluated = self._evaluate(one)
            yield evaluated
            if evaluated.best:
                yield from self._save(one)
        if not one.finite:
            reason = "diverged"
        if reason is None and course.finished:
            reason = "early stop" if course.out_of_patience else "done"
        if reason is not None:
            yield from self._end(one, reason)
        elif course.progress.step == one.job.pause_at:
            yield from self._save(one)
            if not one.finite:
                yield from self._end(one, "diverged")
                return
            self._leave(one)
            yield Paused(course.progress.step)
        elif course.save_due:
            yield from self._save(one)
            if not one.finite:
                yield from self._end(one, "diverged")

    def _evaluate(self, one: _RunningJob) -> Evaluated:
        """Measures a job's held-out rows, several in one shared row."""
        started = time.perf_counter()
        sums, free, batch = HeldOutSums(self._objective), 0, list[MicroStep]()
        for row in map(trim, one.course.rows.held_out):
            micro_step = MicroStep(one.slot, row, 1.0, None, 0)
            if batch and free < self._tokens_of(micro_step):
                sums.add([other.row for other in batch], self._step.evaluate(batch))
                batch = []
            free = (free if batch else self._tokens) - self._tokens_of(micro_step)
            batch.append(micro_step)
        sums.add([other.row for other in batch], self._step.evaluate(batch))
        return one.course.evaluated(sums.mean(), time.perf_counter() - started)

    def _end(self, one: _RunningJob, reason: Reason) -> Iterator[JobEvent]:
        yield from self._save(one)
        self._leave(one)
        yield Ended(reason if one.finite else "diverged", one.course.progress, one.finite, one.saved_step)

    def _leave(self, one: _RunningJob) -> None:
        self._running.remove(one)
        self._step.leave(one.slot)

    def _save(self, one: _RunningJob) -> Iterator[CheckpointSaved]:
        """Writes a checkpoint, unless there is one or the adapter is not finite."""
        folder, progress = one.job.checkpoints, one.course.progress
        if folder is None or one.saved_step == progress.step:
            return
        one.finite = checkpoint.all_finite(self._bank.named(one.slot).values())
        if not one.finite:
            return
        moments = self._step.moments(one.slot)
        path = checkpoint.write_parts(
            folder,
            lambda place: self._bank.save(one.slot, place, overwrite=True),
            moments,
            progress,
            one.job.run_id,
        )
        one.saved_step = progress.step
        yield CheckpointSaved(progress.step, path)
