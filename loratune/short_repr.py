"""A `repr` for configurations that shows the settings of the user and leaves out the defaults."""

from __future__ import annotations

import typing
from dataclasses import MISSING, Field, fields
from typing import Any


class ShortRepr:
    """Base of the configurations: `repr` shows the settings that are not the defaults, `str` too."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={value!r}"
            for f in fields(typing.cast(Any, self))
            if is_required(f) or (value := getattr(self, f.name)) != default_of(f)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def default_of(setting: Field[Any]) -> Any:
    """The default of a field that is not required."""
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default


def is_required(setting: Field[Any]) -> bool:
    """True for a field without a default."""
    return setting.default is MISSING and setting.default_factory is MISSING
