"""Pairs: {"prompt": ..., "completion": ...}, either two texts or two lists of messages.

Texts are used verbatim, without a chat template. Messages of the prompt are context: only the completion is trained.
"""

from __future__ import annotations

from typing import Any

from loratune.data.messages import check_messages, check_tools
from loratune.data.record import RawRecord, Record, RecordFormat, required, required_text
from loratune.errors import DataError


def _convert(raw: RawRecord) -> Record:
    prompt, completion = required(raw, "prompt"), required(raw, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [_as_context(message) for message in prompt]
        messages = check_messages(raw.source, context + completion)
        return Record(raw.source, messages, check_tools(raw.source, raw.fields.get("tools")))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(f'{raw.source}: "prompt" and "completion" must both be texts, or both lists of messages')
    if "tools" in raw.fields:
        raise DataError(f'{raw.source}: "tools" need a chat template, so "prompt" must be a list of messages')
    prompt, completion = required_text(raw, "prompt"), required_text(raw, "completion")
    if not completion:
        raise DataError(f'{raw.source}: "completion" is empty, so there is nothing to train on')
    return Record(raw.source, prompt=prompt, completion=completion)


def _as_context(message: Any) -> Any:
    if isinstance(message, dict) and message.get("role") == "assistant":
        return message | {"weight": 0}
    return message


FORMAT = RecordFormat(
    needs='"prompt" and "completion"',
    uses=frozenset({"prompt", "completion", "tools"}),
    recognise=lambda fields: "prompt" in fields or "completion" in fields,
    convert=_convert,
)
