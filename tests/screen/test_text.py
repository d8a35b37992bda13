"""Model output cannot control a terminal, and a curve follows its values."""

from __future__ import annotations

import math

from loratune.screen.text import curve, visible


def test_control_characters_become_signs() -> None:
    assert visible("a\x1b[31mb\x07\x9b2J\x7f\r") == "a␛[31mb␇�2J�␍"
    assert visible("tabs\tand\nlines, 完 é 😀") == "tabs\tand\nlines, 完 é 😀"


def test_a_curve_is_as_high_as_its_values() -> None:
    assert curve([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert curve([0, 0, 8, 8], 2) == "▁█"
    assert curve([4.0], 8, top=7) == "▅"
    assert curve([0, 1], 8, ascii_only=True) == ".@"


def test_a_curve_of_anything_can_be_drawn() -> None:
    assert curve([], 8) == ""
    assert curve([3, 3, 3], 8) == "▁▁▁"
    assert curve([0.0, 0.0], 8, top=0.0) == "▁▁"
    assert len(curve([math.nan, 1, math.inf, 2] * 100, 24)) == 24
