"""Text for people: bytes in binary units, durations, dates, commands to copy."""

from __future__ import annotations

import re
import shlex
from datetime import date


def size(count: float) -> str:
    """Bytes in binary units: 512 B, 14.7 MiB, 5.21 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def command(*words: object) -> str:
    """A command line that a shell splits into these words again: names with spaces or brackets are quoted."""
    return shlex.join(map(str, words))


def path_word(path: object) -> str:
    """A path as a word of a command line that no program takes for an option."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def duration(seconds: float) -> str:
    """Seconds in readable units: 4.8 s, 48 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def is_date(text: str) -> bool:
    """True for a date of the calendar as YYYY-MM-DD."""
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


_UNITS = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def bytes_of(text: str) -> int:
    """Bytes from a size such as 24GiB, 500 MB or 1.5GiB. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f'"{text}" is not a size; write a number and a unit, such as 24GiB')
    return int(float(match[1]) * _UNITS[match[2].lower()])
