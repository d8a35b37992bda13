"""From the runs to the numbers and pictures in the text.

    python -m docs.experiments.lora_without_regret.plots RUNS.jsonl FOLDER

Writes summary.json, rates.png, capacity.png and modules.png.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

Run = dict[str, Any]
COLOURS = ["#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b"]
FULL = "#d94801"


def loss_of(run: Run) -> float:
    """Held-out loss, or for facts, of which there is nothing to hold out, the loss of the last 50 steps."""
    value = run["held_out"] if run["held_out"] is not None else run["last_50"]
    return float(value) if value is not None and math.isfinite(value) else math.inf


def by_rate(runs: Iterable[Run]) -> dict[float, float]:
    """Rate -> loss, the mean over seeds."""
    losses: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        losses[run["rate"]].append(loss_of(run))
    return {rate: float(np.mean(values)) for rate, values in sorted(losses.items())}


def best_rate(losses: dict[float, float]) -> tuple[float, float]:
    """(rate, loss) at the bottom: of a parabola through the best point and its neighbours, in logarithms."""
    rates = list(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1) or not all(math.isfinite(losses[r]) for r in rates[at - 1 : at + 2]):
        return rates[at], losses[rates[at]]
    left, middle, right = (math.log(losses[rates[i]]) for i in (at - 1, at, at + 1))
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    return rates[at] * 2**shift, losses[rates[at]]


def label(rank: int) -> str:
    """How a kind of run is called in a legend."""
    return f"rank {rank}" if rank else "full"


def colour(rank: int, ranks: Sequence[int]) -> str:
    """Darker for larger ranks; full tuning in its own."""
    lora = sorted(r for r in ranks if r)
    return FULL if rank == 0 else COLOURS[lora.index(rank) * (len(COLOURS) - 1) // max(1, len(lora) - 1)]


def draw_rates(runs: list[Run], folder: Path) -> dict[str, Any]:
    """Loss over the rate for each rank, a picture for each task; the best rates."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    ranks = sorted({run["rank"] for run in runs})
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.6), squeeze=False)
    summary: dict[str, Any] = {}
    for task, ax in zip(tasks, axes[0], strict=True):
        found = {}
        for rank in ranks:
            mine = [run for run in runs if run["task"] == task and run["rank"] == rank]
            losses = by_rate(mine)
            found[rank] = best_rate(losses)
            seeds = [best_rate(by_rate([r for r in mine if r["seed"] == s]))[0] for s in {r["seed"] for r in mine}]
            summary.setdefault(task, {})[label(rank)] = {
                "best_rate": found[rank][0], "loss": found[rank][1], "best_rate_of_each_seed": sorted(seeds),
            }  # fmt: skip
            ax.plot(list(losses), list(losses.values()), "o-", ms=3, color=colour(rank, ranks), label=label(rank))
            ax.plot(*found[rank], "v", color=colour(rank, ranks), ms=7)
        lora = [found[rank][0] for rank in ranks if rank]
        summary[task]["ratio_lora_to_full"] = float(np.exp(np.mean(np.log(lora)))) / found[0][0]
        summary[task]["largest_over_smallest_lora"] = max(lora) / min(lora)
        ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss", title=task)
        ax.set_ylim(top=min(3.0, ax.get_ylim()[1]))
        ax.legend(frameon=False, fontsize=8)
    save(figure, folder / "rates.png")
    return summary


def draw_capacity(runs: list[Run], folder: Path) -> dict[str, Any]:
    """Loss over steps at the best rate of each rank, and where each leaves the lowest curve."""
    ranks = sorted({run["rank"] for run in runs}, key=lambda rank: rank or math.inf)
    best = {rank: min((r for r in runs if r["rank"] == rank), key=loss_of) for rank in ranks}
    curves = {rank: smooth(run["curve"]) for rank, run in best.items()}
    lowest = np.min(np.stack(list(curves.values())), axis=0)
    figure, ax = plt.subplots(figsize=(6, 3.8))
    summary: dict[str, Any] = {}
    for rank in ranks:
        steps = (np.arange(len(curves[rank])) + 1) * best[rank]["every"]
        beyond = np.nonzero(curves[rank] > 1.1 * lowest)[0]
        inside = np.nonzero(curves[rank] <= 1.1 * lowest)[0]
        last = int(steps[inside[-1]]) if len(inside) else 0
        summary[label(rank)] = {
            "rate": best[rank]["rate"], "loss": loss_of(best[rank]), "parameters": best[rank]["parameters"],
            "last_step_within_10_percent_of_the_lowest": last, "left": bool(len(beyond) and beyond[-1] > inside[-1]),
        }  # fmt: skip
        ax.plot(steps, curves[rank], color=colour(rank, ranks), label=label(rank), lw=1.5)
        if summary[label(rank)]["left"]:
            ax.plot(last, curves[rank][inside[-1]], "o", color=colour(rank, ranks), ms=5)
    ax.set(xlabel="step", ylabel="training loss", title="4,096 random facts, each rank at its best rate")
    ax.legend(frameon=False, fontsize=8)
    save(figure, folder / "capacity.png")
    return summary


def draw_modules(runs: list[Run], folder: Path) -> dict[str, Any]:
    """Attention alone and MLP alone, pairs of equal size."""
    cases = list(dict.fromkeys((run["task"], run["parameters"]) for run in runs))
    figure, axes = plt.subplots(1, len(cases), figsize=(3.2 * len(cases), 3.2), squeeze=False)
    summary: dict[str, Any] = {}
    for (task, size), ax in zip(cases, axes[0], strict=True):
        for name, first, tone in (("attention", "q_proj", COLOURS[2]), ("MLP", "gate_proj", FULL)):
            mine = [r for r in runs if (r["task"], r["parameters"]) == (task, size) and r["modules"][0] == first]
            losses = by_rate(mine)
            if losses:
                ax.plot(
                    list(losses), list(losses.values()), "o-", ms=3, color=tone, label=f"{name}, r {mine[0]['rank']}"
                )
                summary.setdefault(f"{task}, {size:,} parameters", {})[name] = min(losses.values())
        ax.set(xscale="log", yscale="log", xlabel="learning rate", title=f"{task}, {size:,}")
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("loss")
    save(figure, folder / "modules.png")
    return summary


def smooth(curve: Sequence[float], width: int = 5) -> np.ndarray[Any, Any]:
    """A running mean over points of the curve, shorter at its ends."""
    values = np.array([x if x is not None and math.isfinite(x) else 99.0 for x in curve])
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def save(figure: Any, path: Path) -> None:
    """Writes a picture without the frame at its top and right."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Reads the runs, draws, and prints the summary."""
    lines = Path(sys.argv[1]).read_text().splitlines()
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Run]] = defaultdict(list)
    for line in lines:
        run = json.loads(line)
        parts[run["part"]].append(run)
    draw = {"rates": draw_rates, "capacity": draw_capacity, "modules": draw_modules}
    summary = {part: draw[part](runs, folder) for part, runs in parts.items()}
    text = json.dumps(summary, indent=2)
    (folder / "summary.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
