"""The live table and the ranking of a sweep, as text."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from loratune.config import RunConfig
from loratune.many.jobs import Failed, Paused, Started
from loratune.screen.sweep import _SweepView, summary, watch
from loratune.sweep.folder import Standing
from loratune.sweep.plan import PlannedJob
from loratune.sweep.run import Ready, RungDone, SweepResult
from loratune.training.course import Evaluated, StepDone


def console(height=24, terminal=False):
    return Console(file=io.StringIO(), width=100, height=height, force_terminal=terminal, color_system=None)


def ready(count, slots=4):
    jobs = tuple(PlannedJob(f"job{n}", RunConfig(model="m", data=["d"], out=f"out/job{n}")) for n in range(count))
    return Ready(jobs, (40,) * count, {"job0": "done"}, slots, 2048, "cpu", "float32")


def step(n, loss, skipped=False):
    return StepDone(n, 40, 0.1, loss, 3e-4, 1.0, 100, 64, 1000.0, 2**30, skipped)


def standing(name, state="done", eval_loss=0.25):
    return Standing(
        name=name, settings={"r": 8, "target_modules": ["q_proj", "v_proj"]}, state=state, step=40, total_steps=40,
        loss=0.5, eval_loss=eval_loss, best_step=30,
    )  # fmt: skip


def shown(view, screen):
    screen.print(view._table())
    return screen.file.getvalue()


def test_a_row_says_where_a_job_is():
    screen = console()
    view = _SweepView(screen)
    view.prepare(ready(3))
    view.job("job1", Started(0, 0, 40))
    for n, loss in enumerate((4.0, 2.0, 1.0), start=1):
        view.job("job1", step(n, loss))
    view.job("job1", step(4, float("nan"), skipped=True))
    view.job("job1", Evaluated(4, 1.25, best=True))
    view.job("job2", Failed("the disk is full"))
    lines = shown(view, screen).splitlines()
    row = next(line for line in lines if line.lstrip().startswith("job1") and "running" in line)
    assert row.split() == ["job1", "4/40", "1.0000", "█▃▁", "1.2500", "3.0e-04", "running"]
    assert any("job0" in line and "done" in line for line in lines)
    assert any("job2" in line and "the disk is full" in line for line in lines)


def test_what_does_not_fit_is_counted_and_what_runs_is_shown():
    screen = console(height=12)
    view = _SweepView(screen)
    view.prepare(ready(50))
    view.job("job49", Started(0, 0, 40))
    view.job("job48", Paused(10))
    text = shown(view, screen)
    table = text[text.index(" job  ") :]
    assert "job49" in table
    assert "job48" in table
    assert "and 44 more jobs" in table
    assert len(table.splitlines()) <= 12


def test_without_a_terminal_lines_come_when_something_is_measured():
    screen = console()
    events = [
        ready(2),
        ("job1", Started(0, 0, 40)),
        ("job1", step(1, 2.0)),
        ("job1", Evaluated(1, 1.5, best=True)),
        RungDone(0.25, ("job1",), ("job0",)),
        SweepResult((standing("job1"),), Path("out"), True, 3.0, 64, 2**30),
    ]
    watch(iter(events), screen)
    text = screen.file.getvalue()
    assert "job1  step 1/40  held-out loss 1.5000" in text
    assert "at 25% of the steps  1 continue: job1; 1 dropped" in text
    assert "\x1b" not in text


def test_the_summary_ranks_and_says_what_comes_next():
    screen = console()
    standings = (standing("a"), standing("b", "failed: out of [disk]", None))
    summary(SweepResult(standings, Path("out"), True, 10.0, 5000, 2**30), screen)
    text = screen.file.getvalue()
    assert "0.2500" in text
    assert "q_proj, v_proj" in text
    assert "failed: out of [disk]" in " ".join(text.split())
    assert "500 tokens/s" in text
    assert "loratune chat out/a" in text


def test_a_sweep_that_was_stopped_says_how_to_go_on():
    screen = console()
    summary(SweepResult((standing("a", "interrupted"),), Path("out"), False, 10.0, 5000, 2**30), screen)
    assert "loratune sweep --resume --out out" in screen.file.getvalue()
