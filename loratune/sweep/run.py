"""A sweep: trains the jobs of a plan over one base, compares them, and writes an ordinary run folder for each.

Like `runs.run`, it checks everything before the first step, cheapest first: jobs file, output, tokenizers, data,
model, adapters. A job's folder equals the folder of a run, so every other command works on it. As many jobs train at
once as fit into memory; the others wait in a queue.

With successive halving, a job that reaches a rung saves a checkpoint and leaves its slot. Once all jobs have reached
the rung, the better share continues and the others end. So the ranking does not depend on the number of jobs at once,
nor on interruptions of the sweep.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from loratune import atomic, lock
from loratune.base import identity
from loratune.base import load as base
from loratune.base.forward import PackedForward
from loratune.base.forward import prepare as prepare_forward
from loratune.base.identity import BaseIdentity, RunIdentity
from loratune.errors import AdapterError, ConfigError, LoratuneError
from loratune.lora.files import WEIGHTS_FILE, read_info
from loratune.lora.peft_config import CONFIG_FILE
from loratune.many.bank import Bank
from loratune.many.capacity import row_tokens, slots_that_fit
from loratune.many.jobs import Failed, Job, JobEvent, Jobs, Paused, Started
from loratune.many.step import check_training
from loratune.runs import folder, metrics, resume, trackers
from loratune.runs.run import Note
from loratune.sweep import folder as sweep_folder
from loratune.sweep.folder import Standing, SweepState
from loratune.sweep.jobs_data import JobData, read_data
from loratune.sweep.plan import PlannedJob, SweepPlan
from loratune.training import checkpoint
from loratune.training.course import Course
from loratune.training.loop import Ended, peak_memory_bytes
from loratune.training.objectives import objective_named


@dataclass(frozen=True, slots=True)
class Ready:
    """All checks have passed; the first step follows."""

    jobs: tuple[PlannedJob, ...]
    total_steps: tuple[int, ...]
    ended: dict[str, str]
    """Jobs that ended before the sweep was resumed -> reason."""
    slots: int
    row_tokens: int
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class RungDone:
    """All jobs have reached a rung of successive halving and were compared."""

    share: float
    kept: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Results of a sweep."""

    standings: tuple[Standing, ...]
    """Best first."""
    out: Path
    complete: bool
    seconds: float
    """Duration of this process."""
    tokens: int
    """Tokens trained by this process."""
    peak_memory_bytes: int


SweepEvent = Note | Ready | tuple[str, JobEvent] | RungDone | SweepResult


def sweep(
    plan: SweepPlan,
    jobs_text: str,
    out: str,
    *,
    at_once: int | None = None,
    overwrite: bool = False,
    resumed: bool = False,
    stop: Callable[[], bool] = lambda: False,
    cache_dir: str | None = None,
) -> Iterator[SweepEvent]:
    """Trains the jobs of `plan` into `out`; the last event is a `SweepResult`.

    Args:
        jobs_text: the jobs file, which is saved with the results.
        at_once: number of jobs in memory at once; None takes as many as fit.
        resumed: continue the sweep in `out`; the plan may have new jobs.
        stop: called after every row; True saves every job and ends.
        cache_dir: folder for rendered data, None for no cache.

    Raises: LoratuneError: an error that the user can fix, before the first step.
    """
    started, where = time.perf_counter(), Path(out)
    if not where.is_dir():
        _state(plan, where, overwrite=overwrite, resumed=resumed)
    with lock.hold(where):
        atomic.remove_leftovers(where)
        state = _state(plan, where, overwrite=overwrite, resumed=resumed)
        first = plan.jobs[0].config
        for job in plan.jobs:
            trackers.require(job.config.training.log_to)
            check_training(job.config.training)
        data, notes = read_data(plan.jobs, state.date, cache_dir)
        plan = replace(plan, jobs=tuple(replace(job, config=data[job.name].config) for job in plan.jobs))
        yield from map(Note, notes)
        going = [job for job in plan.jobs if job.name not in state.ended]
        model = base.load(first.model, first.precision, first.device, trust_remote_code=first.trust_remote_code)
        sweeping = _SweepRun(plan, data, state, where, model, going, stop, identity.describe(first.model))
        bank, forward = _bank(model, going, at_once) if going else (None, None)
        if not resumed:
            sweep_folder.clear(where)
        sweep_folder.begin(where, state, jobs_text)
        if bank is not None and forward is not None:
            yield from map(Note, forward.notes)
            yield from sweeping.train(bank, forward)
        standings = tuple(sweep_folder.ranked([sweeping.standing(job) for job in plan.jobs]))
        complete = all(job.name in state.ended for job in plan.jobs)
        if complete:
            sweep_folder.write_results(where, standings, first.model)
        seconds, memory = time.perf_counter() - started, peak_memory_bytes(model.device)
        yield SweepResult(standings, where, complete, seconds, sweeping.tokens, memory)


