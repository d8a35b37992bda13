"""Draws our speed and the peers' from the rows in benchmarks/results/.

    python -m benchmarks.plot speed OUT.svg RESULTS.jsonl [...]      bars, one group per shape and batch
    python -m benchmarks.plot curves OUT.svg RESULTS.jsonl [...]     loss of 8-bit and 4-bit bases relative to bf16

`speed` draws rows without recomputation; if a system has several rows for one shape, the last counts, so newer files
come last. `curves` reads rows of `benchmarks.curves` and `benchmarks.nf4_loss`.
The pictures in docs/ come from 2026-11-26-h200-ladder-2.jsonl (speed), and from 2026-11-25-h200-curves.jsonl and
2026-11-26-h200-nf4-loss.jsonl (curves).
"""

from __future__ import annotations

import json
import re
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
    ("peft", "bf16"): ("PEFT", "#d4d4d4"),
    ("peft+liger", "bf16"): ("PEFT + Liger", "#b4b4b4"),
    ("unsloth", "bf16"): ("Unsloth", "#e8b877"),
    ("loratune", "bf16"): ("loratune", "#7fb0ee"),
    ("loratune", "nf4"): ("loratune, NF4 base", "#a9cbf5"),
    ("loratune", "fp8"): ("loratune, FP8 base", "#5b93dc"),
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
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 4.8), height_ratios=(5, 3), layout="constrained")
    for axis, case, slots in zip(axes.flat, CASES, (5, 5, 5, 3, 3, 3), strict=True):
        bars = [(name, color, found.get((*case, *system))) for system, (name, color) in SYSTEMS.items()]
        present = [(name, color, row) for name, color, row in bars if row is not None]
        longest = max((row["tok_s"] for _, _, row in present), default=1)
        for at, (name, color, row) in enumerate(present):
            inside = row["tok_s"] > longest / 2  # a short bar has its name behind it
            axis.barh(at, row["tok_s"], color=color, height=0.75)
            axis.text(row["tok_s"], at, f" {row['tok_s']:,}" if inside else f" {name}  {row['tok_s']:,}", va="center")
            if inside:
                axis.text(0.02 * longest, at, name, va="center")
        shape, batch, tokens = case
        axis.set_title(f"{SHAPES[shape]}, {batch} x {tokens}", fontsize=10, loc="left", weight="bold")
        axis.set_xlim(0, 1.3 * longest)
        axis.set_ylim(len(present) - 0.4 - slots, len(present) - 0.4)  # bars of one height, from the top
        axis.axis("off")
    drawn = [row for (shape, batch, tokens, *_), row in found.items() if (shape, batch, tokens) in CASES]
    machines = sorted({str(row["machine"]).removeprefix("NVIDIA ") for row in drawn})
    figure.suptitle(
        f"LoRA on one {', '.join(machines)}: tokens per second, whole step, {date_of(files)}", fontsize=11
    )
    figure.supxlabel(versions_of(drawn), fontsize=8, color="#505050")
    save(figure, out)


def curves(out: str, files: list[str]) -> None:
    """Held-out loss relative to bf16 with the same seed, in percent over steps; one line per seed."""
    rows = rows_of(files)
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained", sharey=True)
    eight = {
        "larger": ("79 million parameters", "#3b7dd8", "o-"),
        "pocket": ("5 million parameters", "#707070", "s--"),
    }
    for model, (label, color, style) in eight.items():
        for seed in (0, 1, 2):
            runs = {
                r["variant"]: r["held_out"]
                for r in rows
                if r.get("model") == model and r["seed"] == seed and "variant" in r
            }
            _line(axes[0], runs["graph"], runs["fp8"], label if seed == 0 else None, color, style)
    axes[0].set_title("8-bit base (FP8) over bf16", fontsize=10, loc="left", weight="bold")
    four = {
        "loratune nf4": ("loratune, NF4", "#3b7dd8", "o-"),
        "bitsandbytes + PEFT": ("bitsandbytes + PEFT", "#c47f1f", "s--"),
    }
    for system, (label, color, style) in four.items():
        for seed in (0, 1, 2):
            runs = {r["system"]: r["heldout_at"] for r in rows if "heldout_at" in r and r["seed"] == seed}
            _line(axes[1], runs["loratune bfloat16"], runs[system], label if seed == 0 else None, color, style)
    axes[1].set_title("4-bit base over bf16, 79 million parameters", fontsize=10, loc="left", weight="bold")
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel("step")
        axis.set_xticks([10, 20, 40, 80, 120])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="upper right")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("difference of held-out loss, %")
    axes[0].set_ylim(-0.1, 0.6)
    figure.supxlabel(f"one {_machine(rows)}, three seeds each, {date_of(files)}", fontsize=8, color="#505050")
    save(figure, out)


def _line(
    axis: Any, base: dict[str, float], other: dict[str, float], label: str | None, color: str, style: str
) -> None:
    steps = list(base)
    percent = [100 * (other[step] / base[step] - 1) for step in steps]
    axis.plot([int(step) for step in steps], percent, style, color=color, label=label, linewidth=1.3, markersize=4)


def _machine(rows: list[Row]) -> str:
    return " or ".join(sorted({str(row["machine"]).removeprefix("NVIDIA ") for row in rows if "machine" in row}))


def versions_of(rows: list[Row]) -> str:
    """Versions of all packages in the rows, in one line."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        versions = row.get("versions", {key: row[key] for key in ("torch", "transformers") if key in row})
        for name in ("torch", "transformers", "peft", "liger-kernel", "unsloth", "bitsandbytes"):
            if name in versions:
                found[name].add(str(versions[name]).partition("+")[0])
    flash = ["loratune with FlashAttention 4"] if any(row.get("attention") == "flash4" for row in rows) else []
    return "; ".join([", ".join(f"{name} {'/'.join(sorted(v))}" for name, v in found.items()), *flash])


def date_of(files: list[str]) -> str:
    """Dates in the names of the files, such as 2026-11-26."""
    dates = sorted({match[0] for file in files if (match := re.search(r"\d{4}-\d\d-\d\d", Path(file).name))})
    return " and ".join(dates)


def save(figure: Any, out: str) -> None:
    """Writes the same picture from the same rows."""
    plt.rcParams["svg.hashsalt"] = "loratune"
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    kind, out, *files = sys.argv[1:]
    {"speed": speed, "curves": curves}[kind](out, files)


if __name__ == "__main__":
    main()
