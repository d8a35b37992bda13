"""Training data in memory: a list of dicts or a `datasets.Dataset` in the place of a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from loratune.data.record import RawRecord, without_nulls
from loratune.errors import ArgumentError, DataError


class TableOfRecords(Protocol):
    """A table whose rows are dicts, such as a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    @property
    def column_names(self) -> Any:
        """Names of the columns."""


class RecordsInMemory(str):
    """The name of data in memory, with its rows. It can stand wherever the path of a data file can."""

    rows: Iterable[object]

    def __new__(cls, name: str, rows: Iterable[object]) -> RecordsInMemory:
        """Args: name: shown in messages, as in "data[3]"; rows: may be read several times."""
        named = super().__new__(cls, name)
        named.rows = rows
        return named

    def objects(self) -> Iterator[RawRecord | DataError]:
        """Every row with its place, and a DataError in place of a row that is no dict."""
        for index, row in enumerate(self.rows):
            source = f"{self}[{index}]"
            if isinstance(row, Mapping):
                # Arrow adds nulls to give all rows one type; a list has only the nulls that its author wrote.
                yield RawRecord(
                    source, dict(row) if isinstance(self.rows, list | tuple) else without_nulls(dict(row))
                )
            else:
                yield DataError(f"{source}: is a {type(row).__name__}, but a record is a dict")

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """A copy, also one in another process, is the name alone."""
        return str, (str(self),)

    def content_hash(self) -> str:
        """SHA-256 (hex) of the rows. Equal hashes mean equal data."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


def as_sources(data: object, name: str) -> list[str]:
    """The data of a Python call as paths, or as one `RecordsInMemory` called `name`.

    Args:
        data: one path or hub id, a list of them, a list of dicts, or a `datasets.Dataset`.

    Raises: ArgumentError: it is something else; the message says how to convert it. DataError: it is empty.
    """
    if isinstance(data, str | os.PathLike):
        return [os.fspath(data)]
    kind = type(data).__name__
    if isinstance(data, Mapping):
        splits = ", ".join(f"{name}[{key!r}]" for key in list(data)[:3])
        raise ArgumentError(
            f"{name} is a {kind}, not a list of records. "
            + (f"Choose a part of it: {splits}" if data else f"Put records into a list: {name}=[...]")
        )
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        raise ArgumentError(f'{name} is a {kind}; convert it: {name}.to_dict("records")')
    if not hasattr(data, "__len__") or not isinstance(data, Iterable):
        raise ArgumentError(
            f"{name} is a {kind}; it must be a file, a list of files, a list of dicts or a datasets.Dataset. "
            + ("list(...) makes a list of it" if isinstance(data, Iterable) else "")
        )
    if len(data) == 0:  # type: ignore[arg-type]
        raise DataError(f"{name} is empty: there are no records and no files")
    if isinstance(data, Sequence) and all(isinstance(path, str | os.PathLike) for path in data):
        return [os.fspath(path) for path in data]
    return [RecordsInMemory(name, data)]
