"""JSON as RFC 8259 defines it, within limits: no duplicate keys, NaN or half characters; bounded depth and digits.

Python's decoder keeps the last of two equal keys, accepts NaN, and fails on deep nesting and long numbers with errors
of its own. Each of these becomes a `NotStrict` with the cause.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 200
"""Lists and objects inside each other. Schemas of tools have about ten."""


class NotStrict(ValueError):
    """Text that is not JSON, or is JSON beyond the limits. The message has the cause and the column, if known."""


class StrictDecoder(json.JSONDecoder):
    """A decoder of values inside a text (`raw_decode`) that raises json.JSONDecodeError or NotStrict."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Decodes the value that begins at an offset. Returns it and the offset behind it."""
        try:
            value, end = super().raw_decode(s, idx)
        except RecursionError as error:
            raise _too_deep() from error
        except json.JSONDecodeError:
            raise
        except NotStrict:
            raise
        except ValueError as error:  # the interpreter's limit on digits
            raise NotStrict("a whole number has more than 4,300 digits; write it as a string") from error
        if s.count("[", idx, end) + s.count("{", idx, end) > MAX_DEPTH and depth_exceeds(value, MAX_DEPTH):
            raise _too_deep()
        if s.find("\\u", idx, end) >= 0:
            _check_characters(value)
        return value, end


def decode(text: str) -> Any:
    """The value of a whole JSON text. Raises NotStrict with the cause and column."""
    try:
        return StrictDecoder().decode(text)
    except json.JSONDecodeError as error:
        raise NotStrict(f"{error.msg} (column {error.colno})") from error


def depth_exceeds(value: Any, limit: int) -> bool:
    """True if lists and objects are nested deeper than `limit`. Needs no recursion."""
    level = [value]
    for _ in range(limit + 1):
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.values()
            elif isinstance(item, list | tuple):
                children += item
        level = [item for item in children if isinstance(item, dict | list | tuple)]
        if not level:
            return False
    return True


def half_character(value: Any) -> str | None:
    """The first half of a surrogate pair in a value's strings, escaped as "\\ud83d"; None if there is none."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    return f"\\u{ord(item[error.start]):04x}"
        elif isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
    return None


def _check_characters(value: Any) -> None:
    if half := half_character(value):
        raise NotStrict(f"{half} is half of a surrogate pair, not a character; fix the text")


def _too_deep() -> NotStrict:
    return NotStrict(f"lists and objects are nested deeper than {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise NotStrict(f'the key "{name[:40]}" appears twice in one object; keep one of them')
            seen.add(name)
    return fields


def _no_constant(name: str) -> Any:
    raise NotStrict(f"{name} is not a JSON value; write null or leave the field out")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise NotStrict(f"the number {digits[:20]} is too large")
    return value
