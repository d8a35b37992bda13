"""Every entry of the tables exists and fulfils its contract. The settings accept exactly their names."""

from __future__ import annotations

import inspect
import re
from typing import get_args

import pytest

from loratune import config, tables
from loratune.cli import VERBS
from loratune.data.record import RecordFormat
from loratune.precision.contract import WeightFormat


@pytest.mark.parametrize("name", tables.FORMATS)
def test_record_formats(name: str) -> None:
    format = tables.load_entry(tables.FORMATS[name])
    assert isinstance(format, RecordFormat)
    needed = set(re.findall(r'"(\w+)"', format.needs))
    assert needed
    assert needed <= format.uses


@pytest.mark.parametrize("name", tables.PRECISIONS)
def test_precisions(name: str) -> None:
    precision = tables.load_entry(tables.PRECISIONS[name])()
    assert isinstance(precision, WeightFormat)
    assert precision.name == name


@pytest.mark.parametrize(
    "location", [*tables.OBJECTIVES.values(), *tables.RECIPES.values(), *tables.VARIANTS.values()]
)
def test_other_entries_exist(location: str) -> None:
    assert tables.load_entry(location) is not None


@pytest.mark.parametrize("name", VERBS)
def test_verbs(name: str) -> None:
    function = tables.load_entry(VERBS[name].function)
    assert list(inspect.signature(function).parameters) == ["words"]
    assert VERBS[name].summary
    assert function.__doc__


def test_settings_accept_the_names() -> None:
    assert get_args(config.DataFormat) == ("auto", *tables.FORMATS)
    assert get_args(config.ObjectiveName) == tuple(tables.OBJECTIVES)
    assert set(get_args(config.Precision)) == set(get_args(config.DensePrecision)) | tables.PRECISIONS.keys()


def test_a_wrong_entry_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        tables.load_entry("loratune.data.formats.absent:FORMAT")
    with pytest.raises(AttributeError):
        tables.load_entry("loratune.data.formats.text:ABSENT")
