"""Draws tokens per second against peak memory for Llama-2-7B with 4 x 2048 tokens.

    python -m benchmarks.plot_memory OUT.svg RESULTS.jsonl [...]

Reads rows of `benchmarks.memory` and `benchmarks.peers`. Hollow points are peers' settings from an earlier run on
such a machine.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from benchmarks.plot import rows_of

Point = tuple[float, float]
EARLIER: dict[tuple[str, str, str], Point] = {
    ("peft", "bf16", "none"): (57.5, 13074), ("peft", "bf16", "recompute"): (17.9, 9128),
    ("peft", "nf4", "recompute"): (8.9, 8717), ("peft+liger", "bf16", "none"): (45.5, 16828),
    ("unsloth", "bf16", "none"): (43.1, 17587), ("unsloth", "bf16", "recompute"): (15.1, 12087),
    ("unsloth", "nf4", "recompute"): (6.1, 11838),
}  # fmt: skip
"""(system, precision, policy) -> (GiB, tokens per second)."""
COLORS = {"peft": ("PEFT", "#c9c9c9"), "peft+liger": ("PEFT + Liger", "#8a8a8a"), "unsloth": ("Unsloth", "#e0a458")}


def main() -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows_of(sys.argv[2:]) if r.get("shape") == "l7b" and r.get("batch") == 4 and "tok_s" in r]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    peers = {(r["system"], r["precision"], r["policy"]): (r["peak_gib"], r["tok_s"]) for r in rows if "policy" in r}
    for key, point in (EARLIER | peers).items():
        name, color = COLORS[key[0]]
        axes.plot(*point, "o", color=color, fillstyle="full" if key in peers else "none")
        above = 6 if key[0] == "unsloth" else -9  # their points lie close together
        axes.annotate(f"{name}, {key[1]}", point, xytext=(4, above), textcoords="offset points", fontsize=6)
    ours: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        if "policy" not in row:
            ours[row["precision"]].append((row["peak_gib"], row["tok_s"]))
    for (precision, points), color in zip(sorted(ours.items()), ("#3b7dd8", "#173f7a"), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), "s-", color=color, label=f"loratune, {precision}, --memory")
    axes.set(
        xscale="log",
        xlabel="peak memory, GiB",
        ylabel="tokens/s",
        xticks=[5, 10, 20, 40, 60],
        xlim=(4.3, 90),
        ylim=(0, None),
    )
    axes.set_xticklabels(["5", "10", "20", "40", "60"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    machine = next(row["machine"] for row in rows if "policy" not in row)
    axes.set_title(f"Llama-2-7B, 4 x 2048 tokens, r = 16, {machine} (hollow: earlier run)", fontsize=10)
    figure.savefig(sys.argv[1])


if __name__ == "__main__":
    main()
