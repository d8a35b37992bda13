"""A list of chat messages, checked and brought into the one shape that chat templates expect.

The shape is OpenAI's (role, content, tool_calls, name, tool_call_id, and weight 0 or 1 on an assistant's message)
with the two changes that transformers' templates ask for: text parts are joined to one string, and the arguments
of a tool call are an object, not JSON in a string. ShareGPT's from/value pairs are converted into it. Everything
else of a message goes to the template untouched.
Source: https://platform.openai.com/docs/api-reference/chat and transformers' chat templating guide.
"""

from __future__ import annotations

import difflib
import json
from typing import Any

from loratune.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
SYNONYMS = SHAREGPT_ROLES | {"bot": "assistant", "ai": "assistant", "developer": "system", "prompter": "user"}

Message = dict[str, Any]


def check_messages(source: str, value: Any) -> tuple[Message, ...]:
    """Returns the messages in the shape that templates expect.

    Raises: DataError: anything that would make a template fail or train on nothing: a wrong role, content that
        is missing or not text, an empty answer, no answer at all, an answer to nothing.
    """
    if not isinstance(value, list):
        raise DataError(f'{source}: "messages" must be a list of messages, not {type(value).__name__}')
    if not value:
        raise DataError(f"{source}: the list of messages is empty")
    messages = tuple(_message(source, number, item) for number, item in enumerate(value, start=1))
    _check_turns(source, messages)
    return messages


def from_sharegpt(source: str, value: Any) -> list[Message]:
    """Converts ShareGPT turns {"from": "human", "value": "..."} to messages, not yet checked.

    Raises: DataError: a turn without "from" or "value", or with an unknown speaker.
    """
    if not isinstance(value, list):
        raise DataError(f'{source}: "conversations" must be a list of turns, not {type(value).__name__}')
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise DataError(f'{source}: turn {number} must be an object with "from" and "value"{_has(turn)}')
        speaker = turn["from"]
        if speaker not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise DataError(
                f'{source}: turn {number} is from "{speaker}"; speakers are {known}.'
                f"{nearest(str(speaker), SHAREGPT_ROLES)}"
            )
        message: Message = {"role": SHAREGPT_ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message = {"role": "assistant", "tool_calls": [_sharegpt_call(source, number, turn["value"])]}
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    return messages


def check_tools(source: str, value: Any) -> list[dict[str, Any]] | None:
    """The tool descriptions as a list of objects; a string is read as JSON, as some data sets store them.

    Raises: DataError: not a list of objects.
    """
    tools = _parsed(source, '"tools"', value)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{source}: "tools" must be a list of objects (JSON schemas of functions)')
    return tools


def misspelt(name: str, fields: Any) -> str:
    """A question about the field that resembles the missing `name`, or ''."""
    close = difflib.get_close_matches(name, [str(field) for field in fields] if isinstance(fields, dict) else [], n=1)
    return f' Is "{close[0]}" meant to be "{name}"?' if close else ""


def _message(source: str, number: int, item: Any) -> Message:
    where = f"{source}: message {number}"
    if not isinstance(item, dict) or "role" not in item:
        raise DataError(f'{where} must be an object with "role" and "content"{_has(item)}.{misspelt("role", item)}')
    role = item["role"]
    if role not in ROLES:
        synonym = SYNONYMS.get(str(role).lower())
        hint = f' Did you mean "{synonym}"?' if synonym else nearest(str(role).lower(), ROLES)
        raise DataError(f'{where} has role "{role}"; roles are {", ".join(ROLES)}.{hint}')
    message = {key: field for key, field in item.items() if field is not None}
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(where, role, message["tool_calls"])
    message["content"] = _content(where, message)
    _check_weight(where, message)
    return message


def _content(where: str, message: Message) -> str:
    content = message.get("content")
    if content is None:
        if message.get("tool_calls"):
            return ""
        raise DataError(f'{where} has no "content"{_has(message)}.{misspelt("content", message)}')
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str):
        raise DataError(f'{where} has "content" of type {type(content).__name__}; it must be a string')
    answers = message["role"] == "assistant" and message.get("weight", 1) != 0
    if answers and not content.strip() and not message.get("tool_calls"):
        raise DataError(f'{where} is an empty answer; write one, or give it "weight": 0 to leave it untrained')
    return content


def _part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise DataError(f'{where} has a content part of type "{kind}"; only text can be trained on')


def _check_weight(where: str, message: Message) -> None:
    if "weight" not in message:
        return
    if message["weight"] not in (0, 1):
        raise DataError(f"{where} has weight {message['weight']!r}; it must be 0 (not trained) or 1 (trained)")
    if message["role"] != "assistant":
        raise DataError(f'{where} has a weight but role "{message["role"]}"; only answers have one')


def _tool_calls(where: str, role: str, calls: Any) -> list[dict[str, Any]]:
    if role != "assistant":
        raise DataError(f'{where} has "tool_calls" but role "{role}"; only the assistant calls tools')
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f'{where}: "tool_calls" must be a list of objects')
    return [_tool_call(where, call) for call in calls]


def _tool_call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'{where} has a tool call without a function "name"')
    arguments = _parsed(where, "the arguments of a tool call", function.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: the arguments of a tool call must be an object, or one as JSON in a string")
    whole = function | {"arguments": arguments}
    return call | {"function": whole} if "function" in call else {"type": "function", "function": whole}


def _sharegpt_call(source: str, number: int, value: Any) -> Any:
    return _parsed(source, f"turn {number} (function_call)", value)


def _parsed(where: str, what: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {what} must be JSON: {error}") from error


def _check_turns(source: str, messages: tuple[Message, ...]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{source}: no message from the assistant, so there is nothing to train on")
    if all(message.get("weight") == 0 for message in answers):
        raise DataError(f"{source}: every answer has weight 0, so there is nothing to train on")
    if messages[0]["role"] == "assistant" and messages[0].get("weight") != 0:
        raise DataError(
            f"{source}: message 1 is from the assistant and answers nothing; put a user message before it, or "
            'give it "weight": 0 to keep it as context'
        )


def _has(item: Any) -> str:
    if not isinstance(item, dict):
        return f", not {type(item).__name__}"
    return "; it has " + (", ".join(f'"{key}"' for key in item) or "no fields")
