"""metrics.jsonl: a damaged line costs only itself, and is counted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loratune.errors import OutputError
from loratune.runs import metrics

GOOD = b'{"step": 1, "loss": 2.5}'
DAMAGED = {
    "list": b"[1, 2]",
    "number": b"3",
    "null": b"null",
    "cut": b'{"step": 2, "lo',
    "latin": b'{"step": 2, "x": "\xe9"}',
    "zero-bytes": b"\x00\x00\x00\x00",
    "no-step": b'{"loss": 1.0}',
    "negative-step": b'{"step": -1, "loss": 1.0}',
    "step-as-text": b'{"step": "2"}',
    "step-as-bool": b'{"step": true}',
    "text": b'{"step": 2, "loss": "low"}',
    "nested": b'{"step": 2, "loss": [1]}',
    "deep": b"[" * 9999,
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "beyond-floats": b'{"step": 2, "loss": ' + b"9" * 400 + b"}",
    "step-beyond-64-bits": b'{"step": ' + b"9" * 30 + b"}",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
def test_a_damaged_line_costs_only_itself(tmp_path: Path, name: str, end: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(GOOD + b"\n" + DAMAGED[name] + b"\n" + GOOD.replace(b"1", b"3") + end)
    lines, damaged = metrics.read_all(file)
    assert lines == [{"step": 1, "loss": 2.5}, {"step": 3, "loss": 2.5}]
    assert damaged == 1
    assert metrics.losses_of(file) == [2.5, 2.5]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    file = metrics.MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": math.nan, "gradient_norm": math.inf, "learning_rate": 1e-4})
    assert file.path.read_text() == '{"step": 1, "loss": null, "gradient_norm": null, "learning_rate": 0.0001}\n'
    file.path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1e999}\n')
    assert metrics.read(file.path) == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]


def test_a_missing_file_has_no_lines_and_a_folder_is_an_error(tmp_path: Path) -> None:
    assert metrics.read_all(tmp_path / "metrics.jsonl") == ([], 0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: .*is not a regular file"):
        metrics.read(tmp_path / "metrics.jsonl")


def test_a_resumed_file_keeps_the_readable_lines_up_to_its_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\nxx\n{"step": 2}\n{"step": 3}\n')
    metrics.MetricsFile(file, resume_step=2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
