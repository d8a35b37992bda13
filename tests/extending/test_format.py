"""A new record format takes one file, `toy_format.py`, and one line in `tables.FORMATS`."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from loratune import tables
from loratune.data.records import read, read_records
from loratune.errors import DataError
from tests.cli_lab import SHORT, loratune, small_model, write_jsonl

LINE = {"quiz": "tests.extending.toy_format:FORMAT"}
QUIZ = [{"question": f"2 + {n}?", "choices": [str(n), str(n + 2)], "right": 1} for n in range(12)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(tables.FORMATS, *next(iter(LINE.items())))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "quiz.jsonl", QUIZ)
    return tmp_path


def test_it_is_recognised_beside_other_formats(here: Path) -> None:
    write_jsonl(here / "text.jsonl", [{"text": "a"}])
    quiz, *_, text = read_records(["quiz.jsonl", "text.jsonl"])
    assert quiz.messages is not None
    assert [message["content"] for message in quiz.messages] == ["2 + 0?\n- 0\n- 2", "2"]
    assert text.text == "a"


def test_its_errors_have_a_place_and_other_errors_mention_it(here: Path) -> None:
    write_jsonl(here / "bad.jsonl", [QUIZ[0], QUIZ[1] | {"right": 5}])
    with pytest.raises(DataError, match=r'^bad.jsonl:2: "right" is 5; it is the index of one of 2 choices'):
        read_records(["bad.jsonl"])
    write_jsonl(here / "unknown.jsonl", [{"words": 1}])
    with pytest.raises(DataError, match='quiz: "question", "choices" and "right"'):
        read_records(["unknown.jsonl"])
    write_jsonl(here / "more.jsonl", [QUIZ[0] | {"topic": "sums"}])
    assert read(["more.jsonl"]).notes == ['more.jsonl: the fields "topic" are not used by the format quiz']


def test_every_verb_reads_it(here: Path) -> None:
    small_model(here / "base")
    trained = loratune("train", "base", "quiz.jsonl", *SHORT, "--max-steps", "2", "--out", "run")
    assert trained.status == 0, trained.err
    shown = loratune("preview", "base", "quiz.jsonl", "--tokens-per-row", "64", "--cache-dir", "")
    assert shown.status == 0, shown.err
    assert "quiz.jsonl:1" in shown.out
    measured = loratune("eval", "run", "quiz.jsonl", "--limit", "2", "--no-generate", "--json")
    assert measured.status == 0, measured.err
    assert json.loads(measured.out)


def test_settings_accept_its_name_and_no_other() -> None:
    """The names are read when `config` is imported, hence a process of its own."""
    lines = f"from loratune import tables; tables.FORMATS |= {LINE}; from loratune.cli import main; import sys; "
    words = ["train", "base", "quiz.jsonl", "--out", "o", "--print-config", "--format"]
    for name, status in (("quiz", 0), ("quizz", 2)):
        code = f"{lines}sys.exit(main({[*words, name]}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        if not status:
            assert tomllib.loads(done.stdout)["dataset"]["format"] == name
