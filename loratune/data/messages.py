"""Chat messages: checks them and converts them to the one form that chat templates expect.

The form is OpenAI's: role, content, tool_calls, name, tool_call_id, and on an assistant's message weight 0 or 1.
Flags with which other trainers leave an answer untrained become that weight. Text parts are joined to one string.
All other fields reach the template unchanged. So do tool calls, with or without "function", and their arguments, an
object or JSON in a string: the tokens are those of `apply_chat_template` on the original message.
Source: https://platform.openai.com/docs/api-reference/chat and transformers' chat templating guide.
"""

from __future__ import annotations

from typing import Any

from loratune.data import strict_json
from loratune.data.record import Message, misspelt, quoted
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
LOSS_FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Fields with which trainers mark an answer: 1 or true trains it, 0 or false does not."""
UNCLEAR_FLAGS = ("mask", "masked", "is_masked", "loss_weight", "loss_scale", "train_detail", "train_on")
"""Similar fields that trainers read in opposite ways, or that weigh single parts of an answer."""
SYNONYMS = SHAREGPT_ROLES | {"bot": "assistant", "ai": "assistant", "developer": "system", "prompter": "user"}


def check_messages(source: str, value: Any) -> tuple[Message, ...]:
    """Returns the messages in the form that templates expect.

    Raises: DataError: a template would fail or nothing would be trained, because of a wrong role, missing content,
        content other than text, an empty answer, no answer at all, or an answer without a question.
    """
    if not isinstance(value, list):
        raise DataError(f'{source}: "messages" must be a list of messages, not {type(value).__name__}')
    if not value:
        raise DataError(f"{source}: the list of messages is empty")
    messages = tuple(_message(source, number, item) for number, item in enumerate(value, start=1))
    _check_turns(source, messages)
    return messages


def check_tools(source: str, value: Any) -> list[dict[str, Any]] | None:
    """Returns the tool descriptions as a list of objects. A string is parsed as JSON, since some data sets store it.

    Raises: DataError: the value is not a list of objects.
    """
    tools = parse_json(source, '"tools"', value)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{source}: "tools" must be a list of objects (JSON schemas of functions)')
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
            raise DataError(f'{source}: tool {number}: "function" must be an object with a "name"')
    return tools


def _message(source: str, number: int, item: Any) -> Message:
    where = f"{source}: message {number}"
    if not isinstance(item, dict) or "role" not in item:
        raise DataError(
            f'{where} must be an object with "role" and "content"{listed_fields(item)}.{misspelt("role", item)}'
        )
    role = item["role"]
    if role not in ROLES:
        synonym = SYNONYMS.get(str(role).lower())
        hint = f' Did you mean "{synonym}"?' if synonym else nearest(str(role).lower(), ROLES)
        raise DataError(f"{where} has role {quoted([role])}; roles are {', '.join(ROLES)}.{hint}")
    message = {key: field for key, field in item.items() if field is not None}
    if len(message) > 2:
        message = _with_weight(where, message)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(where, role, message["tool_calls"])
    content = _content(where, message)
    if content is not None:
        message["content"] = content
    return message


def _content(where: str, message: Message) -> str | None:
    """The content as one string; None if the message has only tool calls."""
    content = message.get("content")
    if content is None:
        if message.get("tool_calls"):
            return None
        raise DataError(f'{where} has no "content"{listed_fields(message)}.{misspelt("content", message)}')
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


def _with_weight(where: str, message: Message) -> Message:
    """The message with all flags of training replaced by one weight, 0 or 1."""
    if unclear := [name for name in UNCLEAR_FLAGS if name in message]:
        raise DataError(
            f'{where} has the field "{unclear[0]}", which trainers read differently; write "train": true or false'
        )
    flags = [name for name in LOSS_FLAGS if name in message]
    if not flags:
        return message
    for name in flags:
        if not isinstance(message[name], int | float) or message[name] not in (0, 1):
            raise DataError(
                f"{where} has {name} {message[name]!r}; it must be 0 or false (not trained), or 1 or true (trained)"
            )
        if message[name] != message[flags[0]]:
            raise DataError(f"{where} has {quoted(flags)} that contradict each other; keep one of them")
    weight = int(message[flags[0]])
    plain = {name: field for name, field in message.items() if name not in flags}
    if message["role"] == "assistant":
        return plain | {"weight": weight}
    if weight:
        raise DataError(f'{where} has a weight but role "{message["role"]}"; only answers have one')
    return plain


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
    arguments = parse_json(where, "the arguments of a tool call", function.get("arguments", {}))
    if arguments is not None and not isinstance(arguments, dict):
        raise DataError(f"{where}: the arguments of a tool call must be an object, or one as JSON in a string")
    return call


def parse_json(where: str, name: str, value: Any) -> Any:
    """Parses a string as JSON, an empty one as None, and returns any other value unchanged.

    Args:
        name: the value's name in the error.
    Raises: DataError: the string is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return strict_json.decode(value)
    except strict_json.NotStrict as error:
        raise DataError(f"{where}: {name} must be JSON: {error}") from error


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


def listed_fields(item: Any) -> str:
    """The end of an error about a missing field: "; it has" and the fields, or the type of a value without fields."""
    if not isinstance(item, dict):
        return f", not {type(item).__name__}"
    return "; it has " + (quoted(item) or "no fields")
