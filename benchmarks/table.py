"""The speed ladder as a table, from the rows in benchmarks/results/.

    python -m benchmarks.table RESULTS.jsonl [...]

One line for each system, precision and shape: tokens a second, over the best peer of that shape in these files, the
share of the limit (`benchmarks.shapes.limit_tok_s`), peak memory, and seconds from the start of the process, weights
made on the GPU, to the end of the first step. Only rows without recomputation are listed; of several of one kind the
last counts.
"""

from __future__ import annotations

import sys

from benchmarks.plot import CASES, OURS, SHAPES, SYSTEMS, Row, rows_of
from benchmarks.shapes import limit_tok_s


def table(rows: list[Row]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| shape, batch x tokens | system | tok/s | over the best peer | of the limit | peak GiB | first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, batch, tokens in CASES:
        of_case = {
            (row["system"], row.get("precision", "bf16")): row
            for row in rows
            if (row.get("shape"), row.get("batch"), row.get("tokens")) == (shape, batch, tokens)
            and row.get("policy") in OURS
        }
        peers = [row["tok_s"] for (system, _), row in of_case.items() if system != "loratune"]
        for (system, precision), (name, _) in SYSTEMS.items():
            row = of_case.get((system, precision))
            if row is None:
                continue
            ratio = f"{row['tok_s'] / max(peers):.2f}" if peers and system == "loratune" else ""
            share = row["tok_s"] / limit_tok_s(shape, batch, tokens, precision)
            lines.append(
                f"| {SHAPES[shape]}, {batch} x {tokens} | {name} | {row['tok_s']:,} | {ratio} | {share:.2f} "
                f"| {row['peak_gib']} | {row['first_step_s']} |"
            )
    return lines


def main() -> None:
    rows = rows_of(sys.argv[1:])
    print("\n".join(table(rows)))
    machines = sorted({str(row["machine"]) for row in rows})
    print(f"\nMeasured on {', '.join(machines)}; r = 16 on all seven projections, whole optimizer steps.")


if __name__ == "__main__":
    main()
