"""Training objectives. A new one is a file in this folder and a line in `tables.OBJECTIVES`."""

from __future__ import annotations

from loratune.errors import ConfigError, nearest
from loratune.tables import OBJECTIVES, load_entry
from loratune.training.objectives.objective import Objective


def objective_named(name: str) -> Objective:
    """The objective of that name. Raises ConfigError: there is none."""
    if name not in OBJECTIVES:
        raise ConfigError(
            f'objective "{name}" does not exist; there is {", ".join(OBJECTIVES)}.{nearest(name, OBJECTIVES)}'
        )
    objective: Objective = load_entry(OBJECTIVES[name])
    return objective
