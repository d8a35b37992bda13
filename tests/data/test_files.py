"""Every object has its place. Every error names its place and does not hide the next error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from loratune.data.files import content_hash, is_hub_id, read_objects
from loratune.data.record import RawRecord
from loratune.data.records import read_records
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


def test_csv_cells_may_be_long_and_hold_quotes() -> None:
    """The csv module refuses cells over 131,072 characters."""
    long = "x" * 200_000
    text = f'a,b\r\n"{long}","say ""hi"", \r\n twice"\r\n,c"d\r\n\n"",last'
    items = found("a.csv", text)
    assert sources(items) == ["a.csv:2", "a.csv:4", "a.csv:6"]
    assert [item.fields for item in items] == [  # type: ignore[union-attr]
        {"a": long, "b": 'say "hi", \r\n twice'},
        {"a": "", "b": 'c"d'},
        {"a": "", "b": "last"},
    ]
    assert sources(found("b.csv", "a\r1\r2\r")) == ["b.csv:2", "b.csv:3"]


def test_line_ends_of_old_macs_end_lines() -> None:
    (one, two) = found("a.txt", "one\rline two\r\rtwo\r")
    assert (one.fields, two.fields) == ({"text": "one\nline two"}, {"text": "two"})  # type: ignore[union-attr]
    assert two.source == "a.txt:4"  # type: ignore[union-attr]
    assert sources(found("a.jsonl", '{"text": "one"}\r{"text": "two"}\r')) == ["a.jsonl:1", "a.jsonl:2"]
    assert len(found("a.json", '{"text": "one"}\r{"text": "two"}\r')) == 2
    assert len(found("b.json", '[{"text": "one"},\r{"text": "two"}]\r')) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.md"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_text_in_other_encodings_is_refused(name: str, encoding: str) -> None:
    message = only_fault(name, 'text\n{"text": "été 日本"}'.encode(encoding))
    assert message.startswith(f"{name}:1: ")
    assert message.endswith("save the file as UTF-8")


def test_byte_order_marks_of_appended_files_are_no_text() -> None:
    mark = "\ufeff"
    (item, other) = found("a.txt", f"{mark}one\n\n{mark}two\n")
    assert [item.fields["text"], other.fields["text"]] == ["one", "two"]  # type: ignore[union-attr]
    assert len(found("a.jsonl", f'{mark}{{"text": "a"}}\n{mark}{{"text": "b"}}\n')) == 2


DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("a.json", '{"data": [{"a": 1}]} {"data": [{"a": 2}]}', "broken JSON"),
        ("a.json", '{"data": [\n{"a": 1}]}\n{"a": 2}', "a.json:3: text after the object, which would be lost"),
        ("a.json", '{"data": [\n{"a": 1}]} etc', "a.json:2: text after the object"),
        ("a.json", '[{"a": 1}]\n[{"a": 1}]', "a.json:2: broken JSON at column 1: Extra data"),
        ("a.json", '{"data": [{"a": 1}],\n "data": [{"a": 2}]}', 'a.json: the key "data" appears twice'),
        ("a.json", '{"x": 1, "data": [\n{"a": 1}], "x": 2}', 'a.json: the key "x" appears twice'),
        ("a.json", '{"data": [\n{"a": {"b": 1, "b": 2}}]}', 'the key "b" appears twice'),
        ("a.json", '[\n{"a": 1, "a": 2}]', 'a.json:2: the key "a" appears twice'),
        ("a.json", '{"text": "x", "data": [\n{"text": "y"}]}', "it could be a record or a list"),
        ("a.json", '{"data": [{"a": 1}],}', "broken JSON"),
        ("a.json", '[{"a": 1},]', "broken JSON"),
        ("a.json", "[" + DEEP + "]", "nested deeper than 200 levels"),
        ("a.jsonl", '{"unused": ' + DEEP + "}", "a.jsonl:1: lists and objects are nested deeper than 200 levels"),
        ("a.jsonl", '{"unused": ' + "[" * 250 + "]" * 250 + "}", "a.jsonl:1: lists and objects are nested deeper"),
        ("a.jsonl", '{"unused": ' + '{"a":' * 2000 + "1" + "}" * 2000 + "}", "a.jsonl:1: lists and objects"),
        ("a.jsonl", '{"unused": ' + LONG + "}", "a.jsonl:1: a whole number has more than 4,300 digits"),
        ("a.json", '[\n{"unused": [' + LONG + "]}]", "a.json:2: a whole number has more than 4,300 digits"),
        ("a.json", '{"n": ' + LONG + ', "data": []}', "a.json: a whole number has more than 4,300 digits"),
        ("a.jsonl", '{"unused": 1e999}', "a.jsonl:1: the number 1e999 is too large"),
        ("a.jsonl", '{"unused": {"\\ud83d": 1}}', "a.jsonl:1: \\ud83d is half of a surrogate pair"),
        ("a.csv", 'history\n"' + DEEP + '"', 'the column "history" must hold JSON: lists and objects are nested'),
        ("a.csv", 'tools\n"[""\\ud83d""]"', 'the column "tools" must hold JSON: \\ud83d is half'),
        ("a.csv", 'a\n"open\n', "a.csv:2: broken CSV: a quote is not closed"),
    ],
)
def test_no_record_is_lost_and_limits_are_said(path: str, content: str, message: str) -> None:
    fault = only_fault(path, content)
    assert message in fault
    assert len(fault) < 300


def test_a_list_named_data_inside_the_records_of_json_lines_is_a_field() -> None:
    items = found("a.json", '{"text": "a", "data": [{"text": "x"}]}\n{"text": "b", "data": []}\n')
    assert [item.fields["text"] for item in items] == ["a", "b"]  # type: ignore[union-attr]


def test_many_fields_take_no_time() -> None:
    started = time.process_time()
    keys = ", ".join(f'"key{number}": 1' for number in range(60_000))
    assert 'the key "key7" appears twice' in only_fault("a.jsonl", "{" + keys + ', "key7": 2}')
    names = ",".join(f"column{number}" for number in range(30_000))
    assert len(found("a.csv", f"{names}\n{',' * 29_999}1\n")) == 1
    assert 'the column "column7" twice' in only_fault("a.csv", f"{names},column7\n")
    with pytest.raises(DataError) as fault:
        read_records(["a.csv"])
    assert len(str(fault.value)) < 300
    found("b.csv", f"{names}\n{',' * 29_999}1\n")
    with pytest.raises(DataError) as fault:
        read_records(["b.csv"])
    assert "and 29,988 more" in str(fault.value)
    assert time.process_time() - started < 2


def test_names_from_files_cannot_control_the_terminal() -> None:
    for content in ('{"a\\u001b[31m": 1}', '{"messages": [{"role": "\\u001b[31m", "content": "x"}]}'):
        Path("a.jsonl").write_text(content)
        with pytest.raises(DataError) as fault:
            read_records(["a.jsonl"])
        assert "\\x1b[31m" in str(fault.value)
        assert str(fault.value).isprintable()


def test_a_name_that_is_not_utf8_is_refused() -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    Path(name).write_text('{"text": "x"}')
    with pytest.raises(DataError, match=r"^caf\\udce9.jsonl: this name is not UTF-8 text; rename the file"):
        read_objects(name)
    with pytest.raises(DataError, match=r"no such file\.$"):
        read_objects("cafe.jsonl")


def test_parquet_values_that_python_cannot_hold_are_named() -> None:
    text = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    table = pyarrow.table({"text": text, "when": pyarrow.array([0, 10**15], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(table, "a.parquet")
    good, bad = read_objects("a.parquet")
    assert good.fields["text"] == "fine"  # type: ignore[union-attr]
    assert str(bad).startswith('a.parquet: row 2: the column "')


def test_parquet_with_equal_column_names_is_refused() -> None:
    column = pyarrow.array(["x"])
    pyarrow.parquet.write_table(pyarrow.table([column, column], names=["text", "text"]), "a.parquet")
    with pytest.raises(DataError, match=r'a.parquet: has the column "text" twice'):
        list(read_objects("a.parquet"))


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
