"""Every object has its place. Every error names its place and does not hide the next error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from loratune.data.files import content_hash, is_hub_id, read_objects
from loratune.data.record import RawRecord
from loratune.errors import DataError


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def found(path: str, content: str | bytes) -> list[RawRecord | DataError]:
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_objects(path))


def only_fault(path: str, content: str | bytes) -> str:
    """The only error of the file, yielded in place of an object or raised for the whole file."""
    try:
        faults = [item for item in found(path, content) if isinstance(item, DataError)]
    except DataError as fault:
        return str(fault)
    assert len(faults) == 1
    return str(faults[0])


def sources(items: list[RawRecord | DataError]) -> list[str]:
    assert all(isinstance(item, RawRecord) for item in items)
    return [item.source for item in items if isinstance(item, RawRecord)]


def test_jsonl_numbers_lines_as_an_editor_does() -> None:
    items = found("a.jsonl", '{"text": "one\u2028still one"}\r\n\n{"text": "two"}\n')
    assert sources(items) == ["a.jsonl:1", "a.jsonl:3"]


def test_json_list_knows_the_line_of_each_element() -> None:
    listed = '[\n {"text": "one"},\n {"text":\n  "two"},\n\n {"text": "three"}\n]\n'
    assert sources(found("a.json", listed)) == ["a.json:2", "a.json:3", "a.json:6"]
    inside = '{"version": {"n": [1]},\n "data": [{"text": "one"},\n  {"text": "two"}], "more": 1}'
    assert sources(found("b.json", inside)) == ["b.json:2", "b.json:3"]


def test_jsonl_under_the_name_json_is_read() -> None:
    assert sources(found("a.json", '{"text": "one"}\n{"text": "two"}\n')) == ["a.json:1", "a.json:2"]


def test_a_whole_surrogate_pair_is_a_character() -> None:
    (item,) = found("a.jsonl", '{"a": "\\ud83e\\udd8a"}')
    assert item == RawRecord("a.jsonl:1", {"a": "🦊"})


def test_byte_order_mark_is_accepted() -> None:
    assert sources(found("a.jsonl", b'\xef\xbb\xbf{"text": "one"}')) == ["a.jsonl:1"]


def test_csv_cells_may_span_lines_and_hold_json() -> None:
    text = 'prompt,completion\n"two\nlines",x\nlast,y\n'
    items = found("a.csv", text)
    assert sources(items) == ["a.csv:2", "a.csv:4"]
    assert items[0].fields == {"prompt": "two\nlines", "completion": "x"}  # type: ignore[union-attr]
    chat = found("b.csv", 'messages\n"[{""role"": ""user"", ""content"": ""hi""}]"\n')
    assert chat[0].fields["messages"][0]["role"] == "user"  # type: ignore[union-attr]
    assert found("c.tsv", "text\ta\nx\ty\n")[0].fields == {"text": "x", "a": "y"}  # type: ignore[union-attr]


def test_text_is_divided_at_blank_lines() -> None:
    items = found("a.txt", "\nfirst\n  line two\n\n \nsecond\n")
    assert sources(items) == ["a.txt:2", "a.txt:6"]
    assert [item.fields["text"] for item in items] == ["first\n  line two", "second"]  # type: ignore[union-attr]


def test_parquet_drops_the_nulls_that_arrow_fills_in() -> None:
    calls = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 0}]
    table = pyarrow.Table.from_pylist([{"messages": calls}, {"messages": calls[:1]}])
    pyarrow.parquet.write_table(table, "a.parquet")
    items = list(read_objects("a.parquet"))
    assert sources(items) == ["a.parquet: row 1", "a.parquet: row 2"]
    assert items[0].fields["messages"] == calls  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", "\n \n", "a.jsonl: holds no records"),
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl:2: broken JSON at column 7"),
        ("a.jsonl", '{"a": 1}\n{"a": 1} {"b": 2}\n', "one object per line"),
        ("a.jsonl", "{'a': 1}", "double quotes"),
        ("a.jsonl", "[1]", "a.jsonl:1: this is a list"),
        ("a.jsonl", '{"a": NaN}', "a.jsonl:1: NaN is not a JSON value"),
        ("a.jsonl", '{"a": 1, "a": 2}', 'a.jsonl:1: the key "a" appears twice'),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: byte 0xff is not valid UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("a.json", '[{"a": 1},\n{"a": 1 "b"}]', "a.json:2: broken JSON at column 9"),
        ("a.json", '[{"a": 1}\n{"a": 1}]', "a.json:2: broken JSON"),
        ("a.json", '[{"a": 1},\n{"a": NaN}]', "a.json:2: NaN"),
        ("a.json", '[{"a": 1},\n "b"]', "a.json:2: this is a string"),
        ("a.json", '[{"a": 1}]\n]', "a.json:2: broken JSON at column 1: Extra data"),
        ("a.json", '{"data": [{"a": 1}]', "broken JSON"),
        ("a.json", '[{"a": 1},\n{"a": "\\ud83d"}]', "a.json:2: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", '{"a": "\\uD83D"}', "a.jsonl:1: \\ud83d is half of a surrogate pair"),
        ("a.json", "[]", "a.json: holds no records"),
        ("a.json", '"text"', "a list of objects"),
        ("a.json", '{"rows": [\n{"a": 1}\n]}', '"rows", but no list "data"'),
        ("a.json", '[{"a": 1}', "a.json:1: broken JSON"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: 3 cells, but the header names 2 columns"),
        ("a.csv", "a,a\n1,2\n", 'the column "a" twice'),
        ("a.csv", 'a,b\n"1"x,2\n', "a.csv:2: broken CSV"),
        ("a.csv", "messages\nnot json\n", 'a.csv:2: the column "messages" must hold JSON'),
        ("a.parquet", "no parquet", "a.parquet: cannot be read as Parquet"),
        ("a.jsnl", "{}", 'unknown kind of file ".jsnl"'),
        ("a.jsnl", "{}", 'Did you mean ".json'),
    ],
)
def test_faults_name_place_and_reason(path: str, content: str | bytes, message: str) -> None:
    assert message in only_fault(path, content)


def test_missing_file_lists_what_is_near() -> None:
    Path("train.jsonl").write_text('{"text": "x"}')
    with pytest.raises(DataError, match=r'trian.jsonl: no such file. Did you mean "train.jsonl"\?'):
        read_objects("trian.jsonl")
    with pytest.raises(DataError, match=r"Data files there: train.jsonl"):
        read_objects("zzz.csv")
    with pytest.raises(DataError, match=r"folder .*nowhere.* does not exist"):
        read_objects("nowhere/train.jsonl")
    Path("folder").mkdir()
    with pytest.raises(DataError, match="folder: is a folder"):
        read_objects("folder")


def test_one_broken_line_does_not_hide_the_next() -> None:
    items = found("a.jsonl", '{"a"}\n{"text": "fine"}\n[]\n')
    assert [type(item) for item in items] == [DataError, RawRecord, DataError]


def test_hash_is_of_the_content() -> None:
    for path, content in {"a.txt": "one", "b.txt": "one", "c.txt": "two"}.items():
        Path(path).write_text(content)
    assert content_hash("a.txt") == content_hash("b.txt") != content_hash("c.txt")


def test_only_what_is_not_here_is_a_hub_id() -> None:
    Path("data").mkdir()
    assert is_hub_id("owner/name")
    assert is_hub_id("owner/name:test")
    assert not is_hub_id("data/name")  # a misspelt file in a local folder
    assert not is_hub_id("owner/name.jsonl")
    assert not is_hub_id("train.jsonl")


HUB_SCRIPT = """
import sys
from loratune.data.hub import read_hub
from loratune.data.record import RawRecord
from loratune.errors import DataError
print([raw.fields["text"] for raw in read_hub("owner")], next(read_hub("owner")).source)
for name in ("owner:tset", "nobody/nothing"):
    try:
        list(read_hub(name))
    except DataError as error:
        print(error)
"""


def test_hub_data_sets_go_through_datasets(tmp_path: Path) -> None:
    """A local folder replaces a repository, since load_dataset reads both alike. Without a network: a clear error."""
    Path("owner").mkdir()
    Path("owner/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in "ab"))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    rows, split, offline = run.stdout.splitlines()
    assert rows == "['a', 'b'] owner: row 1"
    assert split.startswith('owner:tset: has no split "tset", but train; write owner:SPLIT')
    assert offline.startswith("nobody/nothing: no such file here, and no such data set could be loaded from the hub")
