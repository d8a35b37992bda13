"""Data files to records: recognises the format of each file and checks every record.

| format            | fields                                                          | becomes            |
|-------------------|-----------------------------------------------------------------|--------------------|
| messages          | messages (or conversations) of role/content; tools              | messages           |
| sharegpt          | conversations (or messages) of from/value; system; tools        | messages           |
| alpaca            | instruction, output; input, system, history                     | messages           |
| prompt_completion | prompt, completion: two texts, or two lists of messages; tools  | the pair, verbatim |
| text              | text                                                            | raw text           |

If an object has the fields of several formats, the first in this order counts: many data sets keep a rendered "text"
or a "prompt" beside the messages. All objects of a file have one format. Every record is checked before anything is
rendered, and each error names file, line, cause and fix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from loratune.config import DataFormat
from loratune.data.files import read_objects
from loratune.data.preference import refuse_preference
from loratune.data.record import MAX_NAME, MAX_NAMES, RawRecord, Record, RecordFormat, quoted
from loratune.errors import ConfigError, DataError, nearest
from loratune.tables import FORMATS, load_entry

ERRORS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """The records of some files, with notes for the user about reading them."""

    records: list[Record]
    notes: list[str] = field(default_factory=list)


def read_records(paths: Sequence[str], format: DataFormat = "auto") -> list[Record]:
    """Reads and checks every record of the files, in order.

    Args:
        paths: data files or hub data set ids, see `files.read_objects`.
        format: a name of `tables.FORMATS`, or "auto" to recognise it from the fields of each file's first object.

    Raises: DataError: some records are invalid; shows the first errors and counts the others.
    """
    return read(paths, format).records


def read(paths: Sequence[str], format: DataFormat = "auto") -> Reading:
    """Like `read_records`, with notes about unused fields and about the documents of plain text."""
    if not paths:
        raise DataError("no data files were given")
    if format not in ("auto", *FORMATS):
        raise ConfigError(
            f'format is "{format}"; formats are {", ".join(("auto", *FORMATS))}.{nearest(format, FORMATS)}'
        )
    formats: dict[str, RecordFormat] = {name: load_entry(location) for name, location in FORMATS.items()}
    reading = Reading([])
    errors: list[DataError] = []
    for path in paths:
        _read_file(path, format, formats, reading, errors)
    raise_all(errors)
    return reading


def raise_all(errors: Sequence[DataError]) -> None:
    """Raises one DataError that shows the first errors and counts the rest. Returns if there are none."""
    if not errors:
        return
    lines = [str(error) for error in errors[:ERRORS_SHOWN]]
    if len(errors) > ERRORS_SHOWN:
        lines.append(f"and {len(errors) - ERRORS_SHOWN} more")
    raise DataError("\n".join(lines)) from errors[0]


def _read_file(
    path: str, format: DataFormat, formats: dict[str, RecordFormat], reading: Reading, errors: list[DataError]
) -> None:
    """Appends the records, notes and errors of one file."""
    name: str = format
    unused: Counter[str] = Counter()
    before = len(reading.records)
    for found in read_objects(path):
        if isinstance(found, DataError):
            errors.append(found)
            continue
        raw = RawRecord(found.source, {key: value for key, value in found.fields.items() if value is not None})
        try:
            recognised = name if format != "auto" else _recognise(raw, formats)
            if name == "auto":
                name = recognised
            elif recognised != name:
                raise DataError(
                    f"{raw.source}: has the fields of {recognised}, but this file began with {name}; put each "
                    "format into a file of its own"
                )
            reading.records.append(formats[name].convert(raw))
            unused.update(raw.fields.keys() - formats[name].uses)
        except DataError as error:
            errors.append(error)
    if unused:
        reading.notes.append(f"{path}: the fields {quoted(sorted(unused))} are not used by the format {name}")
    if path.lower().endswith((".txt", ".text", ".md")):
        documents = len(reading.records) - before
        reading.notes.append(f"{path}: {documents:,} documents, separated by blank lines")


def _recognise(raw: RawRecord, formats: dict[str, RecordFormat]) -> str:
    """The name of the first format that fits the fields. Raises DataError if none does, or for preference data."""
    refuse_preference(raw)
    for name, format in formats.items():
        if format.recognise(raw.fields):
            return name
    known = "; ".join(f"{name}: {format.needs}" for name, format in formats.items())
    used = {field for format in formats.values() for field in format.uses}
    some = [key[:MAX_NAME] for key in islice(raw.fields, MAX_NAMES)]
    near = next((hint for key in some if (hint := nearest(key, used, limit=1))), "")
    raise DataError(
        f"{raw.source}: cannot tell the format from the fields {quoted(raw.fields) or 'of an empty object'}. "
        f"Known formats: {known}.{near}"
    )
