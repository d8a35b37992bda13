"""Numbers and pictures of the text, from the runs.

    python -m docs.experiments.lora_without_regret.plots FOLDER RUNS.jsonl [RUNS.jsonl ...]

Writes summary.json, rates.png, capacity.png and modules.png.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

Run = dict[str, Any]
COLOURS = ["#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b"]
FULL = "#d94801"
COMMON = 16
"""Reference rank for the curves of lower ranks."""


FRESH = slice(45, 75)
"""Steps of the first epoch on which every document is new, so that the training loss is a held-out loss too."""


def loss_of(run: Run) -> float:
    """Loss on new documents late in the first epoch; on facts, of which none is new, that of the last 50 steps.

    At the end, two epochs on, both tasks are solved and the held-out losses of good runs (1e-3) scatter; see `late`.
    """
    value = float(np.mean(run["curve"][FRESH])) if run["held_out"] is not None else run["last_50"]
    return value if math.isfinite(value) else math.inf


def late(run: Run) -> float:
    """Held-out loss after the last step."""
    return run["held_out"] if math.isfinite(run["held_out"]) else math.inf


def by_rate(runs: Iterable[Run], loss: Callable[[Run], float] = loss_of) -> dict[float, float]:
    """Rate -> loss, the mean over seeds."""
    losses: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        losses[run["rate"]].append(loss(run))
    return {rate: float(np.mean(values)) for rate, values in sorted(losses.items())}


def best_rate(losses: dict[float, float]) -> tuple[float, float]:
    """(rate, loss) at the bottom of a parabola through the best point and its neighbours, in logarithms."""
    rates = list(losses)
    at = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if at in (0, len(rates) - 1) or not all(math.isfinite(losses[r]) for r in rates[at - 1 : at + 2]):
        return rates[at], losses[rates[at]]
    left, middle, right = (math.log(losses[rates[i]]) for i in (at - 1, at, at + 1))
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    return rates[at] * 2**shift, losses[rates[at]]


def label(rank: int) -> str:
    """Legend entry of a kind of run."""
    return f"rank {rank}" if rank else "full"


def colour(rank: int, ranks: Sequence[int]) -> str:
    """Colour of a kind: darker for larger ranks; full tuning has its own."""
    lora = sorted(r for r in ranks if r)
    return FULL if rank == 0 else COLOURS[lora.index(rank) * (len(COLOURS) - 1) // max(1, len(lora) - 1)]


def draw_rates(runs: list[Run], folder: Path) -> dict[str, Any]:
    """Loss over the rate for each rank, a picture for each task; the best rates."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    ranks = sorted({run["rank"] for run in runs})
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 3.6), squeeze=False)
    summary: dict[str, Any] = {}
    for task, ax in zip(tasks, axes[0], strict=True):
        found, ends = {}, {}
        for rank in ranks:
            mine = [run for run in runs if run["task"] == task and run["rank"] == rank]
            losses = by_rate(mine)
            found[rank], ends[rank] = best_rate(losses), best_rate(by_rate(mine, late))
            seeds = [best_rate(by_rate([r for r in mine if r["seed"] == s]))[0] for s in {r["seed"] for r in mine}]
            summary.setdefault(task, {})[label(rank)] = {
                "best_rate": found[rank][0], "loss": found[rank][1], "best_rate_of_each_seed": sorted(seeds),
                "best_rate_at_the_end": ends[rank][0], "held_out_at_the_end": ends[rank][1],
            }  # fmt: skip
            ax.plot(list(losses), list(losses.values()), "o-", ms=3, color=colour(rank, ranks), label=label(rank))
            ax.plot(*found[rank], "v", color=colour(rank, ranks), ms=7)
        for when, best in (("", found), ("_at_the_end", ends)):
            lora = [best[rank][0] for rank in ranks if rank]
            summary[task]["ratio_lora_to_full" + when] = float(np.exp(np.mean(np.log(lora)))) / best[0][0]
            summary[task]["largest_over_smallest_lora" + when] = max(lora) / min(lora)
        ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="loss on new documents", title=task)
        ax.set_ylim(top=min(3.0, ax.get_ylim()[1]))
        ax.legend(frameon=False, fontsize=8)
    save(figure, folder / "rates.png")
    return summary


def draw_capacity(runs: list[Run], folder: Path) -> dict[str, Any]:
    """Loss over steps of each rank, and where the lower ranks leave the curve of `COMMON`."""
    ranks = sorted({run["rank"] for run in runs}, key=lambda rank: rank or math.inf)
    best = {rank: min((r for r in runs if r["rank"] == rank), key=loss_of) for rank in ranks}
    curves = {rank: smooth(run["curve"]) for rank, run in best.items()}
    common = curves[COMMON]
    figure, ax = plt.subplots(figsize=(6, 3.8))
    summary: dict[str, Any] = {}
    for rank in ranks:
        steps = (np.arange(len(curves[rank])) + 1) * best[rank]["every"]
        apart = curves[rank] > 1.1 * common
        leaves = int(steps[np.nonzero(~apart)[0][-1]]) if apart[-1] else None
        summary[label(rank)] = {
            "rate": best[rank]["rate"], "loss": loss_of(best[rank]), "parameters": best[rank]["parameters"],
            "step_of_half_the_plateau": int(steps[np.nonzero(curves[rank] > 1.0)[0][-1]]),
            "leaves_the_curve_of_rank_16_for_good_at": leaves,
        }  # fmt: skip
        ax.plot(steps, curves[rank], color=colour(rank, ranks), label=label(rank), lw=1.5)
        if leaves is not None:
            ax.plot(leaves, curves[rank][steps == leaves], "o", color=colour(rank, ranks), ms=5)
    ax.set(xlabel="step", ylabel="training loss", title="256 random facts")
    ax.legend(frameon=False, fontsize=8)
    save(figure, folder / "capacity.png")
    return summary


def draw_modules(runs: list[Run], folder: Path) -> dict[str, Any]:
    """Attention alone and MLP alone over the steps, pairs of equal size, each at its best rate."""
    sizes = list(dict.fromkeys(run["parameters"] for run in runs))
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes), 3.4), squeeze=False, sharey=True)
    summary: dict[str, Any] = {}
    for size, ax in zip(sizes, axes[0], strict=True):
        for name, first, tone in (("attention", "q_proj", COLOURS[2]), ("MLP", "gate_proj", FULL)):
            mine = [run for run in runs if run["parameters"] == size and run["modules"][0] == first]
            losses = by_rate(mine)
            best = [run for run in mine if run["rate"] == min(losses, key=lambda rate: losses[rate])]
            summary.setdefault(f"{size:,} parameters", {})[name] = {
                f"{rate:g}": loss for rate, loss in losses.items()
            }
            for run in best:
                steps = (np.arange(len(run["curve"])) + 1) * run["every"]
                seeded = None if run is not best[0] else f"{name}, rank {run['rank']}, rate {run['rate']:g}"
                ax.plot(steps, smooth(run["curve"]), color=tone, lw=1.5, label=seeded)
        ax.set(xlabel="step", title=f"{size:,} parameters")
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("training loss")
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
    folder = Path(sys.argv[1])
    lines = [line for file in sys.argv[2:] for line in Path(file).read_text().splitlines()]
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
