"""Parts that the arguments of several verbs share: positional names, the parser, and helpers.

A verb's arguments are a dataclass from which tyro makes the parser; its docstrings are the help texts (`cli.help`).
Settings of a section lose the section's name on the command line: `--r 8` instead of `--lora.r 8`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import Positional

from loratune.cli import help, process
from loratune.cli.options import options_of, translate
from loratune.errors import ConfigError

T = TypeVar("T")
ModelName = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
DataNames = Annotated[
    Positional[list[str]], tyro.conf.arg(metavar="DATA [DATA ...]", help_behavior_hint="(required)")
]
AdapterFolder = Annotated[Positional[str], tyro.conf.arg(metavar="ADAPTER")]
AdapterFolders = Annotated[
    Positional[list[str]], tyro.conf.arg(metavar="ADAPTER [ADAPTER ...]", help_behavior_hint="(required)")
]
Folder = Annotated[str, tyro.conf.arg(metavar="DIR")]


def parse(kind: type[T], words: list[str], verb: str, default: T | None = None) -> T:
    """Builds a verb's arguments from the words after it. Prints the help instead, and exits, if the words ask for it.

    If the words do not fit, prints the error and exits with status 2.
    Raises: ConfigError: an option is unknown, or a value is out of range.
    """
    options = options_of(kind, default)
    everything = "--help-all" in words
    if everything or "--help" in words or "-h" in words:
        help.show(kind, verb, default, process.console(), everything=everything)
        sys.exit(0)
    words = translate(words, options, verb)
    parsed: T = tyro.cli(kind, args=words, prog=f"loratune {verb}", default=default)  # type: ignore[assignment]
    return parsed


def module_names(modules: str | list[str] | None) -> str | list[str] | None:
    """Turns a single word into a list with one name, unless it can only be a regular expression."""
    return [modules] if isinstance(modules, str) and re.fullmatch(r"[\w.]+", modules) else modules


def as_plain(kind: type[T], value: Any) -> T:
    """Converts `value`, an instance of a subclass of `kind`, to an instance of `kind` itself."""
    return kind(**{f.name: getattr(value, f.name) for f in fields(kind)})  # type: ignore[arg-type]


def require_data(data: list[str]) -> None:
    """Raises ConfigError if there are no data files."""
    if not data:
        raise ConfigError("no data files given")


def take_option(words: list[str], *names: str) -> tuple[list[str], str | None]:
    """Splits `NAME VALUE` or `NAME=VALUE` off the words. Returns: the other words, and VALUE or None.

    Raises: ConfigError: the name is the last word.
    """
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            if equals:
                return words[:at] + words[at + 1 :], value
            if at + 1 == len(words):
                raise ConfigError(f"{name} needs a value")
            return words[:at] + words[at + 2 :], words[at + 1]
    return words, None
