"""Raw text: {"text": "..."}, a document of which every token is trained."""

from __future__ import annotations

from loratune.data.record import RawRecord, Record, RecordFormat, required_text
from loratune.errors import DataError


def _convert(raw: RawRecord) -> Record:
    text = required_text(raw, "text")
    if not text.strip():
        raise DataError(f'{raw.source}: "text" is empty, so there is nothing to train on')
    return Record(raw.source, text=text)


FORMAT = RecordFormat(
    needs='"text"',
    uses=frozenset({"text"}),
    recognise=lambda fields: "text" in fields,
    convert=_convert,
)
