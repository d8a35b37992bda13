"""Quantities in readable units, also at the limits between units."""

from __future__ import annotations

from loratune.units import duration, size


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**19, 5 * 2**30, 2**40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5.00 GiB", "1024.00 GiB"
    ]  # fmt: skip


def test_durations_round_into_the_next_unit() -> None:
    assert [duration(s) for s in (0, 9.94, 9.96, 59.4, 59.6, 3599.7, 7500)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "1 h 00 min", "2 h 05 min"
    ]  # fmt: skip
