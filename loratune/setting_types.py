"""Types of settings: whether a value has the annotated type of its field, and the words for that type."""

from __future__ import annotations

import math
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from loratune import foreign
from loratune.errors import ConfigError
from loratune.tables import FORMATS, OBJECTIVES, PRECISIONS


def fits(value: object, expected: Any) -> bool:
    """True if `value` has the annotated type. An int counts as a float; a bool does not count as a number.

    Numbers are finite: no setting can be NaN, infinite, or a whole number that no 64 bits hold. Text is UTF-8.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in arguments)
    if origin is Literal:
        return value in arguments and type(value) in {type(a) for a in arguments}
    if origin is list:
        return isinstance(value, list) and all(fits(v, arguments[0]) for v in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(v, arguments[1]) for v in value.values())
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    if expected is str:
        return isinstance(value, str) and foreign.is_text(value)
    return isinstance(value, expected)


def misfit(name: str, value: object, expected: Any) -> str:
    """The error for a value that does not fit."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}; it must be finite"
    whole = not isinstance(value, str) or foreign.is_text(value)
    return f"{name} = {reprlib.repr(value)} is not {describe(expected) if whole else 'UTF-8 text'}"


def describe(expected: Any) -> str:
    """An annotated type in words."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is list:
        return f"a list, each {describe(arguments[0])}"
    if origin is dict:
        return f"a table of {describe(arguments[1])}"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(
        expected, str(expected)
    )


_LARGEST = sys.float_info.max
_TABLES: Mapping[str, Mapping[str, str]] = {"objective": OBJECTIVES, "format": FORMATS, "precision": PRECISIONS}


def check_types(config: object) -> None:
    """Raises ConfigError if a value of a section has the wrong type, as Python does not check annotations."""
    for name, expected in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        table = _TABLES.get(name, ())  # may have grown after this module was imported
        if not fits(value, expected) and not (isinstance(value, str) and value in table):
            raise ConfigError(misfit(name, value, expected))


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
