"""Reports metrics to TensorBoard, Weights & Biases or trackio (`--log-to`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from loratune.config import Tracker
from loratune.errors import ConfigError


class Reporter(Protocol):
    """One open tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Reports scalar metrics of one optimizer step."""

    def close(self) -> None:
        """Flushes and ends the run."""


class _TensorBoard:
    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _RunBased:
    """wandb and trackio, which share one interface."""

    def __init__(self, module: Any, out: Path, config: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project="loratune", name=out.name, config=dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


def require(names: Sequence[Tracker]) -> None:
    """Checks that the packages of all trackers are installed. Raises ConfigError: one is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--log-to {name}: not installed; pip install 'loratune[{name}]'") from error


def open_all(names: Sequence[Tracker], out: Path, config: Mapping[str, Any]) -> list[Reporter]:
    """Opens the named trackers; `config` is the complete run configuration."""
    require(names)
    return [
        _TensorBoard(out) if name == "tensorboard" else _RunBased(importlib.import_module(name), out, config)
        for name in names
    ]
