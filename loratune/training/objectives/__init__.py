"""Training objectives by name. A new objective is one file in this folder and one line in the table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from loratune.training.objectives.objective import Objective
from loratune.training.objectives.sft import sft

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "sft": sft,
    }
)
