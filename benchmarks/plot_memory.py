"""Draws tokens per second against peak memory for Llama-2-7B with 4 x 2048 tokens.

    python -m benchmarks.plot_memory OUT.svg RESULTS.jsonl [...]

Reads rows of `benchmarks.memory` (one line per precision) and `benchmarks.peers` (points). Give files of one run:
rows of different GPUs or versions of PyTorch are an error. docs/memory.svg comes from 2026-11-25-h200-memory.jsonl
and 2026-11-25-h200-peers.jsonl.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from benchmarks.plot import Row, date_of, rows_of, save, versions_of

Point = tuple[float, float]
PRECISIONS = {"nf4": ("NF4 base", "#173f7a"), "bf16": ("bf16 base", "#3b7dd8")}
PEERS = {"peft": ("PEFT", "#707070"), "peft+liger": ("PEFT + Liger", "#707070"), "unsloth": ("Unsloth", "#c47f1f")}
POLICIES = {"none": "nothing recomputed", "recompute": "recomputing"}


def main() -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    out, *files = sys.argv[1:]
    rows = [r for r in rows_of(files) if r.get("shape") == "l7b" and r.get("batch") == 4 and "tok_s" in r]
    check_one_run(rows)
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    ours: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        if "policy" not in row:
            ours[row["precision"]].append((row["peak_gib"], row["tok_s"]))
    for precision, points in sorted(ours.items(), reverse=True):
        name, color = PRECISIONS[precision]
        points.sort()
        axes.plot(*zip(*points, strict=True), "s-", color=color, linewidth=2, markersize=6)
        place = {"xytext": (-12, 6), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"loratune, {name}", points[-1], color=color, weight="bold", **place)
    for row in rows:
        if "policy" in row:
            name, color = PEERS[row["system"]]
            point = (row["peak_gib"], row["tok_s"])
            above = row["system"] == "unsloth"  # the two points without recomputation lie close together
            axes.plot(*point, "o", color=color, markersize=7)
            axes.annotate(
                f"{name}, {PRECISIONS[row['precision']][0]},\n{POLICIES[row['policy']]}",
                point,
                xytext=(9, -2 if above else -4),
                va="bottom" if above else "top",
                textcoords="offset points",
                color=color,
                fontsize=9,
            )
    axes.set(xscale="log", xlabel="peak memory, GiB", ylabel="tokens per second", xlim=(4.2, 80), ylim=(0, 22_000))
    axes.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    machine = rows[0]["machine"].removeprefix("NVIDIA ")
    axes.set_title(f"Llama-2-7B, 4 x 2048 tokens, r = 16, one {machine}, {date_of(files)}", fontsize=11)
    figure.supxlabel(versions_of(rows), fontsize=8, color="#505050")
    save(figure, out)


def check_one_run(rows: list[Row]) -> None:
    """Raises ValueError if rows cannot come from one run."""
    for key in ("machine", "torch"):
        found = {str(row.get(key) or row["versions"][key]).partition("+")[0] for row in rows}
        if len(found) > 1:
            raise ValueError(f"rows of several runs: {key} is {', '.join(sorted(found))}")


if __name__ == "__main__":
    main()
