"""The exceptions for users, and the "did you mean" at the end of their messages.

A message gives the fault, its place, its cause and the nearest fix in one or two lines. It is raised before expensive
work starts. The command line prints it without a traceback and exits with status 2. Each class also inherits the
fitting standard exception, so library users can catch `ValueError` or `OSError` as usual. A broken internal invariant
is an `assert` instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoratuneError(Exception):
    """Base of all errors that a user can cause and fix."""


class ConfigError(LoratuneError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


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


def nearest(word: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Returns ' Did you mean "x"?' with the candidates that resemble `word`, or '' if none does."""
    close = difflib.get_close_matches(word, list(candidates), n=limit, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f'"{c}"' for c in close) + "?"
