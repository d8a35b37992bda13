"""`loratune train`: the settings at the start, one live line, and the next commands at the end.

On a terminal a single line shows step, loss with a small curve, rate, tokens per second, memory and time left, and
evaluations scroll by above it. In a log file, a plain line is printed every tenth of the run.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from loratune.many.rate import RateChoice, RateTrial
from loratune.memory.fit import FittedPlan
from loratune.runs.folder import RunResult
from loratune.runs.run import Note, Prepared, RunEvent
from loratune.screen.text import curve
from loratune.training.course import Evaluated, StepDone
from loratune.training.loop import CheckpointSaved, Unreached
from loratune.units import duration, size

_CURVE_WIDTH = 24


def watch(events: Iterable[RunEvent], console: Console) -> RunResult:
    """Draws a run's events as they arrive and returns its result."""
    result: RunResult | None = None
    with drawing(console) as draw:
        for event in events:
            draw(event)
            if isinstance(event, RunResult):
                result = event
    assert result is not None, "a run ends with its result"
    return result


@contextmanager
def drawing(console: Console) -> Iterator[Callable[[RunEvent], None]]:
    """Shows a run: yields the function that draws one event. The live line is removed at the end."""
    view = _ProgressView(console)
    view.wait("loading the model and rendering the data")
    try:
        yield view.draw
    finally:
        view.close()


def summary(result: RunResult, console: Console) -> None:
    """Prints the result of `loratune train` and the next commands."""
    progress = result.progress
    headline = {
        "done": ("finished", "bold green"),
        "early stop": ("stopped early: the held-out loss no longer falls", "bold green"),
        "interrupted": ("interrupted; everything is saved", "bold yellow"),
        "diverged": ("stopped: the loss is not finite", "bold red"),
        "dropped": ("dropped: other jobs of its sweep were better", "bold yellow"),
    }[result.reason]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("steps", f"{progress.step:,} in {duration(progress.seconds)}")
    if result.last_loss is not None:
        table.add_row("training loss", f"{result.last_loss:.4f}")
    if progress.best_eval_loss is not None:
        table.add_row("held-out loss", f"{progress.best_eval_loss:.4f}, the best, at step {progress.best_step}")
    if progress.skipped_steps:
        table.add_row("skipped", f"{progress.skipped_steps} steps with a non-finite loss or gradient")
    table.add_row("speed", f"{result.tokens_per_second:,.0f} tokens/s, peak memory {size(result.peak_memory_bytes)}")
    if result.out is not None:
        table.add_row("adapter", f"{result.out}  (of step {result.kept_step})")
    console.print(Panel(table, title=Text(*headline), title_align="left", border_style=headline[1].split()[-1]))
    if result.out is not None:
        console.print("Next:", style="bold")
        if result.reason == "interrupted":
            _next(console, "train", "--resume", "--out", str(result.out))
        raw = ["--no-generate"] if "text" in result.forms else []  # raw text has no question to answer
        _next(console, "chat", str(result.out))
        _next(console, "eval", str(result.out), *(result.eval_data or ["HELD_OUT.jsonl"]), *raw)
        _next(console, "merge", str(result.out), "--out", f"{result.out}-merged")


def _next(console: Console, *words: str) -> None:
    """Prints a command that a shell reads as these words."""
    console.print(Text(f"  loratune {shlex.join(words)}", "cyan"), soft_wrap=True)


def _memory(fit: FittedPlan) -> str:
    """Expected and available memory. If no estimate exists, the memory that a trial row used."""
    if fit.expected is None:
        return f"{size(fit.tried)} measured, {size(fit.limit)} available"
    return f"{size(fit.expected.total)} expected, {size(fit.limit)} available"


