"""Data files to raw objects: JSON, JSONL, Parquet, CSV, plain text and hub data sets.

Every object has its place (`file:line`), so that later errors can name it. A reader does not stop at the
first broken line. It yields a DataError in place of the object, so the user sees how many lines need repair.

| format     | definition                                                     |
|------------|----------------------------------------------------------------|
| JSON       | RFC 8259, so no NaN and no duplicate keys                      |
| JSON Lines | one object per line                                            |
| CSV        | RFC 4180, with a header row                                    |
| Parquet    | through pyarrow                                                |
| plain text | documents separated by blank lines, as BERT's pretraining data |

One document per text file would turn a book into one endless document, and one per line would break prose and code.
A document that contains blank lines must be stored as JSONL, in a field "text".
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loratune.data.record import RawRecord, without_nulls
from loratune.errors import DataError, nearest

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name, or owner/name:split
JSON_COLUMNS = ("messages", "conversations", "tools", "history")  # CSV cells that hold JSON
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


Found = Iterator[RawRecord | DataError]


def read_objects(path: str) -> Found:
    """Yields every object of a file or hub data set in order, with a DataError in place of each broken one.

    Args:
        path: a file with an extension of `READERS`, or `owner/name[:split]` of a hub data set if no local path has
            this name.
    Raises: DataError: the path is missing, a folder, empty or of an unknown kind.
    """
    if is_hub_id(path):
        from loratune.data.hub import read_hub  # importing `datasets` takes a second, and few runs need it

        return _not_empty(path, read_hub(path))
    reader = _reader(path)
    return _not_empty(path, reader(path))


def content_hash(path: str) -> str:
    """SHA-256 (hex) of a file's bytes, or of the rows of a hub data set. Equal hashes mean equal data.

    Raises: DataError: `path` cannot be read.
    """
    digest = hashlib.sha256()
    if is_hub_id(path):
        for found in read_objects(path):
            if isinstance(found, RawRecord):
                digest.update(json.dumps(found.fields, sort_keys=True, default=str).encode())
        return digest.hexdigest()
    _reader(path)
    with _opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_hub_id(path: str) -> bool:
    """True if `path` looks like owner/name[:split] and no local file or folder has this name."""
    looks_local = Path(path).suffix.lower() in READERS or Path(path).parent.is_dir()
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists() and not looks_local


def _reader(path: str) -> Callable[[str], Found]:
    """The reader for the file's extension. Raises DataError unless `path` is a file with content."""
    place = Path(path)
    if place.is_dir():
        inside = sorted(child.name for child in place.iterdir() if child.suffix.lower() in READERS)
        fix = f"name a file in it: {_listed(inside)}" if inside else "and it holds no data files"
        raise DataError(f"{path}: is a folder, not a data file; {fix}")
    if not place.is_file():
        raise DataError(f"{path}: no such file.{_near_files(place)}")
    if place.suffix.lower() not in READERS:
        raise DataError(
            f'{path}: unknown kind of file "{place.suffix}"; known are {", ".join(READERS)}.'
            f"{nearest(place.suffix.lower(), READERS)}"
        )
    if place.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return READERS[place.suffix.lower()]


def _near_files(place: Path) -> str:
    if not place.parent.is_dir():
        return f' The folder "{place.parent}" does not exist either.'
    names = sorted(child.name for child in place.parent.iterdir() if child.suffix.lower() in READERS)
    return nearest(place.name, names) or (f" Data files there: {_listed(names)}." if names else "")


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _not_empty(path: str, found: Found) -> Found:
    first = next(found, None)
    if first is None:
        raise DataError(f"{path}: holds no records")
    return itertools.chain([first], found)


def _opened(path: str) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _text(path: str) -> str:
    """The file's text, without byte order mark."""
    with _opened(path) as file:
        data = file.read()
    if data.startswith(UTF16_MARKS):
        raise DataError(f"{path}:1: this is UTF-16 text; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # error.object: the bytes after any mark
        raise DataError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not valid UTF-8; save the file as UTF-8"
        ) from error


# JSON


class _Strict(json.JSONDecoder):
    """A decoder for RFC 8259: no NaN, no Infinity, no duplicate keys. `json` accepts all, and keeps the last key."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_unique, parse_constant=_no_constant)


class _NotStrict(ValueError):
    """Text that `json` accepts although the standard does not."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotStrict(f'the key "{twice}" appears twice in one object; keep one of them')
    return fields


def _no_constant(name: str) -> Any:
    raise _NotStrict(f"{name} is not a JSON value; write null or leave the field out")


def _read_jsonl(path: str) -> Found:
    decoder = _Strict()
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            yield _object(source, decoder.decode(line), line)
        except json.JSONDecodeError as error:
            yield _broken(source, error.msg, error.colno, line)
        except _NotStrict as error:
            yield DataError(f"{source}: {error}")


