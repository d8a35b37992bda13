"""The folder of a sweep: what is in it, and the ranking that it ends with.

    jobs.toml       the jobs, as they were given
    sweep.json      what has been decided: how jobs ended, who went on from each meeting
    NAME/           one ordinary run folder per job, see `folder`
    results.json    the ranking for programs
    sweep.png       all loss curves in one plot
    README.md       the ranking for people; comes last, so a folder that has it is complete

How far a running job is stands in its own checkpoints. `sweep.json` holds only what no job can know by itself, and is
written whole at every decision; so a sweep that is killed at any moment goes on as if nothing had happened.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loratune import atomic
from loratune.errors import OutputError
from loratune.runs import metrics

STATE_FILE, JOBS_FILE = "sweep.json", "jobs.toml"
RESULTS_FILE, PLOT_FILE, CARD_FILE = "results.json", "sweep.png", "README.md"


@dataclass
class SweepState:
    """What a sweep has decided."""

    model: str
    precision: str
    device: str | None
    ended: dict[str, str] = field(default_factory=dict)
    """Job -> why it ended; a job that is not here goes on."""
    meetings: list[dict[str, Any]] = field(default_factory=list)
    """For each meeting that has taken place: {"share", "losses": {job: held-out loss}, "kept": [job]}."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One line of the ranking."""

    name: str
    settings: dict[str, Any]
    """What tells the job from the others."""
    state: str
    """done, early stop, diverged, dropped, interrupted, or "failed: " and why."""
    step: int
    total_steps: int
    loss: float | None
    """Training loss of the last step."""
    eval_loss: float | None
    """The best held-out loss, which is that of the adapter in the job's folder."""
    best_step: int | None


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raises OutputError if a new sweep may not be written to `out`."""
    atomic.check_new(out, overwrite=overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / STATE_FILE).is_file():
        raise OutputError(f"{out}: holds something that is not a sweep; --overwrite replaces sweeps only")


def clear(out: Path) -> None:
    """Removes an earlier sweep: its own files and those folders in it that are runs."""
    for name in (STATE_FILE, JOBS_FILE, RESULTS_FILE, PLOT_FILE, CARD_FILE):
        (out / name).unlink(missing_ok=True)
    for folder in out.iterdir() if out.is_dir() else []:
        if (folder / "run.toml").is_file():
            shutil.rmtree(folder)


def begin(out: Path, state: SweepState, jobs_text: str) -> None:
    """Puts down what is to be done; results of an earlier attempt go, as they come last."""
    for name in (CARD_FILE, RESULTS_FILE, PLOT_FILE):
        (out / name).unlink(missing_ok=True)
    atomic.write_text(out / JOBS_FILE, jobs_text)
    write_state(out, state)


def read_state(out: Path) -> SweepState:
    """Raises OutputError: there is no sweep in `out`, or its state is damaged."""
    file = out / STATE_FILE
    try:
        return SweepState(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise OutputError(f"{out}: there is no sweep to resume: it has no {STATE_FILE}") from error
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{file}: cannot be read, so the sweep cannot be resumed: {error}") from error


def write_state(out: Path, state: SweepState) -> None:
    """Raises OutputError."""
    atomic.write_text(out / STATE_FILE, json.dumps(asdict(state), indent=2) + "\n")


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """Best first: by held-out loss, jobs without one by training loss after those, failed and diverged ones last."""

    def key(standing: Standing) -> tuple[bool, bool, float]:
        broken = standing.state == "diverged" or standing.state.startswith("failed")
        measured = standing.eval_loss if standing.eval_loss is not None else standing.loss
        known = measured is not None and math.isfinite(measured)
        return broken, standing.eval_loss is None, measured if known and measured is not None else math.inf

    return sorted(standings, key=key)


def write_results(out: Path, standings: Sequence[Standing], model: str) -> None:
    """Writes the ranking, the plot and, last, README.md. `standings` are ranked."""
    content = json.dumps([asdict(standing) for standing in standings], indent=2) + "\n"
    atomic.write_text(out / RESULTS_FILE, content)
    plot(out, standings)
    atomic.write_text(out / CARD_FILE, card(out.name, standings, model))


def plot(out: Path, standings: Sequence[Standing]) -> None:
    """One picture of all jobs: training and held-out loss over the steps, coloured by place, the best darkest."""
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
    return (
        f"# {name}\n\n{len(standings)} LoRA adapters for `{model}`, trained over one base with loratune and ranked "
        "by held-out loss (nats per trained token). Every folder is a run of its own.\n\n"
        + "\n".join(lines)
        + f"\n\n![all losses]({PLOT_FILE})\n\n```sh\nloratune chat {name}/{best}\n"
        f"loratune merge {name}/{best} --out {best}-merged\n```\n"
    )


def settings_shown(standings: Sequence[Standing]) -> list[str]:
    """Settings that any job has of its own, in the order they come; data names are in the jobs' names."""
    return list(dict.fromkeys(key for standing in standings for key in standing.settings if key != "data"))


def row_of(standing: Standing, columns: Sequence[str]) -> list[str]:
    """The cells of a ranking's line after the name."""
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
    """A setting in a table's cell."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(loss: float | None) -> str:
    """A loss in a table's cell."""
    return "" if loss is None else f"{loss:.4f}"


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(m["step"], m[key]) for m in lines if m.get(key) is not None and math.isfinite(m[key])]