class _ProgressView:
    """The live line and its history."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last_saved: int | None = None
        self._losses: list[float] = []
        self._live: Live | None = None
        self._started = time.monotonic()
        self._first_step = 0
        self._eval_loss: float | None = None
        self._waiting: Status | None = None

    def wait(self, reason: str) -> None:
        """Shows the reason for a pause until the next event."""
        self._waiting = self.console.status(reason)
        self._waiting.start()

    def draw(self, event: RunEvent) -> None:
        """Draws one event."""
        self._end_wait()
        match event:
            case Note(text):
                self.note(text)
            case RateTrial():
                self.wait(f"trying {len(event.rates)} learning rates for {event.steps} steps each")
            case RateChoice():
                self.chose(event)
            case Prepared():
                self.prepare(event)
            case StepDone():
                self.step(event)
            case Evaluated():
                self.evaluated(event)
            case Unreached(paths):
                self.note(
                    f"{len(paths)} tensors of the adapter get no gradient, for example {paths[0]}: the model "
                    "computes without calling those layers. Leave them out with --exclude-modules"
                )
            case CheckpointSaved(step=step):
                self.last_saved = step

    def note(self, text: str) -> None:
        """Prints a remark."""
        self.console.print(Text.assemble(("note  ", "yellow"), text))

    def chose(self, event: RateChoice) -> None:
        """Shows the losses of the learning rates that were tried, and the choice."""
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("rate", justify="right")
        table.add_column(f"{'held-out' if event.held_out else 'training'} loss", justify="right")
        table.add_row("base", f"{event.base_loss:.4f}", style="dim")
        for rate, loss in event.losses.items():
            chosen = rate == event.rate
            shown = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            table.add_row(f"{rate:g}", shown, style="bold green" if chosen else "")
        self.console.print(table)
        self.console.print(Text.assemble((f"learning rate {event.rate:g}", "bold green"), f": {event.why}\n"))

    def prepare(self, event: Prepared) -> None:
        """Prints the adapter, the data and the device."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        if event.attached is not None:
            attached = event.attached
            share = attached.trainable_parameters / attached.total_parameters
            table.add_row(
                "adapter",
                f"{len(attached.ranks)} layers, {attached.trainable_parameters:,} parameters train ({share:.2%})",
            )
        held_out = f", {len(event.dataset.eval):,} held out" if event.dataset.eval else ", none held out"
        table.add_row("data", f"{len(event.dataset.train):,} examples{held_out}")
        table.add_row("rows", f"{event.rows_per_epoch:,} per epoch, {event.fullness:.1%} full")
        resumed = f", continuing after step {event.resumed_at:,}" if event.resumed_at else ""
        table.add_row("steps", f"{event.total_steps:,}{resumed}")
        table.add_row("device", f"{event.device}, base in {event.dtype}")
        if event.fit.limit:
            table.add_row("memory", _memory(event.fit))
            table.add_row("activations", str(event.fit.plan))
        for choice in event.choices:
            table.add_row("chosen", str(choice))
        self.console.print(table)
        self.console.print()
        self._first_step = event.resumed_at
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()

    def step(self, event: StepDone) -> None:
        """Updates the live line. Without a terminal, prints a plain line every tenth of the run."""
        if not event.skipped:
            self._losses.append(event.loss)
        left = self._time_left(event)
        if self._live is not None:
            self._live.update(self._line(event, left))
        elif event.step == event.total_steps or event.step % max(1, event.total_steps // 10) == 0:
            self.console.print(
                f"step {event.step}/{event.total_steps}  loss {event.loss:.4f}  rate {event.learning_rate:.2e}  "
                f"{event.tokens_per_second:,.0f} tokens/s  {size(event.memory_bytes)}  {duration(left)} left",
                highlight=False,
            )
        if event.skipped:
            self.console.print(
                Text(f"step {event.step}: loss or gradient not finite, step skipped", style="bold red")
            )

    def evaluated(self, event: Evaluated) -> None:
        """Prints one line per held-out evaluation."""
        self._eval_loss = event.eval_loss
        mark = ("  best so far", "green") if event.best else ("", "")
        self.console.print(
            Text.assemble((f"step {event.step:>6}  ", "dim"), f"held-out loss {event.eval_loss:.4f}", mark)
        )

    def close(self) -> None:
        """Removes the live line from the screen."""
        self._end_wait()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _end_wait(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None

    def _line(self, event: StepDone, left: float) -> Group:
        bar = Table.grid(padding=(0, 1))
        done = Text(f"{event.step:,}/{event.total_steps:,}", style="bold")
        time_left = Text(f"{duration(left)} left", style="dim")
        bar.add_row(done, ProgressBar(total=event.total_steps, completed=event.step, width=36), time_left)
        facts = Text.assemble(
            ("loss ", "dim"),
            (f"{event.loss:.4f} ", "bold"),
            (curve(self._losses, _CURVE_WIDTH), "blue"),
            ("  rate ", "dim"),
            f"{event.learning_rate:.1e}",
            ("  ", ""),
            f"{event.tokens_per_second:,.0f}",
            (" tokens/s  ", "dim"),
            size(event.memory_bytes),
        )
        return Group(bar, facts)

    def _time_left(self, event: StepDone) -> float:
        done = event.step - self._first_step
        return (time.monotonic() - self._started) / done * (event.total_steps - event.step)
