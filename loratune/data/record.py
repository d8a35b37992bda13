"""Records: a training example as raw object of a file and as checked content, and the contract of a record format.

A record format converts a `RawRecord` to a `Record`. Each format is one file in `formats/` and one line in
`loratune.tables.FORMATS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.errors import DataError

Message = dict[str, Any]


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
    close = difflib.get_close_matches(name, [str(field) for field in fields] if isinstance(fields, dict) else [], n=1)
    return f' Is "{close[0]}" meant to be "{name}"?' if close else ""


def quoted(names: Collection[str]) -> str:
    """The names in double quotes, separated by commas."""
    return ", ".join(f'"{name}"' for name in names)


def without_nulls(value: Any) -> Any:
    """Removes null fields. Arrow adds them to give all objects of a column one type."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
