"""The exceptions for users, and the "did you mean" at the end of their messages.

A message gives the fault, its place, its cause and the nearest fix in one or two lines. It is raised before expensive
work starts. The command line prints it without a traceback and exits with status 2. Each class also inherits the
fitting standard exception, so library users can catch `ValueError` or `OSError` as usual. A broken internal invariant
is an `assert` instead.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable


class LoratuneError(Exception):
    """Base of all errors that a user can cause and fix."""


class ConfigError(LoratuneError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class ArgumentError(LoratuneError, TypeError):
    """A Python call has an argument of the wrong type, for example two that are swapped."""


class DataError(LoratuneError, ValueError):
    """A record cannot be used; the message starts with `file:line:`."""


class ModelError(LoratuneError, ValueError):
    """The base model or its tokenizer is missing, incomplete or unsuitable."""


class AdapterError(LoratuneError, ValueError):
    """An adapter does not fit the model, its file is invalid, or its name is unknown or already used."""


class OutputError(LoratuneError, OSError):
    """An output cannot be written: it exists already, is read-only, or the disk is full."""


class TrainingError(LoratuneError, RuntimeError):
    """Training cannot continue, for example because the loss stays non-finite."""


def expect(value: object, kind: type | types.UnionType, name: str, call: str, fix: str = "") -> None:
    """Checks the type of an argument.

    Args:
        name: of the parameter.
        call: the call in its right form, for example "attach(model, config)".
        fix: a sentence about the nearest fix.

    Raises: ArgumentError: `value` is not a `kind`.
    """
    if not isinstance(value, kind):
        kinds = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
        named = " or ".join(part.__name__ for part in kinds)
        given = type(value).__name__
        raise ArgumentError(f"{call}: {name} must be a {named}, but a {given} was given. {fix}".rstrip())


def nearest(word: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Returns ' Did you mean "x"?' with the candidates that resemble `word`, or '' if none does."""
    close = difflib.get_close_matches(word, list(candidates), n=limit, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f'"{c}"' for c in close) + "?"
