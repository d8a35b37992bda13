"""Every example of docs/data.md is accepted in the format of its section. Every error of the page is the real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loratune.data.files import READERS
from loratune.data.messages import LOSS_FLAGS, ROLES, SHAREGPT_ROLES
from loratune.data.prompting import forms_of
from loratune.data.records import read, read_records
from loratune.data.strict_json import MAX_DEPTH
from loratune.errors import DataError
from loratune.tables import FORMATS
from tests.cli_lab import loratune

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
EXAMPLES = [
    (name, kind, content)
    for name, section in SECTIONS
    for kind, content in re.findall(r"^```(\w+)\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
]
ERRORS = re.findall(r"^\| `(\{.*\})` \| `(train\.jsonl:.*)` \|$", PAGE, flags=re.MULTILINE)


def written(folder: Path, kind: str, content: str) -> str:
    file = folder / f"train.{kind}"
    file.write_text(content, encoding="utf-8")
    return str(file)


def test_the_page_has_every_format_file_and_flag():
    assert [name for name, _ in SECTIONS] == list(FORMATS)
    assert {name for name, _, _ in EXAMPLES} == set(FORMATS)
    assert len(ERRORS) == 5
    words = set(re.findall(r"`([^`\s]+)`", PAGE))
    assert set(READERS) | set(ROLES) | set(SHAREGPT_ROLES) <= words
    assert set(LOSS_FLAGS) - {"weight"} <= words
    assert f"deeper than {MAX_DEPTH} levels" in PAGE.replace("\n", " ")


@pytest.mark.parametrize(("name", "kind", "content"), EXAMPLES, ids=[f"{n}-{k}" for n, k, _ in EXAMPLES])
def test_an_example_is_read_in_the_format_of_its_section(name, kind, content, tmp_path):
    """All examples have two records and no unused field. The last two of the page repeat earlier formats."""
    file = written(tmp_path, kind, content)
    expected = {"csv": "alpaca", "json": "prompt_completion"}.get(kind, name)
    reading = read([file])
    assert len(reading.records) == 2
    assert not [note for note in reading.notes if "not used" in note]
    others = []
    for other in FORMATS:
        try:
            read([file], other)
            others.append(other)
        except DataError:
            continue
    assert others == [expected]


def test_the_model_sees_what_the_table_says(tmp_path):
    seen = {
        (name, kind, content): forms_of(read_records([written(tmp_path, kind, content)]))
        for name, kind, content in EXAMPLES
    }
    for (name, kind, content), forms in seen.items():
        if kind == "json" or (name == "prompt_completion" and '"role"' not in content):
            assert forms == ("completion",)
        elif name == "text" and kind != "csv":
            assert forms == ("text",)
        else:
            assert forms == ("conversation",)


def test_preview_accepts_all_examples(tmp_path):
    files = []
    for number, (_, kind, content) in enumerate(EXAMPLES):
        (tmp_path / str(number)).mkdir()
        files.append(written(tmp_path / str(number), kind, content))
    shown = loratune("preview", "loratune/pocket", *files, "--eval-fraction", "0", "--cache-dir", "")
    assert shown.status == 0, shown.err
    assert f"about {2 * len(EXAMPLES)} documents in a step" in shown.out


@pytest.mark.parametrize(("record", "message"), ERRORS)
def test_an_error_of_the_page_is_the_error_that_appears(record, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(record + "\n", encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_records(["train.jsonl"])
    assert str(raised.value) == message