class _SweepRun:
    """State of a running sweep."""

    def __init__(
        self,
        plan: SweepPlan,
        data: dict[str, JobData],
        state: SweepState,
        out: Path,
        model: PreTrainedModel,
        going: Sequence[PlannedJob],
        stop: Callable[[], bool],
        described: BaseIdentity,
    ) -> None:
        self._plan, self._data, self._state, self._out, self._model = plan, data, state, out, model
        self._base, self._identities = described, dict[str, RunIdentity]()
        self._notes: list[str] = []
        self._going = {job.name: job for job in going}
        self._stop = stop
        self._recorders: dict[str, folder.Recorder] = {}
        self._waiting: set[str] = set()
        self.tokens = 0

    def train(self, bank: Bank, forward: PackedForward) -> Iterator[SweepEvent]:
        """Trains every job to its end, or until `stop` returns True."""
        jobs = [self._job(job) for job in self._going.values()]
        yield from self._new_notes()
        tokens = _row_tokens(self._model, self._going.values())
        objective = objective_named(self._plan.jobs[0].config.training.objective)
        pool = Jobs(forward, bank, tokens, self._stop, objective)
        yield Ready(
            self._plan.jobs,
            tuple(self._data[job.name].course.total_steps for job in self._plan.jobs),
            dict(self._state.ended),
            bank.slots,
            tokens,
            str(self._model.device),
            str(self._model.dtype).removeprefix("torch."),
        )
        for job in jobs:
            if self._is_waiting(job):
                self._waiting.add(job.name)
            else:
                pool.add(job)
        yield from self._compare(pool)  # all jobs may have been waiting when the sweep was killed
        noted = False
        for name, event in pool.run():
            if pool.why_not is not None and not noted:
                noted = True
                yield Note(pool.why_not)
            if name in self._state.ended:  # it failed here, and the pool has not removed it yet
                continue
            seen = self._take(name, event)
            if isinstance(seen, Failed):
                pool.remove(name)
            yield name, seen
            yield from self._new_notes()
            if isinstance(seen, Paused | Ended | Failed):
                yield from self._compare(pool)

    def _new_notes(self) -> Iterator[Note]:
        yield from map(Note, self._notes)
        self._notes.clear()

    def standing(self, planned: PlannedJob) -> Standing:
        """A job's line of the ranking, from its folder."""
        lines = metrics.read(self._out / planned.name / "metrics.jsonl")
        losses = [m for m in lines if m.get("loss") is not None]
        measured = [(m["eval_loss"], m["step"]) for m in lines if m.get("eval_loss") is not None]
        best = min((pair for pair in measured if math.isfinite(pair[0])), default=(None, None))
        return Standing(
            name=planned.name,
            settings=dict(planned.varied),
            state=self._state.ended.get(planned.name, "interrupted"),
            step=max((m["step"] for m in losses), default=0),
            total_steps=self._data[planned.name].course.total_steps,
            loss=next((m["loss"] for m in reversed(losses) if not m.get("skipped")), None),
            eval_loss=best[0],
            best_step=best[1],
        )

    def _job(self, planned: PlannedJob) -> Job:
        out, data = self._out / planned.name, self._data[planned.name]
        newest = self._resumable(planned)
        training = planned.config.training
        return Job(
            planned.name,
            planned.config.lora,
            training,
            data.rows,
            out / "checkpoints",
            newest,
            self._rung_step(data.course, len(self._state.meetings)),
            self._identities[planned.name].run,
        )

    def _resumable(self, planned: PlannedJob) -> Path | None:
        """The checkpoint from which a job continues; None for a job that starts."""
        out, data = self._out / planned.name, self._data[planned.name]
        faults: list[str] = []
        if checkpoint.newest(out / "checkpoints") is not None:
            known = resume.identity_of(out, planned.config.model)
            newest, faults = checkpoint.newest_intact(out / "checkpoints", known.run)
            if newest is not None:
                found = resume.find_run(replace(planned.config, resume=True))
                resume.check_base(out, found.identity, self._base)
                resume.check_data(out, data.dataset)
                self._notes += found.notes
                self._identities[planned.name] = identity.of_run(
                    self._base, data.tokenizer, data.dataset.file_hashes, found.identity
                )
                return newest
        self._notes += [f"{fault}; the job starts again" for fault in faults[:1]]
        new = identity.of_run(self._base, data.tokenizer, data.dataset.file_hashes)
        self._identities[planned.name] = new
        return None

    def _take(self, name: str, event: JobEvent) -> JobEvent:
        """Records an event of a job. An error in its folder fails this job alone."""
        try:
            self._record(name, event)
        except (LoratuneError, OSError) as error:
            event = Failed(str(error))
        if isinstance(event, Failed):
            self._ended(name, f"failed: {event.why}")
        return event

    def _record(self, name: str, event: JobEvent) -> None:
        planned = self._going[name]
        match event:
            case Started(step=step):
                if name not in self._recorders:  # it may have continued after a rung
                    self._recorders[name] = self._recorder(planned, step)
            case Paused():
                self._waiting.add(name)
            case Failed():
                pass
            case _:
                self._recorders[name].record(event)
                self.tokens += getattr(event, "tokens", 0)
                if isinstance(event, Ended):
                    self._finish(name, event)

    def _finish(self, name: str, ended: Ended) -> None:
        """Copies the best adapter to the top of a job's folder and writes the model card, like a run."""
        out, planned = self._out / name, self._going[name]
        recorder = self._recorders.pop(name)
        if recorder.unusable:
            self._ended(name, ended.reason)
            return
        self._notes += [f"{name}: {note}" for note in recorder.forget_lost_best(self._identities[name].run)]
        result = recorder.result(self._model.device)
        kept = checkpoint.at_step(out / "checkpoints", result.kept_step)
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            atomic.write_bytes(out / file, (kept / file).read_bytes())
        info = read_info(out)
        folder.describe(
            planned.config,
            self._data[name].dataset,
            result,
            info.config,
            info.parameters,
            self._model.device,
            self._identities[name].run,
        )
        if ended.reason != "interrupted":
            self._ended(name, ended.reason)

    def _ended(self, name: str, why: str) -> None:
        self._state.ended[name] = why
        sweep_folder.write_state(self._out, self._state)

    def _is_waiting(self, job: Job) -> bool:
        if job.pause_at is None or job.resume_from is None:
            return False
        return checkpoint.read_progress(job.resume_from).step == job.pause_at

    def _rung_step(self, course: Course, number: int) -> int | None:
        """The step at which a job reaches rung `number`: its share of the steps, rounded up to an evaluation."""
        if self._plan.halving is None or number >= len(self._plan.halving.at):
            return None
        step = math.ceil(self._plan.halving.at[number] * course.total_steps / course.eval_every) * course.eval_every
        return step if step < course.total_steps else None

    def _compare(self, pool: Jobs) -> Iterator[SweepEvent]:
        """Compares the jobs once all that still train have reached the rung."""
        left = {name for name in self._going if name not in self._state.ended}
        if not self._waiting or left != self._waiting or self._stop():
            return
        meetings, halving = self._state.meetings, self._plan.halving
        assert halving is not None
        before = len(meetings[-1]["kept"]) if meetings else len(self._plan.jobs)
        losses = {name: self._last_eval_loss(name) for name in self._going if name in self._waiting}
        order = sorted(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
        keep = math.ceil(halving.keep * before)
        kept, dropped = order[:keep], order[keep:]
        for name in dropped:  # before the decision is saved: an interrupted comparison is repeated
            self._drop(name)
        meetings.append({"share": halving.at[len(meetings)], "losses": losses, "kept": kept})
        sweep_folder.write_state(self._out, self._state)
        self._waiting.clear()
        for name in kept:
            pool.add(self._job(self._going[name]))
        yield RungDone(meetings[-1]["share"], tuple(kept), tuple(dropped))

    def _drop(self, name: str) -> None:
        newest = checkpoint.newest(self._out / name / "checkpoints")
        assert newest is not None
        progress = checkpoint.read_progress(newest)
        if name not in self._recorders:
            self._recorders[name] = self._recorder(self._going[name], progress.step)
        ended = Ended("dropped", progress)
        self._recorders[name].record(ended)
        self._finish(name, ended)

    def _recorder(self, planned: PlannedJob, step: int) -> folder.Recorder:
        data = self._data[planned.name]
        return folder.Recorder(
            planned.config,
            self._out / planned.name,
            data.dataset,
            step or None,
            lambda out: identity.write(out, self._identities[planned.name], data.tokenizer),
        )

    def _last_eval_loss(self, name: str) -> float:
        lines = metrics.read(self._out / name / "metrics.jsonl")
        last = next((m["eval_loss"] for m in reversed(lines) if "eval_loss" in m), None)
        return math.inf if last is None else float(last)


def _bank(model: PreTrainedModel, going: Sequence[PlannedJob], at_once: int | None) -> tuple[Bank, PackedForward]:
    """Attaches a bank with slots for the remaining jobs."""
    sizes = []
    for job in going:
        try:
            sizes.append(Bank.size_of(model, job.config.lora))
        except AdapterError as error:
            raise AdapterError(f'job "{job.name}": {error}') from error
    fitting = slots_that_fit(model, sizes, _row_tokens(model, going))
    bank = Bank.attach(model, [job.config.lora for job in going], min(len(going), at_once or fitting))
    longest = max(job.config.dataset.row_tokens for job in going)
    return bank, prepare_forward(model, longest)


def _row_tokens(model: PreTrainedModel, jobs: Iterable[PlannedJob]) -> int:
    return row_tokens(model.device, [job.config.dataset.row_tokens for job in jobs])


def _state(plan: SweepPlan, out: Path, *, overwrite: bool, resumed: bool) -> SweepState:
    """The initial state: empty, or the state of the resumed sweep, whose base must be the same."""
    first = plan.jobs[0].config
    if not resumed:
        sweep_folder.check_output(out, overwrite=overwrite)
        return SweepState(first.model, first.precision, first.device)
    state = sweep_folder.read_state(out)
    for setting, before, now in (
        ("model", state.model, first.model),
        ("precision", state.precision, first.precision),
    ):
        if before != now and not (setting == "model" and Path(before).resolve() == Path(now).resolve()):
            raise ConfigError(
                f"{out}: {setting} is {before!r} in this sweep and {now!r} now; restore it, or use --overwrite"
            )
    if (out / sweep_folder.CARD_FILE).exists() and all(job.name in state.ended for job in plan.jobs):
        raise ConfigError(f"{out}: this sweep is complete; add jobs to the file, or start again with --overwrite")
    state.ended = {
        name: why for name, why in state.ended.items() if not why.startswith("failed")
    }  # they are tried again
    return state
