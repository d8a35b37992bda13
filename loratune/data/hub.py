"""Hub data sets to raw objects, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets

from loratune import hub
from loratune.data.record import RawRecord, without_nulls
from loratune.errors import DataError, nearest


def read_hub(name: str) -> Iterator[RawRecord]:
    """Yields the rows of a hub data set's split.

    Args:
        name: "owner/name" for the split "train", or "owner/name:split".
    Raises: DataError: there is no such data set or split, or the hub cannot be reached and there is no local copy.
    """
    dataset_id, _, split = name.partition(":")
    try:
        downloaded = None if Path(dataset_id).exists() else hub.find(dataset_id, "dataset")
        splits = datasets.load_dataset(downloaded or dataset_id)
    except (hub.NotOnHub, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: no such file here, and no such data set could be loaded from the hub: {reason}"
        ) from error
    chosen = split or "train"
    if chosen not in splits:
        raise DataError(
            f'{name}: has no split "{chosen}", but {", ".join(splits)}; write {dataset_id}:SPLIT.'
            f"{nearest(chosen, splits)}"
        )
    for number, row in enumerate(splits[chosen], start=1):
        yield RawRecord(f"{name}: row {number}", without_nulls(dict(row)))
