"""Curves of a run: `metrics.jsonl`, with one JSON object per step or evaluation, and `loss.png`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune import atomic, foreign
from loratune.errors import OutputError

_MOST_BYTES = 1 << 30  # a million steps take 300 MB


class MetricsFile:
    """Appends lines to `metrics.jsonl`, unbuffered, so that other programs can follow the file."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Starts a new file, or keeps the lines up to `resume_step` of an existing one."""
        self.path = path
        kept = [m for m in read(path) if m["step"] <= resume_step] if resume_step is not None else []
        atomic.write_text(path, "".join(map(_line, kept)))

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line. Raises OutputError: the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(metrics))
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file without damaged ones; see `read_all`."""
    return read_all(path)[0]


def read_all(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics file, and the number of lines that a crash cut off or damage has made unreadable.

    Raises: OutputError: the file cannot be read.
    """
    content = foreign.read_bytes(path, OutputError, _MOST_BYTES) if os.path.lexists(path) else b""
    lines = [_parsed(line) for line in content.split(b"\n") if line.strip()]
    whole = [line for line in lines if line is not None]
    return whole, len(lines) - len(whole)


def _line(metrics: Mapping[str, Any]) -> str:
    """One line of the file. Losses that are not finite become null, as JSON has no other word for them."""
    return json.dumps(atomic.finite(metrics), allow_nan=False) + "\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line: a step and numbers, or None if it is anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int or found["step"] < 0:
        return None
    if not all(value is None or _is_number(value) for value in found.values()):
        return None
    values: dict[str, Any] = atomic.finite(found)
    return values


def _is_number(value: object) -> bool:
    """True for floats, and for whole numbers of 64 bits: larger ones have no place in a run and may exceed floats."""
    return isinstance(value, float) or (isinstance(value, bool | int) and -(2**63) <= value < 2**63)


def losses_of(path: Path) -> list[float]:
    """Training losses of all steps in a metrics file, without skipped steps."""
    return [m["loss"] for m in read(path) if m.get("loss") is not None and not m.get("skipped")]


def plot(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and held-out loss over the steps to a PNG file."""
    from matplotlib.figure import Figure

    trained = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    held_out = [(m["step"], m["eval_loss"]) for m in metrics if m.get("eval_loss") is not None]
    figure = Figure(figsize=(7.2, 4.0), dpi=140, layout="constrained")
    axes = figure.subplots()
    if trained:
        steps, values = zip(*trained, strict=True)
        axes.plot(steps, values, color="#b8c4d6", linewidth=1.0)
        axes.plot(steps, smooth(values), color="#2f5d9b", linewidth=2.0, label="training")
    if held_out:
        steps, values = zip(*held_out, strict=True)
        axes.plot(steps, values, color="#d1603d", linewidth=1.6, marker="o", markersize=4.5, label="held-out")
        axes.annotate(
            f"{values[-1]:.3g}", (steps[-1], values[-1]), xytext=(5, 4), textcoords="offset points", color="#d1603d"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_title(title, loc="left", fontsize=11)
    losses = [loss for _, loss in trained + held_out]
    if losses and min(losses) > 0 and max(losses) > 30 * min(losses):
        axes.set_yscale("log")  # a linear axis would show a cliff and a floor
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if trained or held_out:
        axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic.write_bytes(path, image.getvalue())


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over a thirtieth of the run, starting at the first value."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    smooth, current = [], values[0]
    for value in values:
        current = keep * current + (1 - keep) * value
        smooth.append(current)
    return smooth
