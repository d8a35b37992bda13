"""A new verb takes one file, `toy_verb.py`, and one line in `dispatch.VERBS`."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratune.cli.dispatch import VERBS, Verb
from tests.cli_lab import loratune, write_jsonl


@pytest.fixture(autouse=True)
def _with_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "count", Verb("tests.extending.toy_verb:run", "the number of records of data files"))
    monkeypatch.chdir(tmp_path)
    for name, number in (("a.jsonl", 3), ("b.jsonl", 2)):
        write_jsonl(tmp_path / name, [{"text": "x"}] * number)


def test_it_runs_with_its_arguments() -> None:
    assert loratune("count", "a.jsonl", "b.jsonl").out == "5 records in a.jsonl, b.jsonl\n"
    assert loratune("count", "a.jsonl", "b.jsonl", "--per-file").out == "3 records in a.jsonl\n2 records in b.jsonl\n"


def test_help_shows_it() -> None:
    assert "count     the number of records of data files" in loratune("--help").out
    explained = loratune("count", "--help")
    assert explained.status == 0
    assert "usage: loratune count" in explained.out
    assert "DATA [DATA ...]" in explained.out
    assert "--per-file" in explained.out


def test_its_errors_are_shown_as_those_of_other_verbs() -> None:
    missing = loratune("count", "c.jsonl")
    assert (missing.status, missing.err[:7]) == (2, "error: ")
    assert "c.jsonl: no such file" in missing.err
    assert loratune("count", "a.jsonl", "--format", "alpaca").status == 2
    assert loratune("count", "--per-files").status == 2
    assert 'Did you mean "count"?' in loratune("cuont").err
