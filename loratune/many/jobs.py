"""Many training runs at once over one base: each job its own adapter, data, batch, rate and end; one row for all.

A job is a run in every respect but one: the frozen base computes for all of them together (`many.bank`,
`bank_step`). Its rows, their order, its rate, its evaluations, checkpoints and its end come from the same `Course`
that `loop` follows, so its result is that of the run alone up to the rounding of float32 sums, whoever else is there.

    queue      jobs wait in the order they came; one that ends leaves its slot to the next, without a reload
    fairness   a row is filled with the next micro-step of whichever job is furthest behind, counted in its own
               optimizer steps since it joined: all advance at the same pace, each at its own batch size, and none
               gets a whole step ahead to fill a gap
    failure    a job that diverges, cannot write its checkpoint or does not fit the model ends alone

Like the loop, this is a generator of events; jobs may be added between them.
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
from loratune.errors import LoratuneError
from loratune.lora.files import PREFIX, read_tensors
from loratune.many.bank import Bank
from loratune.many.graph import step_of
from loratune.many.step import MicroStep, trim
from loratune.ops.dropout import dropout_key
from loratune.training import checkpoint
from loratune.training.course import Course, Evaluated, Reason, Rows, StepDone
from loratune.training.loop import CheckpointSaved, Ended, peak_memory_bytes
from loratune.training.step import StepResult


@dataclass(frozen=True)
class Job:
    """One run to be trained among others."""

    name: str
    lora: LoraConfig
    training: TrainConfig
    rows: Rows
    checkpoints: Path | None = None
    """Folder for checkpoints, or None to keep none."""
    resume_from: Path | None = None
    """The checkpoint to go on from."""
    pause_at: int | None = None
    """Leave after this step, with a checkpoint, to be added again later."""


@dataclass(frozen=True, slots=True)
class Started:
    """A job has got a slot."""

    slot: int
    step: int
    """Steps done in an earlier life."""
    total_steps: int


@dataclass(frozen=True, slots=True)
class Paused:
    """A job has reached its `pause_at`, saved, and left."""

    step: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A job has ended by an error that is its own."""

    why: str


JobEvent = Started | StepDone | Evaluated | CheckpointSaved | Paused | Failed | Ended


@dataclass
class _Running:
    """A job in a slot."""

    job: Job
    slot: int
    course: Course
    joined_at: float
    """Pace of the slowest when it joined, in steps."""
    first_step: int
    parts: deque[MicroStep] = field(default_factory=deque)
    """What is left of the step."""
    following: list[MicroStep] = field(default_factory=list)
    """All parts of the next step, once somebody has looked ahead."""
    parts_of_step: int = 1
    taken: int = 0
    """Parts of the step that have been laid into rows."""
    tokens: int = 0
    seconds: float = 0.0
    saved_step: int | None = None

    @property
    def pace(self) -> float:
        """Steps since it joined, with the fraction of the one it is at, counted from where the others were then."""
        return _JobPosition.of_now(self).pace


@dataclass
class _JobPosition:
    """A job while a row is being filled, the one at hand or one that is only foreseen."""

    one: _Running
    steps: float
    """Done since it joined, counted from where the others were then."""
    taken: int
    """Parts of its step that are in rows, of so many."""
    of: int
    parts: deque[MicroStep]
    """Those that are left."""

    @classmethod
    def of_now(cls, one: _Running) -> _JobPosition:
        """Where a job is."""
        steps = one.joined_at + one.course.progress.step - one.first_step
        return cls(one, steps, one.taken, one.parts_of_step, one.parts)

    @property
    def pace(self) -> float:
        """Steps done, with the fraction of the one that is under way."""
        return self.steps + self.taken / self.of


