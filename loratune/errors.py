"""The exceptions that reach a user, and the "did you mean" that ends their messages.

Every one says what is wrong, where, why, and the nearest fix, in one or two lines, and is raised before
expensive work starts. The command line prints the message without a traceback and exits with status 2.
Each kind also inherits the standard exception that fits, so that library callers may catch `ValueError` or
`OSError` as they would elsewhere. A broken invariant of our own is an `assert`, not one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoratuneError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(LoratuneError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(LoratuneError, ValueError):
    """A record cannot be used; the message starts with `file:line:`."""


class ModelError(LoratuneError, ValueError):
    """The base model or its tokenizer is missing, incomplete or unsuitable."""


class AdapterError(LoratuneError, ValueError):
    """An adapter does not fit the model, its file is wrong, or its name is unknown or taken."""


class OutputError(LoratuneError, OSError):
    """An output cannot be written: it exists, is read-only, or the disk is full."""


class TrainingError(LoratuneError, RuntimeError):
    """Training cannot go on, for example because the loss stays non-finite."""


def nearest(word: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Returns ' Did you mean "x"?' for the candidates that resemble `word`, or '' if none does."""
    close = difflib.get_close_matches(word, list(candidates), n=limit, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f'"{c}"' for c in close) + "?"
