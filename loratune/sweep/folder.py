"""The folder of a sweep: its files and the final ranking.

    jobs.toml       the jobs file of the user
    sweep.json      decisions so far: ended jobs and the results of successive halving
    NAME/           an ordinary run folder for each job, see `runs.folder`
    results.json    the ranking for programs
    sweep.png       all loss curves in one plot
    README.md       the ranking for people; written last, so it marks a complete folder

A running job's progress is in its own checkpoints. `sweep.json` has only the facts about several jobs, and each
decision replaces the whole file. So a sweep that is killed at any moment and resumed gives the same result.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from loratune import atomic, foreign
from loratune.errors import OutputError
from loratune.runs import folder, metrics
from loratune.units import command, path_word

STATE_FILE, JOBS_FILE = "sweep.json", "jobs.toml"
RESULTS_FILE, PLOT_FILE, CARD_FILE = "results.json", "sweep.png", "README.md"


@dataclass
class SweepState:
    """Decisions of a sweep so far."""

    model: str
    precision: str
    device: str | None
    ended: dict[str, str] = field(default_factory=dict)
    """Job -> reason of its end; other jobs continue."""
    meetings: list[dict[str, Any]] = field(default_factory=list)
    """One entry per finished rung of halving: {"share", "losses": {job: held-out loss}, "kept": [job]}."""
    date: str = field(default_factory=lambda: datetime.now().date().isoformat())
    """The day on which the sweep began, for chat templates that print the date."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One line of the ranking."""

    name: str
    settings: dict[str, Any]
    """Settings in which the job differs from the others."""
    state: str
    """done, early stop, diverged, dropped, interrupted, or "failed: " and the reason."""
    step: int
    total_steps: int
    loss: float | None
    """Training loss of the last step."""
    eval_loss: float | None
    """The best held-out loss; the job's folder has the adapter of that step."""
    best_step: int | None


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raises OutputError if `out` cannot take a new sweep."""
    atomic.check_new(out, overwrite=overwrite)
    if out.is_dir() and atomic.holds_files(out) and not any((out / f).is_file() for f in (STATE_FILE, JOBS_FILE)):
        raise OutputError(f"{out}: contains files that are not a sweep; --overwrite replaces sweeps only")


def clear(out: Path) -> None:
    """Removes an earlier sweep: its run folders and its files; last the state, which marks a sweep."""
    for run in out.iterdir() if out.is_dir() else []:
        if run.is_dir() and not run.is_symlink() and folder.holds_run(run):
            atomic.remove(run)
    for name in (CARD_FILE, PLOT_FILE, RESULTS_FILE, JOBS_FILE, STATE_FILE):
        atomic.remove(out / name)


def begin(out: Path, state: SweepState, jobs_text: str) -> None:
    """Writes the jobs file and the state, and removes results of an earlier attempt."""
    for name in (CARD_FILE, RESULTS_FILE, PLOT_FILE):
        (out / name).unlink(missing_ok=True)
    atomic.write_text(out / JOBS_FILE, jobs_text)
    write_state(out, state)


def read_state(out: Path) -> SweepState:
    """Reads the state. Raises OutputError: `out` contains no sweep, or its state is damaged."""
    file = out / STATE_FILE
    try:
        return SweepState(**json.loads(foreign.regular(file).read_bytes()))
    except FileNotFoundError as error:
        raise OutputError(f"{out}: there is no sweep to resume: it has no {STATE_FILE}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputError(f"{file}: cannot be read, so the sweep cannot be resumed: {error}") from error


def write_state(out: Path, state: SweepState) -> None:
    """Writes the state. Raises OutputError: the file cannot be written."""
    atomic.write_text(out / STATE_FILE, atomic.to_json(asdict(state)))


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """Sorts by held-out loss, then jobs without one by training loss, then failed and diverged jobs."""

    def key(standing: Standing) -> tuple[bool, bool, float]:
        broken = standing.state == "diverged" or standing.state.startswith("failed")
        measured = standing.eval_loss if standing.eval_loss is not None else standing.loss
        known = measured is not None and math.isfinite(measured)
        return broken, standing.eval_loss is None, measured if known and measured is not None else math.inf

    return sorted(standings, key=key)


def write_results(out: Path, standings: Sequence[Standing], model: str) -> None:
    """Writes the ranking, the plot and then README.md. `standings` are ranked."""
    content = atomic.to_json([asdict(standing) for standing in standings])
    atomic.write_text(out / RESULTS_FILE, content)
    plot(out, standings)
    atomic.write_text(out / CARD_FILE, card(out.name, standings, model))


def plot(out: Path, standings: Sequence[Standing]) -> None:
    """Plots training and held-out loss of all jobs over the steps, coloured by rank, the best darkest."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.6), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    colors = colormaps["viridis"].resampled(max(2, len(standings) + 1))
    files = [metrics.read(out / standing.name / "metrics.jsonl") for standing in standings]
    for axes, key, title in zip(panels, ("loss", "eval_loss"), ("training", "held-out"), strict=True):
        curves = [_curve(lines, key) for lines in files]
        for place, points in reversed(list(enumerate(curves))):  # the best on top
            if points:
                steps, values = zip(*points, strict=True)
                shown = metrics.smooth(values) if key == "loss" else values
                width, marker = (2.6 if place == 0 else 1.3), (None if key == "loss" else "o")
                label = f"{place + 1}  {standings[place].name}"
                axes.plot(
                    steps, shown, color=colors(place), linewidth=width, marker=marker, markersize=3.5, label=label
                )
        losses = [loss for points in curves for _, loss in points]
        if losses and min(losses) > 0 and max(losses) > 10 * min(losses):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("optimizer step")
        axes.set_title(f"{title} loss, nats per trained token", loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic.write_bytes(out / PLOT_FILE, image.getvalue())


def card(name: str, standings: Sequence[Standing], model: str) -> str:
    """README.md of a sweep."""
    columns = settings_shown(standings)
    head = ["", "job", *columns, "held-out loss", "at step", "training loss", "steps", "state"]
    lines = ["| " + " | ".join(head) + " |", "|---:|---|" + "---:|" * (len(head) - 3) + "---|"]
    for place, standing in enumerate(standings, start=1):
        cells = [str(place), f"[{standing.name}]({standing.name})", *row_of(standing, columns)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    best = standings[0].name
    folder = path_word(f"{name}/{best}")
    return (
        f"# {name}\n\n{len(standings)} LoRA adapters for `{model}`, trained over one base with loratune and ranked "
        "by held-out loss (nats per trained token). Every folder is an ordinary run.\n\n"
        + "\n".join(lines)
        + f"\n\n![all losses]({PLOT_FILE})\n\n```sh\n{command('loratune', 'chat', folder)}\n"
        f"{command('loratune', 'merge', folder, '--out', f'{best}-merged')}\n```\n"
    )


def settings_shown(standings: Sequence[Standing]) -> list[str]:
    """Settings that differ between jobs, in order of appearance, without the data, which the names show."""
    return list(dict.fromkeys(key for standing in standings for key in standing.settings if key != "data"))


def row_of(standing: Standing, columns: Sequence[str]) -> list[str]:
    """The cells after the name in a line of the ranking."""
    own = [setting_text(standing.settings[column]) if column in standing.settings else "" for column in columns]
    return [
        *own,
        number(standing.eval_loss),
        "" if standing.best_step is None else f"{standing.best_step:,}",
        number(standing.loss),
        f"{standing.step:,}/{standing.total_steps:,}",
        standing.state,
    ]


def setting_text(value: Any) -> str:
    """Text of a setting for a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(loss: float | None) -> str:
    """Text of a loss for a table."""
    return "" if loss is None else f"{loss:.4f}"


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(m["step"], m[key]) for m in lines if m.get(key) is not None and math.isfinite(m[key])]
