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

import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loratune import foreign
from loratune.data import json_files, strict_json
from loratune.data.memory import RecordsInMemory
from loratune.data.record import RawRecord, printable, quoted, without_nulls
from loratune.errors import DataError, nearest

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")  # owner/name, or owner/name:split
JSON_COLUMNS = ("messages", "conversations", "tools", "history")  # CSV cells that hold JSON
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_LINE_END = re.compile(r"\r\n|\n|\r")
_LINE_ENDS = ("\r\n", "\n", "\r")


Found = Iterator[RawRecord | DataError]


def read_objects(path: str) -> Found:
    """Yields every object of a file or hub data set in order, with a DataError in place of each broken one.

    Args:
        path: a file with an extension of `READERS`; `owner/name[:split]` of a hub data set if no local path has
            this name; or `RecordsInMemory`.
    Raises: DataError: the path is missing, a folder, empty or of an unknown kind.
    """
    if isinstance(path, RecordsInMemory):
        return _not_empty(path, path.objects())
    if is_hub_id(path):
        from loratune.data.hub import read_hub  # importing `datasets` takes a second, and few runs need it

        return _not_empty(path, read_hub(path))
    reader = _reader(path)
    return _not_empty(path, reader(path))


def content_hash(path: str) -> str:
    """SHA-256 (hex) of a file's bytes, or of the rows of a hub data set. Equal hashes mean equal data.

    Raises: DataError: `path` cannot be read.
    """
    if isinstance(path, RecordsInMemory):
        return path.content_hash()
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
    foreign.check_name(path, DataError)
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
    names = [name for name in names if foreign.is_text(name)]
    return nearest(place.name, names) or (f" Data files there: {_listed(names)}." if names else "")


def _listed(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more


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
    if (zero := data.find(0)) >= 0:  # no text has zero bytes, and UTF-16 has one per Latin letter, blank or line end
        line = data.count(b"\n", 0, zero) + 1
        raise DataError(f"{path}:{line}: holds zero bytes, as UTF-16 and UTF-32 text do; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # error.object: the bytes after any mark
        raise DataError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not valid UTF-8; save the file as UTF-8"
        ) from error


def _read_jsonl(path: str) -> Found:
    return json_files.read_lines(path, _text(path))


def _read_json(path: str) -> Found:
    return json_files.read_document(path, _text(path))


# CSV, text, Parquet


def _read_csv(path: str) -> Found:
    header: list[str] | None = None
    for line, row in _csv_rows(path, "\t" if path.lower().endswith(".tsv") else ","):
        source = f"{path}:{line}"
        if header is None:
            header = _header(source, row)
        elif len(row) != len(header):
            yield DataError(
                f"{source}: {len(row)} cells, but the header names {len(header)} columns; "
                "put quotes around cells that contain the delimiter"
            )
        else:
            yield _csv_record(source, dict(zip(header, row, strict=True)))


def _csv_rows(path: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row with the row's first line. (The csv module limits cells, for the whole process.)"""
    text = _text(path)
    cell = re.compile(
        rf'(?:"(?P<quoted>[^"]*(?:""[^"]*)*)"|(?P<plain>(?:[^"{delimiter}\r\n][^{delimiter}\r\n]*)?))'
        rf"(?P<end>{delimiter}|\r\n|\n|\r|\Z)"
    )
    at, line, row, first = 0, 1, list[str](), 1
    while at < len(text) or row:
        match = cell.match(text, at)
        if match is None:
            fault = (
                "a quote is not closed, or text follows a closing quote" if text[at] == '"' else "the cell has no end"
            )
            raise DataError(f"{path}:{line}: broken CSV: {fault}; long texts are safer in JSONL or Parquet")
        quoted_text = match["quoted"]
        row.append(match["plain"] if quoted_text is None else quoted_text.replace('""', '"'))
        at = match.end()
        line += len(_LINE_END.findall(match[0])) if quoted_text is not None else match["end"] in _LINE_ENDS
        if match["end"] != delimiter:
            if len(row) > 1 or quoted_text is not None or row[0].strip(" \t"):  # else it is a blank line
                yield first, row
            row, first = [], line


def _header(source: str, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            fault = "a column without a name" if not name else f"the column {quoted([name])} twice"
            raise DataError(f"{source}: the header has {fault}; the first row of a CSV file names the columns")
        seen.add(name)
    return names


def _csv_record(source: str, fields: dict[str, Any]) -> RawRecord | DataError:
    for name in JSON_COLUMNS:
        if fields.get(name, "").strip():
            try:
                fields[name] = strict_json.decode(fields[name])
            except strict_json.NotStrict as error:
                return DataError(f'{source}: the column "{name}" must hold JSON: {error}')
    return RawRecord(
        source, {name: value for name, value in fields.items() if value != "" or name not in JSON_COLUMNS}
    )


def _read_text(path: str) -> Found:
    text = _text(path)
    lines = text.split("\n") if "\n" in text else text.split("\r")  # line ends of Unix and Windows, or of old Macs
    document: list[str] = []
    first_line = 1
    for number, line in enumerate([*lines, ""], start=1):
        line = line.removeprefix("\ufeff")  # of a file that was appended to another
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
            names = file.schema_arrow.names
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise DataError(f"{path}: has the column {quoted(twice[:1])} twice; rename or drop one of them")
            number = 0
            for batch in file.iter_batches():
                for row in _rows(batch):
                    number += 1
                    source = f"{path}: row {number}"
                    if isinstance(row, str):
                        yield DataError(f"{source}: {row}")
                    elif strict_json.depth_exceeds(row, strict_json.MAX_DEPTH):
                        yield DataError(f"{source}: lists are nested deeper than {strict_json.MAX_DEPTH} levels")
                    else:
                        yield RawRecord(source, without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        reason = printable(str(error).splitlines()[0])
        raise DataError(f"{path}: cannot be read as Parquet: {reason}") from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch as Python values; in place of a row with a value that Python cannot hold, the fault."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError, LookupError, TypeError):  # invalid UTF-8, dates before year 1 or after 9999
        pass
    for at in range(batch.num_rows):
        row: dict[str, Any] = {}
        fault = ""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[name] = column[at].as_py()
            except (ValueError, OverflowError, LookupError, TypeError) as error:
                fault = f"the column {quoted([name])} holds a value that cannot be read: {printable(str(error))}"
        yield fault or row


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
