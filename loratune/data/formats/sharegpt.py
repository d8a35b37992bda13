"""ShareGPT's conversations: {"conversations": [{"from": "human", "value": "..."}, ...], "system": ..., "tools": ...}.

The turns become messages in OpenAI's form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.data.messages import SHAREGPT_ROLES, check_messages, check_tools, listed_fields, parse_json
from loratune.data.record import Message, RawRecord, Record, RecordFormat, optional_text, required
from loratune.errors import DataError, nearest


def has_speakers(fields: Mapping[str, Any]) -> bool:
    """True if the first turn of the conversation has "from" or "value" and no "role"."""
    turns = fields.get("messages", fields.get("conversations"))
    first = turns[0] if isinstance(turns, list) and turns else {}
    return isinstance(first, dict) and "role" not in first and ("from" in first or "value" in first)


def _convert(raw: RawRecord) -> Record:
    messages = _messages(raw.source, required(raw, "conversations", "messages"))
    system = optional_text(raw, "system")
    if system:
        messages.insert(0, {"role": "system", "content": system})
    tools = check_tools(raw.source, raw.fields.get("tools"))
    return Record(raw.source, check_messages(raw.source, messages), tools)


def _messages(source: str, turns: Any) -> list[Message]:
    """The turns as messages, not yet checked."""
    if not isinstance(turns, list):
        raise DataError(f'{source}: "conversations" must be a list of turns, not {type(turns).__name__}')
    return [_message(source, number, turn) for number, turn in enumerate(turns, start=1)]


def _message(source: str, number: int, turn: Any) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise DataError(f'{source}: turn {number} must be an object with "from" and "value"{listed_fields(turn)}')
    speaker = turn["from"]
    if speaker not in SHAREGPT_ROLES:
        raise DataError(
            f'{source}: turn {number} is from "{speaker}"; speakers are {", ".join(SHAREGPT_ROLES)}.'
            f"{nearest(str(speaker), SHAREGPT_ROLES)}"
        )
    message: Message = {"role": SHAREGPT_ROLES[speaker], "content": turn["value"]}
    if speaker == "function_call":
        call = parse_json(source, f"turn {number} (function_call)", turn["value"])
        message = {"role": "assistant", "tool_calls": [call]}
    if turn.get("weight") is not None:
        message["weight"] = turn["weight"]
    return message


FORMAT = RecordFormat(
    needs='"conversations"',
    uses=frozenset({"messages", "conversations", "tools", "system"}),
    recognise=has_speakers,
    convert=_convert,
)
