"""The speed ladder as a table, from the rows in benchmarks/results/.

    python -m benchmarks.table RESULTS.jsonl [...]

One line per system, precision and shape: tokens per second, the ratio to the best peer of that shape in these
files, the share of the limit (`benchmarks.shapes.limit_tok_s`), peak memory, and seconds from process start to
the end of the first step. Only rows without recomputation are listed; of several rows of one kind the last
counts.
"""

from __future__ import annotations

import sys

from benchmarks.plot import CASES, SHAPES, SYSTEMS, Row, ladder_of
from benchmarks.shapes import limit_tok_s


def table(found: dict[tuple[object, ...], Row]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| shape, batch x tokens | system | tok/s | over the best peer | of the limit | peak GiB | first step, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        shape, batch, tokens = case
        peers = [found[*case, *system]["tok_s"] for system in SYSTEMS if _peer(system) and (*case, *system) in found]
        for system, (name, _) in SYSTEMS.items():
            row = found.get((*case, *system))
            if row is None:
                continue
            ratio = "" if _peer(system) or not peers else f"{row['tok_s'] / max(peers):.2f}"
            share = row["tok_s"] / limit_tok_s(shape, batch, tokens, system[1])
            lines.append(
                f"| {SHAPES[shape]}, {batch} x {tokens} | {name} | {row['tok_s']:,} | {ratio} | {share:.2f} "
                f"| {row['peak_gib']} | {row['first_step_s']} |"
            )
    return lines


def _peer(system: tuple[str, str]) -> bool:
    return system[0] != "loratune"


def main() -> None:
    found = ladder_of(sys.argv[1:])
    print("\n".join(table(found)))
    machines = sorted({str(row["machine"]) for row in found.values()})
    print(f"\nMeasured on {', '.join(machines)}; r = 16 on all seven projections, whole optimizer steps.")


if __name__ == "__main__":
    main()
