"""JSON and JSON Lines to raw objects, each with its line. `.json` holds a list, {"data": [...]}, or JSON Lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from loratune.data.record import RawRecord, quoted
from loratune.data.strict_json import NotStrict, StrictDecoder
from loratune.errors import DataError

_BLANK = re.compile(r"[ \t\r\n]*")
_RECORD_FIELDS = ("messages", "conversations", "instruction", "prompt", "completion", "text")
"""Fields that mark an object as a record, also if it holds a list named "data"."""


def read_lines(path: str, text: str) -> Iterator[RawRecord | DataError]:
    """Yields the object of each line, or an error in its place."""
    decoder = StrictDecoder()
    lines = text.split("\n") if "\n" in text else text.split("\r")
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix("\ufeff")  # of a file that was appended to another
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            yield _object(source, decoder.decode(line))
        except json.JSONDecodeError as error:
            yield _broken(source, error.msg, error.colno, line)
        except NotStrict as error:
            yield DataError(f"{source}: {error}")


def read_document(path: str, text: str) -> Iterator[RawRecord | DataError]:
    """Yields the objects of a list, of {"data": [...]} or of JSON Lines, so that each has its line number."""
    try:
        start = _list_start(path, text)
        if start is None:  # several objects, one per line
            yield from read_lines(path, text)
        else:
            yield from _elements(path, text, start)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}") from error
    except NotStrict as error:
        raise DataError(f"{path}: {error}") from error


def _object(source: str, value: Any) -> RawRecord | DataError:
    if isinstance(value, dict):
        return RawRecord(source, value)
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    kind = kinds.get(type(value), "a number")
    return DataError(f'{source}: this is {kind}; a record must be an object such as {{"text": "..."}}')


def _broken(source: str, message: str, column: int, line: str) -> DataError:
    hint = ""
    if line.lstrip().startswith("["):
        hint = "; a JSON array over several lines belongs into a file named .json"
    elif "'" in line[max(0, column - 2) : column + 1]:
        hint = "; JSON strings stand in double quotes"
    elif message == "Extra data":
        hint = "; JSONL holds one object per line"
    return DataError(f"{source}: broken JSON at column {column}: {message}{hint}")


def _list_start(path: str, text: str) -> int | None:
    """Offset of the "[" that opens the list of records; None if the file holds JSON Lines."""
    start = _skip(text, 0)
    if text.startswith("[", start):
        return start
    if not text.startswith("{", start):
        raise DataError(f'{path}:1: a JSON data file is a list of objects, or {{"data": [...]}}')
    lists, keys, end = _top_level(text, start)
    behind = _skip(text, end)
    if behind < len(text):
        if "\n" not in text[start:end].strip() and "\r" not in text[start:end].strip():
            return None
        line = text.count("\n", 0, behind) + 1
        raise DataError(f"{path}:{line}: text after the object, which would be lost; a JSON file holds one value")
    if len(set(keys)) < len(keys):
        StrictDecoder().raw_decode(text, start)  # raises NotStrict, which names the key
    if "data" not in lists:
        if "\n" not in text.strip():
            return None  # one record
        raise DataError(
            f'{path}:1: one object with the fields {quoted(keys)}, but no list "data"; a JSON data file is a list of '
            'objects, or {"data": [...]}'
        )
    if any(key in keys for key in _RECORD_FIELDS):
        raise DataError(
            f'{path}:1: one object with the fields {quoted(keys)}: it could be a record or a list "data" of records; '
            "name the file .jsonl if it is a record, else remove the other field"
        )
    return lists["data"]


def _top_level(text: str, start: int) -> tuple[dict[str, int], list[str], int]:
    """Scans an object: the offsets of its lists by key, its keys, and the offset behind it."""
    decoder, at = StrictDecoder(), _skip(text, start + 1)
    lists: dict[str, int] = {}
    keys: list[str] = []
    while not text.startswith("}", at):
        if not text.startswith('"', at):
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        key, at = decoder.raw_decode(text, at)
        keys.append(key)
        at = _skip(text, at)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        at = _skip(text, at + 1)
        if text.startswith("[", at):
            lists[key] = at
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
            if text.startswith("}", at):
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        elif not text.startswith("}", at):
            raise json.JSONDecodeError("Expecting ',' delimiter or '}'", text, at)
    return lists, keys, at + 1


def _elements(path: str, text: str, start: int) -> Iterator[RawRecord | DataError]:
    decoder = StrictDecoder()
    at, line, counted = _skip(text, start + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except NotStrict as error:
            raise DataError(f"{path}:{line}: {error}") from error
        yield _object(f"{path}:{line}", value)
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
            if text.startswith("]", at):
                raise json.JSONDecodeError("Expecting value", text, at)
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' delimiter or ']'", text, at)
    if _skip(text, 0) == start and _skip(text, at + 1) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, _skip(text, at + 1))


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None  # the pattern matches the empty string
    return match.end()
