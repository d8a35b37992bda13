"""Conversations in OpenAI's form: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}."""

from __future__ import annotations

from loratune.data.formats.sharegpt import has_speakers
from loratune.data.messages import check_messages, check_tools
from loratune.data.record import RawRecord, Record, RecordFormat, required


def _convert(raw: RawRecord) -> Record:
    messages = required(raw, "messages", "conversations")
    return Record(raw.source, check_messages(raw.source, messages), check_tools(raw.source, raw.fields.get("tools")))


FORMAT = RecordFormat(
    needs='"messages"',
    uses=frozenset({"messages", "conversations", "tools"}),
    recognise=lambda fields: ("messages" in fields or "conversations" in fields) and not has_speakers(fields),
    convert=_convert,
)
