"""A verb in one file: `loratune count DATA ... [--format F] [--per-file]` counts records."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli import process
from loratune.cli.common import DataNames, parse, require_data
from loratune.config import DataFormat


@dataclass(kw_only=True)
class CountArguments:
    """Count the records of data files."""

    data: DataNames
    """Files to count."""
    format: DataFormat = "auto"
    """Record format, as in train."""
    per_file: bool = False
    """Print one line for each file."""

    def __post_init__(self) -> None:
        require_data(self.data)


def run(words: list[str]) -> None:
    """Reads the files and prints the counts."""
    given = parse(CountArguments, words, "count")
    with process.library_imports():
        from loratune.data.records import read_records

    groups = [[path] for path in given.data] if given.per_file else [given.data]
    for paths in groups:
        print(f"{len(read_records(paths, given.format))} records in {', '.join(paths)}")
