"""ShareGPT's conversations: {"conversations": [{"from": "human", "value": "..."}, ...], "system": ..., "tools": ...}.

The turns become messages in OpenAI's form, with all other fields of a turn. A `function_call` holds one call or a
list of calls as JSON; thoughts up to "</think>" before it are the message's content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.data.messages import SHAREGPT_ROLES, check_messages, check_tools, listed_fields, parse_json
from loratune.data.record import Message, RawRecord, Record, RecordFormat, optional_text, quoted, required
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
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise DataError(
            f"{source}: turn {number} is from {quoted([speaker])}; speakers are {', '.join(SHAREGPT_ROLES)}."
            f"{nearest(str(speaker), SHAREGPT_ROLES)}"
        )
    if double := [key for key in ("role", "content") if key in turn]:
        raise DataError(f'{source}: turn {number} has "{double[0]}" beside "from" and "value"; keep one form')
    others: Message = {key: field for key, field in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        return others | _calls(source, number, turn["value"])
    return others | {"role": SHAREGPT_ROLES[speaker], "content": turn["value"]}


def _calls(source: str, number: int, value: Any) -> Message:
    """A message of tool calls, from one call or a list of calls as JSON, perhaps behind the model's thoughts."""
    thought, call = "", value
    if isinstance(value, str) and "</think>" in value:
        before, mark, call = value.rpartition("</think>")
        thought = before + mark
    calls = parse_json(source, f"turn {number} (function_call)", call)
    listed = calls if isinstance(calls, list) else [calls]
    wrapped = [
        {"type": "function", "function": each} if isinstance(each, dict) and "function" not in each else each
        for each in listed
    ]
    message: Message = {"role": "assistant", "tool_calls": wrapped}
    return message | {"content": thought} if thought else message


FORMAT = RecordFormat(
    needs='"conversations"',
    uses=frozenset({"messages", "conversations", "tools", "system"}),
    recognise=has_speakers,
    convert=_convert,
)
