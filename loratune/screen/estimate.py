"""The estimate of a run as a table: bytes by cause, speed, and settings that make it fit."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loratune.memory.estimate import RunEstimate
from loratune.units import duration, size

_CAUSES = (
    ("base", "base model"),
    ("adapters", "adapters, masters and copies"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("kept", "activations saved for the backward"),
    ("temporary", "largest temporary"),
    ("slack", "allocator and uncertainty"),
    ("context", "CUDA context, or the process"),
)
_SHOWN = 5


def as_json(found: RunEstimate) -> dict[str, object]:
    """The estimate as plain values, in bytes and tokens per second."""
    return {
        "bytes": {name: getattr(found.choice.bytes, name) for name, _ in _CAUSES},
        "total_bytes": found.choice.bytes.total,
        "allocated_bytes": found.choice.bytes.allocated,
        "limit_bytes": found.limit,
        "fits": found.fits,
        "activations": str(found.choice.plan),
        "tokens_per_second": None if found.tokens_per_second is None else round(found.tokens_per_second),
        "note": found.why_rough,
        "changes": [
            {"what": c.what, "total_bytes": c.choice.bytes.total, "activations": str(c.choice.plan)}
            for c in found.changes
        ],
    }


def draw(found: RunEstimate, console: Console, tokens_in_all: int = 0) -> None:
    """Prints the table.

    Args:
        tokens_in_all: tokens of all rows of the run, for its duration; 0 without data.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    for name, text in _CAUSES:
        table.add_row(text, size(getattr(found.choice.bytes, name)))
    table.add_row("in all", Text(size(found.choice.bytes.total), style="bold"))
    if found.limit:
        table.add_row(f"of {found.device.name}", size(found.limit))
    console.print(table)
    console.print()
    fits = ("it fits", "bold green") if found.limit else ("on the CPU", "bold")
    verdict = fits if found.fits else (f"{size(_missing(found))} are missing", "bold red")
    console.print(Text.assemble(verdict, ("   activations: ", "dim"), str(found.choice.plan)))
    if found.tokens_per_second:
        hours = f", {duration(tokens_in_all / found.tokens_per_second)} for these data" if tokens_in_all else ""
        console.print(f"about {found.tokens_per_second:,.0f} tokens/s{hours}")
    if found.why_rough:
        console.print(
            f"note  activations are estimated from the widths of the layers ({found.why_rough})", markup=False
        )
    if found.changes:
        console.print("\nIt would fit with, fastest first:", style="bold")
    for change in found.changes[:_SHOWN]:
        console.print(f"  {change.what}   {size(change.choice.bytes.total)}, {change.choice.plan}", highlight=False)
    if not found.fits and not found.changes:
        console.print("No change of these settings makes it fit; use a smaller model or a larger device.")


def _missing(found: RunEstimate) -> int:
    return found.choice.bytes.total - found.limit