class Jobs:
    """The jobs of one bank."""

    def __init__(
        self, forward: PackedForward, bank: Bank, tokens: int, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Takes a bank and a forward prepared after it was attached.

        Args:
            tokens: in one row of all jobs; at least as many as in a row of any job.
            stop: asked after every row; True saves every job and ends.

        Raises: ModelError: the model cannot run documents together.
        """
        self._forward, self._bank, self._stop = forward, bank, stop
        self._tokens = -(-tokens // bank.block) * bank.block
        self._step = step_of(forward, bank, tokens)
        self._queue: deque[Job] = deque()
        self._running: list[_Running] = []
        self._unwanted: set[str] = set()

    @property
    def why_not(self) -> str | None:
        """One line for the user if rows cannot be recorded as a CUDA graph and run slower for it."""
        return self._step.why_not

    @property
    def running(self) -> list[str]:
        """Names of the jobs in slots."""
        return [one.job.name for one in self._running]

    def add(self, job: Job) -> None:
        """Puts a job at the end of the queue; it starts as soon as a slot is free. May be called while others run."""
        self._queue.append(job)

    def remove(self, name: str) -> None:
        """Takes a running job out before the next row, without a word. May be called while others run."""
        self._unwanted.add(name)

    def run(self) -> Iterator[tuple[str, JobEvent]]:
        """Trains until no job is left, yielding each one's name with what happened to it.

        The model's attention is that of packed rows until then, so do not generate with it between events.
        """
        with self._forward.installed():
            while self._running or self._queue:
                yield from self._fill_slots()
                for one in [one for one in self._running if one.job.name in self._unwanted]:
                    self._leave(one)
                self._unwanted.clear()
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

    def _start(self, job: Job, slot: int) -> _Running:
        course = Course(job.rows, job.training)
        self._bank.place(slot, job.lora, job.training.seed)
        self._step.join(slot, job.training)
        if job.resume_from is not None:
            course.progress = checkpoint.read_progress(job.resume_from)
            parameters = self._bank.named(slot)
            tensors = read_tensors(job.resume_from)
            self._bank.load(slot, {path: tensors[f"{PREFIX}{path}.weight"] for path in parameters})
            moments = checkpoint.read_moments(job.resume_from, parameters, course.progress)
            self._step.restore(slot, moments, course.progress.optimizer_steps)
        pace = min((other.pace for other in self._running), default=0.0)
        step = course.progress.step
        one = _Running(job, slot, course, pace, step, saved_step=step if job.resume_from else None)
        self._running.append(one)
        return one

    def _train_row(self) -> Iterator[tuple[_Running, JobEvent]]:
        """One row of all jobs, and what follows for those whose step ends with it."""
        started = time.perf_counter()
        taken = self._fill_row()
        complete = [one for one in self._running if one.taken and not one.parts]
        rates = {one.slot: one.course.rate for one in complete}
        results = self._step.run([part for _, part in taken], rates, self._upcoming)
        seconds = (time.perf_counter() - started) / sum(len(part.row.tokens) for _, part in taken)
        for one, part in taken:
            one.tokens += len(part.row.tokens)
            one.seconds += seconds * len(part.row.tokens)  # a job's time is its share of the row's
        for one in complete:
            try:
                for event in self._after_step(one, results[one.slot]):
                    yield one, event
            except LoratuneError as error:
                self._leave(one)
                yield one, Failed(str(error))

    def _fill_row(self) -> list[tuple[_Running, MicroStep]]:
        """The next micro-steps of the jobs that are furthest behind, as many as fit."""
        for one in self._running:
            if not one.parts:
                _begin_step(one)
        taken = self._chosen([_JobPosition.of_now(one) for one in self._running])
        for one, _ in taken:
            one.taken += 1
        return taken

    def _upcoming(self) -> list[MicroStep]:
        """The parts of the next row, if every job goes on and none joins; empty if one has no next step."""
        turns = []
        for one in self._running:
            turn = _JobPosition.of_now(one)
            if one.parts:
                turn.parts = one.parts.copy()
            else:
                one.following = one.following or _parts_of(one, ahead=1)
                turn.steps, turn.taken, turn.of = turn.steps + 1, 0, len(one.following)
                turn.parts = deque(one.following)
            if not turn.parts:
                return []
            turns.append(turn)
        return [part for _, part in self._chosen(turns)]

    def _chosen(self, turns: Sequence[_JobPosition]) -> list[tuple[_Running, MicroStep]]:
        """Takes the parts of one row from `turns`, the furthest behind first."""
        room, taken = self._tokens, list[tuple[_Running, MicroStep]]()
        while True:
            ahead = min(turn.pace for turn in turns) + 1
            fitting = [turn for turn in turns if turn.parts and self._room_of(turn.parts[0]) <= room]
            if not fitting or min(turn.pace for turn in fitting) >= ahead:  # rather a gap than one that runs away
                return taken
            turn = min(fitting, key=lambda turn: turn.pace)  # the first of equals
            part = turn.parts.popleft()
            turn.taken += 1
            room -= self._room_of(part)
            taken.append((turn.one, part))

    def _room_of(self, part: MicroStep) -> int:
        block = self._bank.block
        return -(-len(part.row.tokens) // block) * block

    def _after_step(self, one: _Running, result: StepResult) -> Iterator[JobEvent]:
        """What `loop` does after a step."""
        course = one.course
        memory = peak_memory_bytes(self._forward.model.device)
        yield course.stepped(result, one.tokens, one.seconds, memory)
        one.taken, one.tokens, one.seconds = 0, 0, 0.0
        reason: Reason | None = "diverged" if course.diverged else None
        if reason is None and course.evaluation_due:
            evaluated = self._evaluate(one)
            yield evaluated
            if evaluated.best:
                yield from self._save(one)
        if reason is None and course.finished:
            reason = "early stop" if course.out_of_patience else "done"
        if reason is not None:
            yield from self._end(one, reason)
        elif course.progress.step == one.job.pause_at:
            yield from self._save(one)
            self._leave(one)
            yield Paused(course.progress.step)
        elif course.save_due:
            yield from self._save(one)

    def _evaluate(self, one: _Running) -> Evaluated:
        started = time.perf_counter()
        held_out = [trim(row) for row in one.course.rows.held_out]
        total, weight = 0.0, sum(float(row.weights.sum()) for row in held_out)
        room, parts = 0, list[MicroStep]()
        for row in held_out:
            part = MicroStep(one.slot, row, 1.0, None, 0)
            if parts and room < self._room_of(part):
                total += self._step.evaluate(parts)
                parts = []
            room = (room if parts else self._tokens) - self._room_of(part)
            parts.append(part)
        total += self._step.evaluate(parts)
        return one.course.evaluated(total / weight if weight else float("nan"), time.perf_counter() - started)

    def _end(self, one: _Running, reason: Reason) -> Iterator[JobEvent]:
        yield from self._save(one)
        self._leave(one)
        yield Ended(reason, one.course.progress)

    def _leave(self, one: _Running) -> None:
        self._running.remove(one)
        self._step.leave(one.slot)

    def _save(self, one: _Running) -> Iterator[CheckpointSaved]:
        folder, progress = one.job.checkpoints, one.course.progress
        if folder is None or one.saved_step == progress.step:
            return
        moments = self._step.moments(one.slot)
        path = checkpoint.write_parts(
            folder, lambda place: self._bank.save(one.slot, place, overwrite=True), moments, progress
        )
        one.saved_step = progress.step
        yield CheckpointSaved(progress.step, path)


def _begin_step(one: _Running) -> None:
    """Hands out the micro-steps of a job's next optimizer step."""
    one.parts = deque(one.following or _parts_of(one))
    one.following, one.parts_of_step = [], len(one.parts)


def _parts_of(one: _Running, ahead: int = 0) -> list[MicroStep]:
    """The micro-steps of the next optimizer step, or of one `ahead` of it; none after the last."""
    rows: Sequence[Row] = one.course.next_rows(ahead)
    normaliser = sum(float(row.weights.sum()) for row in rows)
    training, dropout = one.job.training, one.job.lora.lora_dropout
    key = dropout_key(training.seed, one.course.progress.step + ahead) if dropout else None
    starts = [sum(len(row.tokens) for row in rows[:n]) for n in range(len(rows))]
    return [MicroStep(one.slot, trim(row), normaliser, key, start) for row, start in zip(rows, starts, strict=True)]


def row_tokens(jobs: Sequence[Job]) -> int:
    """Tokens in the longest row of any job."""
    return max(len(job.rows.of_epoch(0)[0].tokens) for job in jobs)
