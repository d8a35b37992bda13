"""Tokens a second against peak memory, Llama-2-7B on 4 x 2048 tokens.

    python -m benchmarks.plot_memory RESULTS.jsonl OUT.png

Ours from the rows of `benchmarks.memory`, those left out whose note says that their peak was of a fault since mended.
The peers' points are those of an earlier run on such a machine, as benchmarks/NOTES.md says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PEERS = {
    "PEFT": [(57.5, 13074), (17.9, 9128), (8.9, 8717)],
    "PEFT + Liger": [(45.5, 16828), (16.2, 11684), (7.2, 10971)],
    "Unsloth": [(43.1, 17587), (15.1, 12087), (6.1, 11838)],
}
_FAULTY = ("full", "offload")


def ours(file: Path) -> dict[str, list[tuple[float, float]]]:
    """Precision to (peak GiB, tokens a second), by memory."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        faulty = row.get("run") in ("first", "second") and row["plan"].startswith(_FAULTY)
        if row["shape"] == "l7b" and row.get("batch") == 4 and "tok_s" in row and not faulty and row["base_gib"] < 14:
            found.setdefault(row["precision"], []).append((row["peak_gib"], row["tok_s"]))
    return {precision: sorted(points) for precision, points in found.items()}


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in PEERS.items():
        axes.plot(*zip(*points, strict=True), "o", label=f"{name}, earlier run", alpha=0.7)
    for precision, points in ours(Path(sys.argv[1])).items():
        axes.plot(*zip(*points, strict=True), "s-", label=f"loratune, {precision}")
    axes.set(xscale="log", xlabel="peak memory, GiB", ylabel="tokens/s", xticks=[5, 10, 20, 40, 60])
    axes.set_xticklabels(["5", "10", "20", "40", "60"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title("Llama-2-7B, 4 x 2048 tokens, r = 16, one H200", fontsize=10)
    figure.savefig(sys.argv[2], dpi=150)


if __name__ == "__main__":
    main()
