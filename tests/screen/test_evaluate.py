"""The table of `loratune eval` fits a narrow terminal, and its JSON is valid."""

from __future__ import annotations

import io
import json

from rich.console import Console

from loratune.infer.evaluate import Answer, Evaluation, ExactMatch, Loss
from loratune.screen.evaluate import as_json, draw

RIGHT = Answer("22 Mar '55", "1955-03-22", "1955-03-22", True)
WRONG = Answer("03/04/05\nsharp", "2005-04-03", "\x1b[2J2005-03-04", False)
SILENT = Answer("june 5 2005", "2005-06-05", "  \n", False)
BABBLE = Answer("today", "2005-06-05", "on and on " * 500, False)

EVALUATIONS = [
    Evaluation("base", Loss(4.8234, 2200), ExactMatch((WRONG, SILENT, BABBLE, BABBLE), 4.3, 900)),
    Evaluation("dates", Loss(0.0312, 2200), ExactMatch((RIGHT, RIGHT, RIGHT, WRONG), 3.1, 60)),
    Evaluation("text", Loss(900.0, 2200), None),
    Evaluation("answers", None, ExactMatch((RIGHT,), 0.1, 10)),
]


def drawn(width: int, wrong: int = 3) -> str:
    console = Console(file=io.StringIO(), width=width)
    draw(EVALUATIONS, console, data="dates.heldout.jsonl", wrong=wrong)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_everything_measured_is_shown() -> None:
    text = drawn(80)
    for expected in ("4.8234", "124", "0.0%", "75.0%", "3 of 4", "3.1 s", "inf", "3 of 4 wrong answers", "(nothing)"):
        assert expected in text, expected


def test_it_fits_80_columns_and_holds_no_escape_codes() -> None:
    text = drawn(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "␛[2J2005-03-04" in text


def test_long_answers_are_cut_and_wrong_ones_can_be_left_out() -> None:
    assert len(drawn(80)) < 4000
    assert "wanted" not in drawn(80, wrong=0)


def test_json_has_the_same_numbers() -> None:
    values = json.loads(json.dumps(as_json(EVALUATIONS, data="d.jsonl", answers=True), allow_nan=False))
    assert values["data"] == "d.jsonl"
    assert [r.get("exact_match") for r in values["results"]] == [0.0, 0.75, None, 1.0]
    assert values["results"][1]["answers"][3] == {
        "prompt": "03/04/05\nsharp", "reference": "2005-04-03", "answer": "\x1b[2J2005-03-04", "ok": False
    }  # fmt: skip
    assert "answers" not in as_json(EVALUATIONS, data="d.jsonl")["results"][0]
