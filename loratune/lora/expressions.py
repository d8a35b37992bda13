"""Regular expressions of an adapter's configuration, which may come from anyone, with a limit on their time.

Some expressions take time that doubles with each character of a path. The module `regex`, which transformers needs as
well, stops a match after a given time; Python's `re` cannot.
"""

from __future__ import annotations

import regex

from loratune.errors import AdapterError

SECONDS = 0.2
"""Longest time of one match; usual ones take microseconds."""


class PathExpression:
    """A compiled expression. Raises AdapterError: it is not one; later, a match takes too long."""

    def __init__(self, field: str, expression: str) -> None:
        self._name = f'{field} "{expression if len(expression) <= 80 else expression[:77] + "..."}"'
        try:
            self._compiled = regex.compile(expression)
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{self._name} is not a regular expression: {error}") from error

    def fits(self, path: str) -> bool:
        """True if the expression matches the path in full."""
        try:
            return self._compiled.fullmatch(path, timeout=SECONDS) is not None
        except TimeoutError as error:
            raise self._too_slow(path) from error

    def number_in(self, path: str) -> int | None:
        """The first group of a match at the start of the path, as a number."""
        try:
            found = self._compiled.match(path, timeout=SECONDS)
        except TimeoutError as error:
            raise self._too_slow(path) from error
        return None if found is None else int(found[1])

    def _too_slow(self, path: str) -> AdapterError:
        return AdapterError(f"{self._name} takes over {SECONDS} s on {path}; write it without nested repetitions")


def fits_end(field: str, key: str, path: str) -> bool:
    """True if a key of rank_pattern or alpha_pattern matches the path, or its end after a dot."""
    return PathExpression(field, rf"(.*\.)?({key})").fits(path)
