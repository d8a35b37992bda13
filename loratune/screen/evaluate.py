"""`loratune eval`: a table of the measurements, and the first wrong answers.

A share of right answers does not show the kind of error: a date with the month first, or an answer that never ends.
So wrong answers are shown beside the right ones. `as_json` gives the same values to programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loratune.infer.evaluate import Answer, Evaluation
from loratune.screen.text import visible
from loratune.units import duration

MAX_CHARACTERS = 240  # of a prompt or an answer; the middle of a longer one is left out


def draw(evaluations: Sequence[Evaluation], console: Console, *, data: str, wrong: int = 3) -> None:
    """Draws one row per model, then up to `wrong` wrong answers of each.

    Args:
        data: name of the data, for the title.
    """
    console.print(Text(data, style="bold"), soft_wrap=True)
    console.print(_table(evaluations))
    for evaluation in evaluations:
        if evaluation.exact is not None and evaluation.exact.wrong and wrong > 0:
            _draw_wrong(evaluation.name, evaluation.exact.wrong, wrong, console)


def as_json(evaluations: Sequence[Evaluation], *, data: str, answers: bool = False) -> dict[str, Any]:
    """The measurements as plain values: {"data": ..., "results": [...]}."""
    return {"data": data, "results": [evaluation.as_json(answers=answers) for evaluation in evaluations]}


def _table(evaluations: Sequence[Evaluation]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True, style="bold")
    for heading in ("loss", "perplexity", "exact match", "correct", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max((e.exact.correct for e in evaluations if e.exact is not None), default=0)
    for evaluation in evaluations:
        loss, exact = evaluation.loss, evaluation.exact
        share = Text("")
        if exact is not None:
            share = Text(f"{exact.share:.1%}", style="green bold" if exact.correct == best > 0 else "")
        table.add_row(
            evaluation.name,
            "" if loss is None else f"{loss.nats_per_token:.4f}",
            "" if loss is None else f"{loss.perplexity:,.3g}" if loss.perplexity < 1e6 else f"{loss.perplexity:.1e}",
            share,
            "" if exact is None else f"{exact.correct:,} of {len(exact.answers):,}",
            "" if exact is None else duration(exact.seconds),
        )
    return table


def _draw_wrong(name: str, answers: Sequence[Answer], limit: int, console: Console) -> None:
    shown = answers[:limit]
    count = f"{len(shown):,} of {len(answers):,} wrong answers" if len(answers) > limit else "wrong answers"
    console.print(Text.assemble((name, "bold"), f"  {count}"), soft_wrap=True)
    for answer in shown:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("asked", _short(answer.prompt))
        table.add_row("wanted", Text(_short(answer.reference), style="green"))
        table.add_row("got", Text(_short(answer.answer) or "(nothing)", style="red"))
        console.print(Padding(table, (1, 0, 0, 2)))
    console.print()


def _short(text: str) -> str:
    """The text without its middle if it is long, and with control characters made visible."""
    text = visible(text.strip())
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"
