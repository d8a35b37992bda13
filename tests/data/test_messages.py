"""Conversations are accepted in all common forms. Errors name the message and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from loratune.data.formats import alpaca, sharegpt
from loratune.data.messages import check_messages, check_tools
from loratune.data.record import RawRecord
from loratune.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}


def test_a_plain_conversation_stays_as_it_is() -> None:
    assert check_messages("f:1", [USER, ANSWER]) == (USER, ANSWER)


def test_text_parts_are_joined_and_tool_calls_stay_as_they_are() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    user, answer = check_messages("f:1", [parts, calls])
    assert user["content"] == "ab"
    assert answer == {"role": "assistant", "tool_calls": [CALL]}  # without null fields, as in apply_chat_template


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
        ([USER, ANSWER | {"train": "no"}], "train 'no'; it must be 0 or false"),
        ([USER, ANSWER | {"loss": [1]}], "loss [1]; it must be 0 or false"),
        ([USER, ANSWER | {"train": True, "weight": 0}], '"weight", "train" that contradict each other'),
        ([USER, ANSWER | {"mask": 1}], 'the field "mask", which trainers read differently; write "train"'),
        ([USER, ANSWER | {"masked": True}], 'the field "masked", which trainers read differently'),
        ([USER, ANSWER | {"train": False}], "every answer has weight 0"),
        ([{"role": ["user"], "content": "x"}], "message 1 has role"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": "add"}]}], 'without a function "name"'),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud83d"}'}]}], "half of a"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 5000}]}], "nested deeper"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "9" * 5000}]}], "4,300 digits"),
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
        ([{"from": "function_call", "value": "<think>x</think>"}], '"tool_calls" must be a list of objects'),
        ([{"from": ["human"], "value": "x"}], "turn 1 is from \"['human']\""),
        ([{"from": {"a": 1}, "value": "x"}], "turn 1 is from"),
        ([{"from": "human", "value": "x", "role": "user"}], 'turn 1 has "role" beside "from"'),
    ],
)
def test_sharegpt_faults(turns: Any, message: str) -> None:
    with pytest.raises(DataError) as fault:
        sharegpt.FORMAT.convert(RawRecord("f:1", {"conversations": turns}))
    assert message in str(fault.value)


def test_sharegpt_keeps_all_fields_of_a_turn_and_thoughts_before_a_call() -> None:
    calls = [CALL]
    turns = [
        {"from": "human", "value": "q", "name": "Ann"},
        {"from": "gpt", "value": "I look", "reasoning_content": "hm", "tool_calls": calls, "train": False},
        {"from": "function_call", "value": '<think>cold?</think>{"name": "add", "arguments": {"a": 1}}'},
        {"from": "function_call", "value": '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}]'},
    ]
    messages = sharegpt.FORMAT.convert(RawRecord("f:1", {"conversations": turns})).messages
    assert messages is not None
    assert messages[0] == {"role": "user", "content": "q", "name": "Ann"}
    expected = {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": calls, "weight": 0}
    assert messages[1] == expected
    assert messages[2]["content"] == "<think>cold?</think>"
    assert messages[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert [call["function"]["name"] for call in messages[3]["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize("history", [3, "x", {"a": 1}, [["a"]], [3], True])
def test_alpaca_history_must_be_pairs(history: object) -> None:
    fields = {"instruction": "q", "output": "a", "history": history}
    with pytest.raises(DataError, match=r'^f:1: "history"'):
        alpaca.FORMAT.convert(RawRecord("f:1", fields))


@pytest.mark.parametrize("function", ["add", 3, ["add"], {"name": 3}])
def test_a_tool_is_an_object_with_a_name(function: object) -> None:
    with pytest.raises(DataError, match=r'^f:1: tool 1: "function" must be an object with a "name"'):
        check_tools("f:1", [{"type": "function", "function": function}])


def test_tools_may_be_json_in_a_string() -> None:
    assert check_tools("f:1", '[{"name": "add"}]') == [{"name": "add"}]
    assert check_tools("f:1", None) is check_tools("f:1", "") is check_tools("f:1", []) is None
    with pytest.raises(DataError, match='f:1: "tools" must be a list of objects'):
        check_tools("f:1", {"name": "add"})
