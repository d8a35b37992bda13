"""The five formats are recognised and converted. A file that mixes formats or lacks fields is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from loratune.config import DataFormat
from loratune.data.record import Record
from loratune.data.records import read, read_records
from loratune.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def records(*objects: Any, format: DataFormat = "auto") -> list[Record]:
    Path("a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in objects))
    return read_records(["a.jsonl"], format)


def fault(*objects: Any, format: DataFormat = "auto") -> str:
    with pytest.raises(DataError) as raised:
        records(*objects, format=format)
    return str(raised.value)


def said(record: Record) -> list[tuple[str, str]]:
    assert record.messages is not None
    return [(message["role"], message["content"]) for message in record.messages]


def test_each_layout_is_recognised() -> None:
    hello = [("user", "hi"), ("assistant", "hello")]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    for item in (
        {"messages": CHAT, "prompt": "ignored"},
        {"conversations": CHAT},
        {"conversations": shared},
        {"messages": shared},
        {"instruction": "hi", "input": "", "output": "hello", "text": "ignored"},
        {"instruction": "hi", "input": None, "output": "hello"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ):
        assert said(records(item)[0]) == hello
    assert records({"prompt": "a", "completion": "b"}) == [Record("a.jsonl:1", prompt="a", completion="b")]
    assert records({"text": "a"}) == [Record("a.jsonl:1", text="a")]


def test_alpaca_with_everything() -> None:
    item = {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["q", "a"]]}
    expected = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "do\n\nthis"), ("assistant", "done")]
    assert said(records(item)[0]) == expected


def test_answers_inside_a_prompt_are_context() -> None:
    (record,) = records({"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]})
    assert record.messages is not None
    assert [message.get("weight") for message in record.messages] == [None, 0, None, None]


def test_a_named_format_settles_what_is_ambiguous() -> None:
    assert records({"messages": CHAT, "text": "a"}, format="text")[0].text == "a"
    assert 'has no "instruction", but "text"' in fault({"text": "a"}, format="alpaca")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"qestion": "a", "anser": "b"}, 'cannot tell the format from the fields "qestion", "anser"'),
        ({"txt": "a"}, 'Did you mean "text"?'),
        ({"mesages": CHAT}, 'Did you mean "messages"?'),
        ({}, "an empty object"),
        (
            {"instruction": "a", "ouput": "b"},
            'but "instruction", "ouput". Is "ouput" meant to be "output"?',
        ),
        ({"instruction": "a", "output": " "}, '"output" is empty'),
        ({"instruction": "a", "output": 1}, '"output" must be a string, not int'),
        ({"instruction": "a", "output": "b", "history": ["x"]}, '"history" entry 1 must be a list'),
        ({"prompt": "a"}, 'has no "completion"'),
        ({"prompt": "a", "completion": ""}, '"completion" is empty'),
        ({"prompt": "a", "completion": CHAT}, "must both be texts, or both lists"),
        ({"prompt": "a", "completion": "b", "tools": []}, '"tools" need a chat template'),
        ({"text": "\n"}, '"text" is empty'),
        ({"messages": CHAT[:1]}, "no message from the assistant"),
    ],
)
def test_faults_name_the_fields_and_the_fix(item: Any, message: str) -> None:
    assert fault(item).startswith("a.jsonl:1: ")
    assert message in fault(item)


def test_a_file_of_two_formats_is_refused_at_the_line_where_it_changes() -> None:
    assert fault({"text": "a"}, {"text": "b"}, {"messages": CHAT}).startswith(
        "a.jsonl:3: has the fields of messages, but this file began with text"
    )


def test_files_may_differ_in_format() -> None:
    Path("b.txt").write_text("one\n\ntwo")
    records({"messages": CHAT})
    reading = read(["a.jsonl", "b.txt"])
    assert [record.source for record in reading.records] == ["a.jsonl:1", "b.txt:1", "b.txt:3"]
    assert reading.notes == ["b.txt: 2 documents, separated by blank lines"]


def test_the_first_faults_are_shown_and_the_others_counted() -> None:
    message = fault({"text": "fine"}, *[{"text": ""}] * 7)
    assert message.splitlines()[0].startswith("a.jsonl:2: ")
    assert message.splitlines()[-1] == "and 4 more"


def test_nan_from_a_table_is_named() -> None:
    table = pyarrow.Table.from_pydict({"prompt": ["a"], "completion": pyarrow.array([float("nan")])})
    pyarrow.parquet.write_table(table, "a.parquet")
    with pytest.raises(DataError, match=r'^a.parquet: row 1: "completion" is NaN, a missing value'):
        read_records(["a.parquet"])


def test_unused_fields_are_said() -> None:
    records({"text": "a", "id": 1, "url": "x"})
    assert read(["a.jsonl"]).notes == ['a.jsonl: the fields "id", "url" are not used by the format text']


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'format is "mesages"; .* Did you mean "messages"'):
        records({"text": "a"}, format="mesages")  # type: ignore[arg-type]


def test_no_files_at_all() -> None:
    with pytest.raises(DataError, match="no data files were given"):
        read_records([])
