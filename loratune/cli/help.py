"""The help of a verb: common settings first, all of them with --help-all.

Lines break between words only. A number stays beside its unit, and a formula beside its operators.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from loratune.cli.options import Option, options_of, usage

_WIDEST = 100
_GLUE = "\N{NO-BREAK SPACE}"
_SECTIONS = {
    "": "Options",
    "lora": "Adapter",
    "dataset": "Data",
    "training": "Optimisation",
}


def show(kind: type[Any], verb: str, default: object, console: Console, *, everything: bool) -> None:
    """Prints the help of a verb.

    Args:
        kind: the dataclass of its arguments; its class variable COMMON may name the settings to show first.
        everything: show all settings, not only the common ones.
    """
    for line, style in _lines(kind, verb, default, screen_width(), everything=everything):
        console.print(Text(line, style=style), soft_wrap=True)


def screen_width() -> int:
    """Columns of the terminal, at most 100, since longer lines are hard to read."""
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _lines(kind: type[Any], verb: str, default: object, width: int, *, everything: bool) -> Iterator[tuple[str, str]]:
    """The lines of the help with their styles."""
    options = options_of(kind, default)
    chosen, rest = _common(kind, options)
    yield from ((line, "") for line in wrap(f"usage: loratune {verb} {usage(options)}", width, hanging=4))
    yield "", ""
    for paragraph in _paragraphs(kind.__doc__ or ""):
        yield from ((line, "") for line in wrap(paragraph, width))
    positional = [option for option in options if option.positional]
    named = [option for option in options if not option.positional]
    groups = [("Arguments", positional)]
    if everything or not rest:
        sections = dict.fromkeys(option.section for option in named)
        groups += [(_SECTIONS.get(name, name), [o for o in named if o.section == name]) for name in sections]
    else:
        groups.append(("Common options", chosen))
    for title, members in groups:
        if members:
            yield "", ""
            yield title, "bold"
            for option in members:
                yield from _entry(option, width)
    yield "", ""
    if rest and not everything:
        yield from ((line, "") for line in wrap(f"loratune {verb} --help-all shows {len(rest)} more options.", width))
    else:
        yield "  -h, --help", "cyan"
        yield from ((line, "") for line in wrap("Show this help.", width, 6, first=6))
        if rest:
            yield "  --help-all", "cyan"
            yield from ((line, "") for line in wrap("Show all options.", width, 6, first=6))


def _common(kind: type[Any], options: Sequence[Option]) -> tuple[list[Option], list[Option]]:
    """The options to show first, in the order of COMMON, and the others. Without COMMON, all come first."""
    named = {option.name: option for option in options if not option.positional}
    names: Sequence[str] = getattr(kind, "COMMON", tuple(named))
    return [named[name] for name in names], [option for name, option in named.items() if name not in names]


def _entry(option: Option, width: int) -> Iterator[tuple[str, str]]:
    """An option's names and values, and below them its meaning."""
    spelling = ", ".join([*option.short, option.flag])
    if option.is_switch and option.default is True:
        spelling += f", --no-{option.flag[2:]}"
    head = option.value if option.positional else f"{spelling} {option.value}".rstrip()
    yield from ((line, "cyan") for line in wrap(head, width, hanging=6, first=2))
    end = " Required." if option.required and not option.positional else ""
    if option.shown_default is not None:
        end = f" [default:{_GLUE}{option.shown_default.replace(' ', _GLUE)}]"
    paragraphs = [*_paragraphs(option.text)] or [""]
    paragraphs[-1] += end
    for paragraph in paragraphs:
        yield from ((line, "") for line in wrap(paragraph, width, hanging=6, first=6))


def wrap(text: str, width: int, hanging: int = 0, first: int = 0) -> list[str]:
    """Lines of at most `width` columns, broken between words. Indented text is left as it is.

    Args:
        hanging: columns of indentation of the second and later lines.
        first: columns of indentation of the first line.
    """
    if text.startswith("    "):
        return [text]
    glued = re.sub(r"(?<=\d) (?=[A-Za-z%])", _GLUE, text)
    glued = re.sub(r" (?=([/=<>]|<=|->) )", _GLUE, glued)
    glued = re.sub(rf"(?<={_GLUE}[/=<>]) |(?<=<=) ", _GLUE, glued)
    wrapper = textwrap.TextWrapper(
        width,
        initial_indent=" " * first,
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    # TextWrapper breaks at the whitespace of ASCII, so a no-break space holds words together.
    return [line.replace(_GLUE, " ") for line in wrapper.wrap(glued)] or [""]


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a docstring. A line break in the source ends one only after a full stop or a colon."""
    gathered = ""
    for line in inspect.cleandoc(text).splitlines():
        literal = line.startswith("    ")
        if gathered and (literal or not line or gathered.endswith((".", ":"))):
            yield gathered
            gathered = ""
        if literal or not line:
            yield line
        else:
            gathered = f"{gathered} {line}".strip()
    if gathered:
        yield gathered
