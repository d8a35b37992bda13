"""Records to text: the prompt of every trained answer as in inference, and the prompt with the answer.

All text comes from the chat template. Each answer is checked: the template must show it as it would be generated, and
remarks about fields and messages that it leaves out are counted for notes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from loratune.config import TrainOn
from loratune.data.record import Message, Record
from loratune.data.template import ChatTemplate, checked_text, require_template
from loratune.errors import DataError

MAX_ANSWERS = 512
"""Trained answers of one conversation. The work grows with their square."""
_NOT_TRAINED = frozenset(("role", "content", "weight", "tool_calls", "tool_call_id", "id"))
"""Fields of messages that are checked elsewhere, or only link messages."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer or document to train on, as text."""

    prompt: str
    """The text before the trained part."""
    full: str
    """The prompt and the trained part."""
    place: str
    """Place for errors: "file:line: message n"."""


def turns_of(record: Record, train_on: TrainOn, chat: ChatTemplate, counts: Counter[str]) -> list[Turn]:
    """The trained parts of a record, as text, at least one.

    Args:
        counts: counts remarks for notes.
    Raises: DataError, ModelError: as `ChatTemplate.render`; also if nothing would be trained, or the template shows
        an answer, tool or call in another way than it is generated.
    """
    if record.text is not None:
        return [Turn("", checked_text(record.text, record.source), record.source)]
    if record.messages is None:
        return [_pair_turn(record)]
    messages, shown = record.messages, chat.shown(record.messages)
    if train_on == "all":
        text = chat.render(shown, record.tools, source=record.source, answer_next=False)
        counts["weight ignored"] += any("weight" in message for message in messages)
        turn = Turn("", text, record.source)
        _count_left_out(record, messages, turn, chat, counts)
        return [turn]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if messages[-1]["role"] != "assistant":
        counts["trailing messages"] += 1
    chosen = answers[-1:] if train_on == "last" else answers
    trained = [index for index in chosen if messages[index].get("weight", 1)]
    if not trained:
        raise DataError(f'{record.source}: the last answer has "weight": 0, so train_on "last" trains nothing')
    if len(trained) > MAX_ANSWERS:
        raise DataError(
            f"{record.source}: has {len(trained):,} answers, and each is rendered with all messages before it; the "
            f"limit is {MAX_ANSWERS}: divide the conversation, or train only the last answer with --train-on last"
        )
    texts = chat.turns(shown, record.tools, trained, source=record.source)
    turns = [_chat_turn(record, index, *pair) for index, pair in zip(trained, texts, strict=True)]
    _count_left_out(record, messages[: trained[-1] + 1], turns[-1], chat, counts)
    for index, turn in zip(trained, turns, strict=True):
        _count_unshown_fields(record, messages[index], turn, chat, counts)
    return turns


def _chat_turn(record: Record, index: int, prompt: str, full: str) -> Turn:
    place = f"{record.source}: message {index + 1}"
    if not full.startswith(prompt):
        raise DataError(
            f"{place}: the chat template shows the model {prompt[-40:]!r} before it answers, but renders the given "
            f"answer as {full[_common(prompt, full) :][:40]!r}, so training would differ from inference; "
            "name another template with --chat-template FILE"
        )
    turn = Turn(prompt, full, place)
    _check_tools_shown(record, index, turn)
    return turn


def _count_left_out(
    record: Record, messages: Sequence[Message], turn: Turn, chat: ChatTemplate, counts: Counter[str]
) -> None:
    """Counts messages whose text the template does not show. Dropped reasoning does not count, see above."""
    for message in messages:
        if message.get("content", "").split("</think>")[-1].strip() not in turn.full:
            counts[f"left out {message['role']}"] += 1
        if message["role"] != "assistant" or record.messages is None or not turn.prompt:
            _count_unshown_fields(record, message, turn, chat, counts)


def _count_unshown_fields(
    record: Record, message: Message, turn: Turn, chat: ChatTemplate, counts: Counter[str]
) -> None:
    """Counts fields of a message, besides those of every message, that the template does not print."""
    for name, value in message.items():
        if name == "tool_calls" and any(_is_printed_twice(call, turn.full) for call in value):
            counts["arguments twice"] += 1
        if name in _NOT_TRAINED or (not isinstance(value, str) and name in chat.source_of(record.tools)):
            continue
        if not _is_shown(value, turn.full):
            counts[f"unshown {name}"] += 1


def _is_shown(value: Any, text: str) -> bool:
    """Whether the text holds a value, or the value as JSON."""
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return written.strip() in text or json.dumps(written.strip(), ensure_ascii=False)[1:-1] in text


def _is_printed_twice(call: dict[str, Any], text: str) -> bool:
    """Whether the template prints arguments that are JSON in a string as a JSON string."""
    arguments = call.get("function", call).get("arguments")
    return isinstance(arguments, str) and '"' in arguments and json.dumps(arguments, ensure_ascii=False) in text


def _check_tools_shown(record: Record, index: int, turn: Turn) -> None:
    """Raises DataError if the template shows neither the tools nor the calls that the record holds."""
    assert record.messages is not None
    functions = [tool.get("function", tool) for tool in record.tools or []]
    functions += [call.get("function", call) for call in record.messages[index].get("tool_calls", [])]
    for function in functions:
        if str(function.get("name", "")) not in turn.full:
            raise DataError(
                f'{turn.place}: the chat template does not show the function "{function["name"]}", so the model '
                "would learn to call an unknown function; name a template for tools with --chat-template FILE"
            )


def _common(a: str, b: str) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _pair_turn(record: Record) -> Turn:
    assert record.prompt is not None
    assert record.completion is not None
    return Turn(record.prompt, checked_text(record.prompt + record.completion, record.source), record.source)


def last_turn(record: Record, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None) -> Turn:
    """The last answer of a record, as text.

    Raises: as `turns_of`; also DataError for raw text, and ModelError if there is no template for a conversation.
    """
    if record.text is not None:
        raise DataError(f"{record.source}: raw text has no question, so there is no answer to compare")
    if record.messages is None:
        return _pair_turn(record)
    if chat is None:
        require_template(tokenizer, None)
        chat = ChatTemplate(tokenizer)
    last = max(index for index, message in enumerate(record.messages) if message["role"] == "assistant")
    (texts,) = chat.turns(chat.shown(record.messages), record.tools, [last], source=record.source)
    return _chat_turn(record, last, *texts)