def _object(source: str, value: Any, written: str) -> RawRecord | DataError:
    if isinstance(value, dict):
        return _half_character(source, value, written) or RawRecord(source, value)
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    kind = kinds.get(type(value), "a number")
    return DataError(f'{source}: this is {kind}; a record must be an object such as {{"text": "..."}}')


def _half_character(source: str, value: Any, written: str) -> DataError | None:
    """An error if a string holds half of a surrogate pair. JSON can escape one, but no tokenizer accepts it."""
    if "\\ud" not in written.lower():
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return DataError(f"{source}: \\u{ord(half):04x} is half of a surrogate pair, not a character; fix the text")
    return None


def _broken(source: str, message: str, column: int, line: str) -> DataError:
    hint = ""
    if line.lstrip().startswith("["):
        hint = "; a JSON array over several lines belongs into a file named .json"
    elif "'" in line[max(0, column - 2) : column + 1]:
        hint = "; JSON strings stand in double quotes"
    elif message == "Extra data":
        hint = "; JSONL holds one object per line"
    return DataError(f"{source}: broken JSON at column {column}: {message}{hint}")


def _read_json(path: str) -> Found:
    """Reads a list of objects, or {"data": [...]}, element by element, so that each has its line number."""
    text = _text(path)
    try:
        start = _list_start(path, text)
        if start < 0:  # several objects, one per line: JSONL under the name .json
            yield from _read_jsonl(path)
        else:
            yield from _elements(path, text, start)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}") from error
    except _NotStrict as error:
        raise DataError(f"{path}: {error}") from error


def _list_start(path: str, text: str) -> int:
    """Offset of the "[" that opens the list of records; -1 if the file holds JSONL."""
    start = _skip(text, 0)
    if text.startswith("[", start):
        return start
    if not text.startswith("{", start):
        raise DataError(f'{path}:1: a JSON data file is a list of objects, or {{"data": [...]}}')
    decoder, keys, at = _Strict(), [], _skip(text, start + 1)
    while not text.startswith("}", at):
        key, at = decoder.raw_decode(text, at)
        keys.append(str(key))
        at = _skip(text, at)
        if not text.startswith(":", at):
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        at = _skip(text, at + 1)
        if key == "data" and text.startswith("[", at):
            return at
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("}", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if _skip(text, at + 1) < len(text) or "\n" not in text.strip():
        return -1
    raise DataError(
        f'{path}:1: one object with the fields {_quoted(keys)}, but no list "data"; a JSON data file is a list of '
        'objects, or {"data": [...]}'
    )


def _elements(path: str, text: str, start: int) -> Found:
    decoder = _Strict()
    at, line, counted = _skip(text, start + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except _NotStrict as error:
            raise DataError(f"{path}:{line}: {error}") from error
        yield _object(f"{path}:{line}", value, text[at:end])
        at = end
        at = _skip(text, at)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' delimiter or ']'", text, at)
    whole_is_list = _skip(text, 0) == start
    if whole_is_list and _skip(text, at + 1) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, _skip(text, at + 1))
    if not whole_is_list and not text.rstrip().endswith("}"):
        raise json.JSONDecodeError("Expecting '}'", text, len(text))


def _skip(text: str, at: int) -> int:
    match = re.compile(r"[ \t\r\n]*").match(text, at)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _quoted(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


# CSV, text, Parquet


def _read_csv(path: str) -> Found:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    rows = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            source, line = f"{path}:{line}", rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = _header(source, row)
            elif len(row) != len(header):
                yield DataError(
                    f"{source}: {len(row)} cells, but the header names {len(header)} columns; "
                    "put quotes around cells that contain the delimiter"
                )
            else:
                yield _csv_record(source, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}; long texts are safer in JSONL or Parquet") from error


def _header(source: str, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    for name in names:
        if not name or names.count(name) > 1:
            fault = "a column without a name" if not name else f'the column "{name}" twice'
            raise DataError(f"{source}: the header has {fault}; the first row of a CSV file names the columns")
    return names


def _csv_record(source: str, fields: dict[str, Any]) -> RawRecord | DataError:
    for name in JSON_COLUMNS:
        if fields.get(name, "").strip():
            try:
                fields[name] = _Strict().decode(fields[name])
            except ValueError as error:
                return DataError(f'{source}: the column "{name}" must hold JSON: {error}')
    return RawRecord(
        source, {name: value for name, value in fields.items() if value != "" or name not in JSON_COLUMNS}
    )


def _read_text(path: str) -> Found:
    document: list[str] = []
    first_line = 1
    for number, line in enumerate([*_text(path).split("\n"), ""], start=1):
        if line.strip():
            if not document:
                first_line = number
            document.append(line.rstrip("\r"))
        elif document:
            yield RawRecord(f"{path}:{first_line}", {"text": "\n".join(document)})
            document = []


def _read_parquet(path: str) -> Found:
    import pyarrow  # a large library that only this format needs
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield RawRecord(f"{path}: row {number}", without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as Parquet: {reason}") from error


READERS: dict[str, Callable[[str], Found]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
}
