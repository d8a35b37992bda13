"""`loratune inspect`: the base, shape, training data and settings of an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli import process
from loratune.cli.common import AdapterFolder, parse


@dataclass(kw_only=True)
class InspectArguments:
    """Show an adapter's base, shape, training data and settings."""

    adapter: AdapterFolder
    """Folder of the adapter, in PEFT's format."""


def run(words: list[str]) -> None:
    """Reads the folder and shows the facts."""
    given = parse(InspectArguments, words, "inspect")
    with process.library_imports():
        from loratune.screen.inspect import draw, inspect

    draw(inspect(given.adapter), process.console())
