"""A record format in one file: quiz questions, {"question": ..., "choices": [...], "right": 0}."""

from __future__ import annotations

from loratune.data.messages import check_messages
from loratune.data.record import RawRecord, Record, RecordFormat, required, required_text
from loratune.errors import DataError


def _convert(raw: RawRecord) -> Record:
    question, choices, right = required_text(raw, "question"), required(raw, "choices"), required(raw, "right")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f'{raw.source}: "choices" must be a list of strings')
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise DataError(f'{raw.source}: "right" is {right}; it is the index of one of {len(choices)} choices')
    asked = "\n".join([question, *(f"- {choice}" for choice in choices)])
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": choices[right]}]
    return Record(raw.source, check_messages(raw.source, messages))


FORMAT = RecordFormat(
    needs='"question", "choices" and "right"',
    uses=frozenset({"question", "choices", "right"}),
    recognise=lambda fields: "question" in fields and "choices" in fields,
    convert=_convert,
)
