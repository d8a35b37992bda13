"""Draws our speed and the peers' from the rows in benchmarks/results/.

    python -m benchmarks.plot speed OUT.svg RESULTS.jsonl [...]      bars, one group per shape and batch
    python -m benchmarks.plot curves OUT.svg CURVES.jsonl            held-out loss of `benchmarks.curves`

If a system has several rows for one shape, the last counts, so newer files come last. Only rows without
recomputation are drawn. Bars of peers from another run (`run` in the row) are hatched.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

SHAPES = {
    "l7b": "Llama-2-7B", "q8b": "Qwen3-8B", "l1b": "Llama-3.2-1B", "q0_6b": "Qwen3-0.6B",
}  # fmt: skip
CASES = (("l7b", 4, 2048), ("q8b", 2, 2048), ("l7b", 1, 512), ("l1b", 4, 2048), ("q0_6b", 2, 2048), ("l1b", 1, 512))
SYSTEMS = {
    ("peft", "bf16"): ("PEFT", "#c9c9c9"),
    ("peft+liger", "bf16"): ("PEFT + Liger", "#9a9a9a"),
    ("unsloth", "bf16"): ("Unsloth", "#e0a458"),
    ("loratune", "bf16"): ("loratune", "#3b7dd8"),
    ("loratune", "nf4"): ("loratune, NF4 base", "#8fb8ec"),
    ("loratune", "fp8"): ("loratune, FP8 base", "#173f7a"),
}
_UNRECOMPUTED = (None, "graph", "none")
Row = dict[str, Any]


def rows_of(files: Iterable[str]) -> list[Row]:
    """All rows of JSONL files in order."""
    lines = (line for file in files for line in Path(file).read_text(encoding="utf-8").splitlines())
    return [json.loads(line) for line in lines if line.strip()]


def ladder_of(files: Iterable[str]) -> dict[tuple[object, ...], Row]:
    """(shape, batch, tokens, system, precision) -> its last row without recomputation."""
    return {
        (row["shape"], row["batch"], row["tokens"], row["system"], row.get("precision", "bf16")): row
        for row in rows_of(files)
        if "tok_s" in row and row.get("policy") in _UNRECOMPUTED
    }


def speed(out: str, files: list[str]) -> None:
    """Bars of tokens per second, one small chart per shape, since shapes differ tenfold."""
    found = ladder_of(files)
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.0))
    for axis, case in zip(axes.flat, CASES, strict=True):
        bars = [(name, color, found.get((*case, *system))) for system, (name, color) in SYSTEMS.items()]
        present = [(name, color, row) for name, color, row in bars if row is not None]
        longest = max((row["tok_s"] for _, _, row in present), default=1)
        for at, (name, color, row) in enumerate(present):
            hatch = "///" if "run" in row else None
            axis.barh(at, row["tok_s"], color=color, hatch=hatch, edgecolor="white", linewidth=0)
            inside = row["tok_s"] > longest / 3  # a short bar has its name behind it
            behind = f" {row['tok_s']:,}" if inside else f" {name}  {row['tok_s']:,}"
            axis.text(row["tok_s"], at, behind, va="center", fontsize=7)
            if inside:
                axis.text(
                    0, at, f" {name}", va="center", fontsize=7, color="white" if "loratune" in name else "black"
                )
        shape, batch, tokens = case
        axis.set_title(f"{SHAPES[shape]}, {batch} x {tokens}", fontsize=9)
        axis.set_yticks([])
        axis.set_xlim(0, 1.25 * longest)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    machines = sorted({str(row["machine"]).removeprefix("NVIDIA ") for row in found.values() if "run" not in row})
    figure.suptitle(f"LoRA on one {', '.join(machines)}: tokens a second, whole step", fontsize=10)
    _save(figure, out)


def curves(out: str, files: list[str]) -> None:
    """Held-out loss over steps: mean and range of the seeds, one chart per model."""
    rows = rows_of(files)
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.4), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=True):
        by_variant: dict[str, list[dict[str, float]]] = defaultdict(list)
        for row in rows:
            if row["model"] == model:
                by_variant[row["variant"]].append(row["held_out"])
        for (variant, runs), style in zip(by_variant.items(), ("-", "--", ":", "-"), strict=False):
            steps = list(runs[0])
            columns = [[run[step] for run in runs] for step in steps]
            at = [int(step) for step in steps]
            axis.plot(at, [sum(c) / len(c) for c in columns], style, label=variant, linewidth=1.2)
            axis.fill_between(at, [min(c) for c in columns], [max(c) for c in columns], alpha=0.15)
        axis.set_title(model, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.set_ylabel("held-out loss", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7)
    _save(figure, out)


def _save(figure: Any, out: str) -> None:
    figure.tight_layout()
    plt.rcParams["svg.hashsalt"] = "loratune"  # the same picture from the same rows
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    kind, out, *files = sys.argv[1:]
    {"speed": speed, "curves": curves}[kind](out, files)


if __name__ == "__main__":
    main()
