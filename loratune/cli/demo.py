"""`loratune demo`: the whole journey on the bundled model."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli import process
from loratune.cli.common import parse


@dataclass(kw_only=True)
class DemoArguments:
    """Train two adapters on the bundled model, switch, merge and verify. Needs no network and no GPU."""

    out: str | None = None
    """Folder for the adapters, the plots and demo.json; by default they are deleted at the end."""
    overwrite: bool = False
    """Replace an existing folder."""


def run(words: list[str]) -> None:
    """Runs the demo."""
    given = parse(DemoArguments, words, "demo")
    with process.library_imports():
        from loratune.demo import demo

    with process.one_torch_thread():
        demo(given.out, process.console(), overwrite=given.overwrite)
