"""Draws docs/demo.svg from a real run of the demo: python docs/make_pictures.py

It is an excerpt of one screen without the base's answers, the progress of the training and the last chapter.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from loratune.demo import demo

WIDTH = 94
SCREEN = 42
"""Lines of the picture at most."""


def main() -> None:
    """Runs the demo and writes the picture."""
    printed = recorder()
    demo(None, printed)
    drawn = picture(excerpt(Text.from_ansi(printed.export_text(styles=True)).split("\n")))
    (Path(__file__).parent / "demo.svg").write_text(drawn, encoding="utf-8")


def recorder() -> Console:
    """A console that records its lines and displays none."""
    return Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", highlight=False)


def excerpt(lines: Iterable[Text]) -> Iterator[Text]:
    """The lines that the picture shows, never two blank ones in a row."""
    hidden, blank = "", True
    for line in lines:
        words = line.plain.strip()
        if words.startswith("Your turn"):
            return
        if (hidden == "answers" and not words) or (hidden == "progress" and words.startswith("loss ")):
            hidden = ""
        if words.startswith("asked") and "base says" in words:
            hidden = "answers"
        if not hidden and (words or not blank):
            yield line
            blank = not words
        if words.startswith("Training the adapter"):
            hidden = "progress"


def picture(lines: Iterable[Text]) -> str:
    """SVG of these lines. Raises ValueError: they fill more than a screen."""
    screen = recorder()
    shown = list(lines)
    if len(shown) > SCREEN:
        raise ValueError(f"{len(shown)} lines, but a screen has {SCREEN}")
    for line in shown:
        screen.print(line, no_wrap=True, overflow="crop")
    drawn = screen.export_svg(title="loratune demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # the reader's own monospace font will do


if __name__ == "__main__":
    main()
