"""`loratune resize`: an adapter with another rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratune.cli import process
from loratune.cli.common import AdapterFolder, Folder, parse


@dataclass(kw_only=True)
class ResizeArguments:
    """Write the best approximation of an adapter with another rank, and report its error."""

    adapter: AdapterFolder
    """Folder of the adapter, in PEFT's format."""
    out: Folder
    """Folder for the new adapter."""
    rank: int
    """Rank of the new adapter."""
    overwrite: bool = False
    """Replace an existing folder."""


def run(words: list[str]) -> None:
    """Resizes the adapter and prints the error."""
    given = parse(ResizeArguments, words, "resize")
    with process.library_imports():
        from loratune.adapters.combine import resize
        from loratune.data import prompting

    resized = resize(given.adapter, given.out, given.rank, overwrite=given.overwrite)
    prompting.write(Path(given.out), prompting.read(given.adapter))
    process.console().print(str(resized), markup=False, soft_wrap=True)
