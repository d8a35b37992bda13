"""Records: a training example as raw object of a file and as checked content, and the contract of a record format.

A record format converts a `RawRecord` to a `Record`. Each format is one file in `formats/` and one line in
`loratune.tables.FORMATS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from loratune.errors import DataError

Message = dict[str, Any]
MAX_NAMES, MAX_NAME = 12, 40
"""Names in an error or a note, and characters of each."""


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One object of a data file, unchecked, with its place."""

    source: str
    """Place of the object: "train.jsonl:218", or "train.parquet: row 218"."""
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One checked training example. Exactly one of messages, (prompt, completion) and text is set."""

    source: str
    """Place of the record: "train.jsonl:218"."""
    messages: tuple[Message, ...] | None = None
    """A conversation in OpenAI's form, for the model's chat template."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    prompt: str | None = None
    """Text before the completion, used verbatim, without a template."""
    completion: str | None = None
    text: str | None = None
    """A document of which every token is trained."""


@dataclass(frozen=True)
class RecordFormat:
    """A layout of raw records that loratune can read."""

    needs: str
    """The required fields in words, for errors: '"prompt" and "completion"'."""
    uses: frozenset[str]
    """All fields that `convert` reads. Other fields of a record are reported as unused."""
    recognise: Callable[[Mapping[str, Any]], bool]
    """Returns True if an object with these fields has this format."""
    convert: Callable[[RawRecord], Record]
    """Checks a raw record and converts it. Raises DataError with the place, the cause and the fix."""


def required(raw: RawRecord, *names: str) -> Any:
    """The value of the first of these fields that the record has. Raises DataError if it has none."""
    for name in names:
        if name in raw.fields:
            return raw.fields[name]
    raise DataError(f'{raw.source}: has no "{names[0]}", but {quoted(raw.fields)}.{misspelt(names[0], raw.fields)}')


def required_text(raw: RawRecord, name: str) -> str:
    """The string in a field. Raises DataError: the field is missing or is not a string."""
    value = required(raw, name)
    if isinstance(value, float) and value != value:
        raise DataError(f'{raw.source}: "{name}" is NaN, a missing value; fill it in or leave the record out')
    if not isinstance(value, str):
        raise DataError(f'{raw.source}: "{name}" must be a string, not {type(value).__name__}')
    return value


def optional_text(raw: RawRecord, name: str) -> str:
    """The string in a field, "" if the field is missing. Raises DataError: it is not a string."""
    return required_text(raw, name) if name in raw.fields else ""


def misspelt(name: str, fields: Any) -> str:
    """A question about the field that resembles the missing `name`; "" if none does."""
    known = [str(field)[:MAX_NAME] for field in islice(fields, MAX_NAMES)] if isinstance(fields, dict) else []
    close = difflib.get_close_matches(name, known, n=1)
    return f' Is "{close[0]}" meant to be "{name}"?' if close else ""


def quoted(names: Collection[object]) -> str:
    """The first names in double quotes, separated by commas, and the number of the others.

    Names come from data files, so control characters are escaped and long names are cut.
    """
    shown = [f'"{printable(str(name))[:MAX_NAME]}"' for name in islice(names, MAX_NAMES)]
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(shown) + more


def printable(text: str) -> str:
    """The text with escapes for characters that could control a terminal or cannot be printed."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def without_nulls(value: Any) -> Any:
    """Removes null fields. Arrow adds them to give all objects of a column one type."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
