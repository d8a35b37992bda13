"""The console that everything is printed with: text from files and models is shown, never obeyed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from loratune.screen.text import visible


class PlainConsole(Console):
    """A console on which strings mean themselves.

    - Brackets are no markup and `:name:` is no emoji: an adapter called "[bold]" keeps its name. Styles come from
      `rich.text.Text`.
    - Control characters become visible symbols, so that no file can move the cursor or write to the clipboard.
    - Numbers are not coloured.
    - A closed pipe raises BrokenPipeError.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """As rich's, with visible control characters, whose width then counts."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with visible control characters. rich's own control codes are marked and pass."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def on_broken_pipe(self) -> None:
        """Leaves the error to the caller; rich's own reaction is to exit with status 1."""
        raise BrokenPipeError
