"""`loratune preview`: the data as the model sees it, before any time is spent on training.

Typical faults of fine-tuning are visible here: a template that prints two BOS tokens, an answer that never ends, a
trained prompt. So the preview shows the tokens themselves. Trained tokens are coloured, the token that ends an answer
is marked, and special tokens have their names. Neighbouring tokens alternate between two shades. Without colour
(NO_COLOR, a file, a simple terminal) brackets enclose the trained tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import ROUNDED
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from loratune.config import TrainConfig
from loratune.data.examples import Example
from loratune.data.feed import Dataset, EpochRows
from loratune.data.template import decode, special_tokens
from loratune.training.choices import ChosenSettings, remarks

TOKENS_SHOWN = 360  # per example; the middle of a longer one is left out
BAR_WIDTH = 40
BINS = 8
EIGHTHS = " ▏▎▍▌▋▊▉█"

TRAINED = (Style(color="#e6fbe9", bgcolor="#1c5a34"), Style(color="#e6fbe9", bgcolor="#257343"))
CONTEXT = (Style(color="#8e959e"), Style(color="#6f7680"))
SPECIAL = Style(color="#5fa8d3")
SPECIAL_TRAINED = Style(color="#a7e0ff", bgcolor="#1c5a34")
STOP = Style(color="#1d1300", bgcolor="#f0b429", bold=True)
QUIET = Style(color="#808790")
BAR = Style(color="#3f9c63")
WARN = Style(color="#f0b429", bold=True)


@dataclass(frozen=True, slots=True)
class Piece:
    """One token as text, or several tokens that form one character."""

    text: str
    trained: bool
    special: bool
    stop: bool


@dataclass(frozen=True, slots=True)
class Marks:
    """Symbols that a console can show."""

    newline: str
    tab: str
    open_trained: str
    close_trained: str
    stop: str
    bullet: str
    ellipsis: str
    all_characters: bool


UNICODE = Marks("↵", "⇥", "⟦", "⟧", "■", "•", "…", all_characters=True)
ASCII = Marks("\\n", "\\t", "[[", "]]", "#", "-", "...", all_characters=False)


def draw_preview(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    rows: EpochRows,
    *,
    stop_ids: frozenset[int],
    show: int = 3,
    chosen: ChosenSettings,
) -> None:
    """Draws the first examples token by token, then lengths, rows, notes and warnings.

    Args:
        rows: the rows of one epoch of dataset.train.
        stop_ids: tokens at which generation stops.
        show: number of examples to draw.
        chosen: settings of a run on these data, with the choices among them.
    """
    marks = ASCII if console.options.ascii_only else UNICODE
    coloured = console.color_system is not None and not console.no_color
    console.print(_legend(coloured, marks), "")
    specials = special_tokens(tokenizer)
    for example in dataset.train[:show]:
        console.print(_example_panel(example, tokenizer, specials, stop_ids, coloured, marks))
    if len(dataset.train) > show:
        console.print(Text(f"  {marks.ellipsis} and {len(dataset.train) - show:,} more", QUIET))
    console.print(Padding(_facts(dataset, rows), (1, 0, 0, 0)))
    console.print(_histogram([len(example) for example in dataset.train], console.options.ascii_only))
    if chosen.choices:
        console.print(_choices(chosen))
    _draw_notes(console, dataset.notes, warnings(dataset, rows, chosen.training), marks)


def warnings(dataset: Dataset, rows: EpochRows, training: TrainConfig) -> list[str]:
    """Sentences about properties of the data that are probably unintended.

    Args:
        training: settings of the run, for its number of steps.
    """
    steps = training.max_steps or math.ceil(len(rows) * training.passes / training.rows_per_step)
    longest = max(len(example) for example in dataset.train)
    found = [text[0].upper() + text[1:] + "." for text in remarks(rows.fullness, steps, rows.tokens_per_row, longest)]
    if not dataset.eval:
        found.append("Nothing is held out, so overfitting will not be noticed.")
    return found


# tokens


def _legend(coloured: bool, marks: Marks) -> Text:
    legend = Text("  ")
    if not coloured:
        legend.append(f"{marks.open_trained}trained{marks.close_trained}   not trained   ")
        return legend.append(f"{marks.stop} comes before the token that ends an answer")
    legend.append(" trai", TRAINED[0]).append("ned ", TRAINED[1]).append("  ")
    legend.append("not tr", CONTEXT[0]).append("ained", CONTEXT[1]).append("   ")
    legend.append("ends an answer", STOP).append("   ")
    legend.append("special token", SPECIAL).append("   ")
    return legend.append("two shades of a colour: two tokens", QUIET)


def _example_panel(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    specials: frozenset[int],
    stop_ids: frozenset[int],
    coloured: bool,
    marks: Marks,
) -> Panel:
    first, last = _shown(len(example))
    body = Text()
    for part in (first, last):
        if part.start:
            body.append(f"\n   {marks.ellipsis} {part.start - first.stop:,} tokens {marks.ellipsis}\n", QUIET)
        pieces = _pieces(example, part, tokenizer, specials, stop_ids)
        body.append_text(_coloured(pieces, marks) if coloured else _bracketed(pieces, marks))
    trained = int((example.weights > 0).sum())
    body.rstrip()
    return Panel(
        body,
        box=ROUNDED,
        border_style=QUIET,
        title=Text(example.source),
        title_align="left",
        subtitle=Text(f"{len(example):,} tokens, {trained:,} trained"),
        subtitle_align="right",
    )


def _shown(length: int) -> tuple[range, range]:
    """Token ranges to draw: the beginning, and the end of a long example (otherwise an empty range)."""
    if length <= TOKENS_SHOWN:
        return range(length), range(0)
    return range(TOKENS_SHOWN // 2), range(length - TOKENS_SHOWN // 2, length)


def _pieces(
    example: Example,
    part: range,
    tokenizer: PreTrainedTokenizerBase,
    specials: frozenset[int],
    stop_ids: frozenset[int],
) -> Iterator[Piece]:
    """Tokens as text, decoded as growing prefixes, because some tokenizers drop the space of a single token."""
    ids = example.token_ids[part.start : part.stop].tolist()
    weights = example.weights[part.start : part.stop].tolist()
    before = ""
    for end, (token, weight) in enumerate(zip(ids, weights, strict=True), start=1):
        text = decode(tokenizer, ids[:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue  # bytes of a character that the next token completes
        yield Piece(text[len(before) :], weight > 0, token in specials, weight > 0 and token in stop_ids)
        before = text


def _coloured(pieces: Iterator[Piece], marks: Marks) -> Text:
    text = Text()
    for number, piece in enumerate(pieces):
        if piece.stop:
            style = STOP
        elif piece.special:
            style = SPECIAL_TRAINED if piece.trained else SPECIAL
        else:
            style = (TRAINED if piece.trained else CONTEXT)[number % 2]
        _append(text, piece.text, style, marks)
    return text


def _bracketed(pieces: Iterator[Piece], marks: Marks) -> Text:
    text = Text()
    inside = False
    for piece in pieces:
        if piece.trained != inside:
            text.append(marks.open_trained if piece.trained else marks.close_trained)
            inside = piece.trained
        if piece.stop:
            text.append(marks.stop)
        _append(text, piece.text, Style(), marks)
    if inside:
        text.append(marks.close_trained)
    return text


def _append(text: Text, piece: str, style: Style, marks: Marks) -> None:
    """Appends a token with visible white space. Colour ends with the text of a line."""
    for at, line in enumerate(piece.replace("\t", marks.tab).split("\n")):
        if at:
            text.append(marks.newline, style + Style(dim=True)).append("\n")
        text.append("".join(_visible(char, marks) for char in line), style)


def _visible(char: str, marks: Marks) -> str:
    shown = char.isprintable() and (marks.all_characters or char.isascii())
    return char if shown else ascii(char)[1:-1]


# figures


def _facts(dataset: Dataset, rows: EpochRows) -> Table:
    lengths = [len(example) for example in dataset.train]
    tokens = sum(lengths)
    trained = int(sum((example.weights > 0).sum() for example in dataset.train))
    longest = max(dataset.train, key=len)
    facts = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
    facts.add_column(style=QUIET, justify="right")
    facts.add_column()
    facts.add_row("documents", f"{len(lengths):,} to train on, {len(dataset.eval):,} held out")
    facts.add_row("tokens", f"{tokens:,}, of which {trained:,} ({trained / tokens:.0%}) are trained")
    facts.add_row("lengths", Text(f"median {median(lengths):,.0f}, longest {len(longest):,} ({longest.source})"))
    plural = "" if len(rows) == 1 else "s"
    facts.add_row(
        "an epoch", f"{len(rows):,} row{plural} of {rows.tokens_per_row:,} tokens, {rows.fullness:.1%} full"
    )
    return facts


def _choices(chosen: ChosenSettings) -> Group:
    """The settings that `train` chooses for these data, one line each."""
    lines = [Text(f"    {choice}") for choice in chosen.choices]
    return Group(Text("\n  settings that train chooses if they are not given\n", QUIET), *lines)


def _histogram(lengths: Sequence[int], ascii_only: bool) -> Group:
    width = _nice((max(lengths) - min(lengths) + 1) / BINS)
    counts = Counter(length // width for length in lengths)
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
    table.add_column(justify="right", style=QUIET)
    table.add_column()
    table.add_column(justify="right")
    for number in range(min(counts), max(counts) + 1):
        span = f"{number * width:,} to {(number + 1) * width - 1:,}" if width > 1 else f"{number:,}"
        bar = Text(_bar(counts[number] / max(counts.values()), ascii_only), BAR)
        table.add_row(span, bar, f"{counts[number]:,}")
    return Group(Text("\n  documents by length in tokens\n", QUIET), table)


def _nice(step: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least `step`."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= step:
                return factor * power
        power *= 10


def _bar(share: float, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(share * BAR_WIDTH) or ("." if share else "")
    eighths = round(share * BAR_WIDTH * 8) or (1 if share else 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _draw_notes(console: Console, notes: Sequence[str], found: Sequence[str], marks: Marks) -> None:
    table = Table.grid(padding=(0, 1))
    for note in notes:
        table.add_row(Text(f"  {marks.bullet}", QUIET), Text(note))
    for warning in found:
        table.add_row(Text("  !", WARN), Text(warning))
    if table.row_count:
        console.print()
        console.print(table)
