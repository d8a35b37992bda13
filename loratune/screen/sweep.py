"""`loratune sweep`: one row per job while it runs, and the ranking at the end.

On a terminal one table is updated in place. If it does not fit, it shows the running jobs and counts the others. In a
log file, a plain line is printed when a job is evaluated or ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from loratune.many.jobs import Failed, JobEvent, Paused, Started
from loratune.runs.run import Note
from loratune.screen.text import curve
from loratune.sweep.folder import row_of, settings_shown
from loratune.sweep.run import Ready, RungDone, SweepEvent, SweepResult
from loratune.training.course import Evaluated, StepDone
from loratune.training.loop import Ended
from loratune.units import command, duration, path_word, size

_CURVE_WIDTH = 16
_STYLES = {"running": "cyan", "done": "green", "early stop": "green", "dropped": "yellow", "waiting": "dim"}


def watch(events: Iterable[SweepEvent], console: Console) -> SweepResult:
    """Draws a sweep's events as they arrive and returns its result."""
    view = _SweepView(console)
    result: SweepResult | None = None
    waiting = console.status("rendering the data and loading the model")
    waiting.start()
    try:
        for event in events:
            waiting.stop()
            match event:
                case Note(text):
                    console.print(Text.assemble(("note  ", "yellow"), text))
                case Ready():
                    view.prepare(event)
                case RungDone():
                    view.met(event)
                case SweepResult():
                    result = event
                case (name, job_event):
                    view.job(name, job_event)
    finally:
        waiting.stop()
        view.close()
    assert result is not None, "a sweep ends with its result"
    return result


def summary(result: SweepResult, console: Console) -> None:
    """Prints the ranking and the next commands."""
    columns = settings_shown(result.standings)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("", justify="right", style="dim")
    names = [len(standing.name) for standing in result.standings]
    table.add_column("job", overflow="fold", min_width=min(max(names), 32))
    for column in [*columns, "held-out loss", "at step", "training loss", "steps"]:
        table.add_column(column.replace("learning_rate", "rate"), justify="right")
    table.add_column("state", overflow="fold")
    for place, standing in enumerate(result.standings, start=1):
        *cells, state = row_of(standing, columns)
        style = "bold" if place == 1 and result.complete else ""
        table.add_row(str(place), standing.name, *cells, Text(state, _style(state)), style=style)
    console.print(table)
    speed = f"{result.tokens / result.seconds:,.0f} tokens/s" if result.seconds else ""
    took = f"{duration(result.seconds)} with loading, {speed}, peak memory {size(result.peak_memory_bytes)}"
    console.print(Text(f"\n{took}", "dim"))
    best = f"{result.out}/{result.standings[0].name}"
    if not result.complete:
        console.print("Stopped; everything is saved. Next:", style="bold yellow")
        commands = [command("loratune", "sweep", "--resume", "--out", result.out)]
    else:
        console.print(
            f"The ranking, all curves and the jobs are in {result.out}. Next:", style="bold", soft_wrap=True
        )
        commands = [command("loratune", verb, path_word(best)) for verb in ("chat", "inspect")]
        merged = f"{result.standings[0].name}-merged"
        commands.append(command("loratune", "merge", path_word(best), "--out", merged))
    for line in commands:
        console.print(f"  {line}", style="cyan", highlight=False, soft_wrap=True)


@dataclass
class _Line:
    """One job's line of the table."""

    total_steps: int
    state: str = "queued"
    step: int = 0
    rate: float | None = None
    eval_loss: float | None = None
    losses: list[float] = field(default_factory=list)


class _SweepView:
    """The live table and its values."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lines: dict[str, _Line] = {}
        self._live: Live | None = None
        self._started, self._tokens, self._steps = time.monotonic(), 0, 0

    def prepare(self, event: Ready) -> None:
        """Prints the jobs, the rows and the device."""
        for job, total in zip(event.jobs, event.total_steps, strict=True):
            self._lines[job.name] = _Line(total, event.ended.get(job.name, "queued"))
        left = f", {len(event.ended)} of them ended before" if event.ended else ""
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_row("jobs", f"{len(event.jobs)}{left}; {event.slots} at once over one base, the others in turn")
        facts.add_row("rows", f"{event.row_tokens:,} tokens of all jobs together")
        facts.add_row("device", f"{event.device}, base in {event.dtype}")
        self.console.print(facts)
        self.console.print()
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True, get_renderable=self._table)
            self._live.start()

    def job(self, name: str, event: JobEvent) -> None:
        """Updates the line of one job."""
        line = self._lines[name]
        match event:
            case Started(step=step):
                line.state, line.step = "running", step
            case StepDone():
                line.step, line.rate = event.step, event.learning_rate
                self._tokens, self._steps = self._tokens + event.tokens, self._steps + 1
                if not event.skipped:
                    line.losses.append(event.loss)
            case Evaluated():
                line.eval_loss = event.eval_loss
                self._say(name, f"step {event.step}/{line.total_steps}  held-out loss {event.eval_loss:.4f}")
            case Paused():
                line.state = "waiting"
            case Failed(why):
                line.state = f"failed: {why}"
                self.console.print(Text.assemble((f"{name}  failed: ", "bold red"), why), soft_wrap=True)
            case Ended(reason=reason):
                line.state = reason
                self._say(name, reason)

    def met(self, event: RungDone) -> None:
        """Prints the jobs that continue after a rung and those that end."""
        for name in event.dropped:
            self._lines[name].state = "dropped"
        self.console.print(
            Text.assemble(
                (f"at {event.share:.0%} of the steps  ", "dim"),
                (f"{len(event.kept)} continue: ", "bold"),
                ", ".join(event.kept),
                (f"; {len(event.dropped)} dropped", "yellow"),
            )
        )

    def close(self) -> None:
        """Removes the table from the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say(self, name: str, text: str) -> None:
        if self._live is None:
            self.console.print(f"{name}  {text}", highlight=False, soft_wrap=True)

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 1), header_style="dim")
        for title, justify in (("job", "left"), ("step", "right"), ("loss", "right"), ("", "left")):
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for title in ("held-out", "rate"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        shown = self._shown(max(4, self.console.height - 6))
        for name in shown:
            line = self._lines[name]
            table.add_row(
                name,
                f"{line.step:,}/{line.total_steps:,}",
                f"{line.losses[-1]:.4f}" if line.losses else "",
                Text(curve(line.losses, _CURVE_WIDTH), "blue"),
                "" if line.eval_loss is None else f"{line.eval_loss:.4f}",
                "" if line.rate is None else f"{line.rate:.1e}",
                Text(line.state, _style(line.state)),
            )
        seconds = time.monotonic() - self._started
        hidden = len(self._lines) - len(shown)
        more = f"and {hidden} more jobs  " if hidden else ""
        foot = f"{more}{duration(seconds)}  {self._tokens / max(seconds, 1e-9):,.0f} tokens/s"
        return Group(table, Text(foot, "dim"))

    def _shown(self, rows: int) -> list[str]:
        """Names of at most `rows` jobs, running ones first, in the order of the plan."""
        busy = ("running", "waiting", "queued")
        order = sorted(
            self._lines, key=lambda name: next((n for n, s in enumerate(busy) if s == self._lines[name].state), 3)
        )
        chosen = set(order[:rows])
        return [name for name in self._lines if name in chosen]


def _style(state: str) -> str:
    return _STYLES.get(state, "red" if state == "diverged" or state.startswith("failed") else "")
