"""Conversations are accepted in all common forms. Errors name the message and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.data.formats import sharegpt
from loratune.data.messages import check_messages, check_tools
from loratune.data.record import RawRecord
from loratune.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}


def test_a_plain_conversation_stays_as_it_is() -> None:
    assert check_messages("f:1", [USER, ANSWER]) == (USER, ANSWER)


def test_text_parts_are_joined_and_call_arguments_become_objects() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    user, answer = check_messages("f:1", [parts, calls])
    assert user["content"] == "ab"
    assert answer["content"] == ""
    assert answer["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_an_opening_by_the_assistant_is_context_if_it_has_no_weight() -> None:
    opening = ANSWER | {"weight": 0}
    assert check_messages("f:1", [opening, USER, ANSWER])[0] == opening


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", 'f:1: "messages" must be a list of messages, not str'),
        ([], "f:1: the list of messages is empty"),
        (["hi"], "f:1: message 1 must be an object"),
        ([{"content": "hi"}], 'message 1 must be an object with "role" and "content"; it has "content"'),
        ([{"rolle": "user", "content": "x"}], 'Is "rolle" meant to be "role"?'),
        ([USER, {"role": "assitant", "content": "x"}], 'message 2 has role "assitant"; roles are system, user, ass'),
        ([USER, {"role": "assitant", "content": "x"}], 'Did you mean "assistant"?'),
        ([{"role": "human", "content": "x"}], 'Did you mean "user"?'),
        ([{"role": "Developer", "content": "x"}], 'Did you mean "system"?'),
        ([{"role": "user", "contents": "x"}, ANSWER], 'message 1 has no "content"; it has "role", "contents"'),
        ([{"role": "user", "content": None}, ANSWER], 'message 1 has no "content"'),
        ([{"role": "user", "content": 3}, ANSWER], '"content" of type int'),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWER], 'part of type "image_url"'),
        ([USER, {"role": "assistant", "content": " \n"}], "message 2 is an empty answer"),
        ([USER], "f:1: no message from the assistant"),
        ([USER, ANSWER | {"weight": 0}], "every answer has weight 0"),
        ([USER, ANSWER | {"weight": 0.5}], "weight 0.5; it must be 0"),
        ([USER | {"weight": 1}, ANSWER], "only answers have one"),
        ([ANSWER, USER, ANSWER], "message 1 is from the assistant and answers nothing"),
        ([USER | {"tool_calls": [CALL]}, ANSWER], "only the assistant calls tools"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], 'without a function "name"'),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "must be JSON"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "must be an object"),
    ],
)
def test_faults_name_the_message_and_the_fix(messages: Any, message: str) -> None:
    with pytest.raises(DataError) as fault:
        check_messages("f:1", messages)
    assert str(fault.value).startswith("f:1: ")
    assert message in str(fault.value)


def test_sharegpt_becomes_messages() -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a", "weight": 0},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "b"},
    ]
    messages = sharegpt.FORMAT.convert(RawRecord("f:1", {"conversations": turns})).messages
    assert messages is not None
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert messages[2]["tool_calls"][0]["function"]["name"] == "add"
    assert messages[4]["weight"] == 0


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ({}, "must be a list of turns"),
        ([{"from": "human"}], 'turn 1 must be an object with "from" and "value"; it has "from"'),
        ([{"from": "humman", "value": "x"}], 'turn 1 is from "humman"'),
        ([{"from": "humman", "value": "x"}], 'Did you mean "human"'),
        ([{"from": "function_call", "value": "x"}], "turn 1 (function_call) must be JSON"),
    ],
)
def test_sharegpt_faults(turns: Any, message: str) -> None:
    with pytest.raises(DataError) as fault:
        sharegpt.FORMAT.convert(RawRecord("f:1", {"conversations": turns}))
    assert message in str(fault.value)


def test_tools_may_be_json_in_a_string() -> None:
    assert check_tools("f:1", '[{"name": "add"}]') == [{"name": "add"}]
    assert check_tools("f:1", None) is check_tools("f:1", "") is check_tools("f:1", []) is None
    with pytest.raises(DataError, match='f:1: "tools" must be a list of objects'):
        check_tools("f:1", {"name": "add"})
