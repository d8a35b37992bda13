"""The jobs of a sweep, from a TOML file: shared settings, a grid, and settings of single jobs.

    data = ["train.jsonl"]                  # above the first section: settings of all jobs
    max_steps = 200                         # names as in run.toml and flags; sections are optional

    [grid]                                  # every combination becomes a job
    learning_rate = [1e-4, 3e-4, 1e-3]
    r = [8, 64]

    [halving]                               # the better half continues after 1/4 and 1/2 of the steps
    at = [0.25, 0.5]

    [[job]]                                 # instead of a grid, or multiplied by the grid
    name = "sql"
    data = ["sql.jsonl"]

Every job is a `RunConfig` as in `loratune train`, so its folder can be trained again alone. The whole file is checked
before anything is loaded. Errors give the line and the nearest valid name.
"""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from loratune import other_names
from loratune.config import Precision, RunConfig, check_values, from_dict, read_toml
from loratune.errors import ConfigError

_GIVEN = {"model": "MODEL", "out": "--out", "overwrite": "--overwrite", "resume": "--resume"}
"""Settings of a run that a sweep takes from the command line -> their flags."""
_SHARED = frozenset({"precision", "device", "trust_remote_code"})
"""Settings of the base, which is loaded once."""
_SHORT = {"learning_rate": "rate", "lora_alpha": "alpha", "lora_dropout": "dropout"}
"""Short names of settings in the names of jobs."""
_TABLES = ("grid", "halving", "job")


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): the worse jobs end early.

    A rung compares the held-out losses of all jobs after the same share of their steps, rounded up to an evaluation.
    """

    at: list[float] = field(default_factory=lambda: [0.25, 0.5])
    """Shares of the steps at which jobs are compared."""
    keep: float = 0.5
    """Share of the jobs, rounded up, that continues after each comparison."""

    def __post_init__(self) -> None:
        if not self.at or any(not 0 < share < 1 for share in self.at) or sorted(set(self.at)) != self.at:
            raise ConfigError(f"at is {self.at}; it lists rising shares between 0 and 1")
        if not 0 < self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; it lies in 0 < share < 1")


@dataclass(frozen=True)
class PlannedJob:
    """One run of a sweep."""

    name: str
    config: RunConfig
    varied: Mapping[str, Any] = field(default_factory=dict)
    """Settings in which it differs from the other jobs, for tables."""


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep."""

    jobs: tuple[PlannedJob, ...]
    halving: Halving | None = None


def read_plan(
    file: str,
    *,
    model: str,
    out: str,
    precision: Precision | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SweepPlan:
    """Reads and checks a jobs file.

    Args:
        model: base model of all jobs.
        out: folder of the sweep; each job's own is out/NAME.
        precision, device, trust_remote_code: override the file.

    Raises: ConfigError: with file and line (or the job's name) and, for a misspelt name, the nearest.
    """
    source = _Source(file)
    values = source.values
    shared = _settings(source, {k: v for k, v in values.items() if k not in _TABLES}, "")
    overriding = {"precision": precision, "device": device, "trust_remote_code": trust_remote_code or None}
    given = {"model": model} | {k: v for k, v in overriding.items() if v is not None}
    grid = _grid(source, values.get("grid", {}))
    halving = None
    if "halving" in values:
        if not isinstance(values["halving"], dict):
            raise ConfigError(f"{source.at('', 'halving')}: halving is a section: [halving]")
        halving = from_dict(Halving, values["halving"], source.at("halving"))
    jobs: list[PlannedJob] = []
    for own, varied in itertools.product(_own_settings(source, values.get("job", [{}])), grid):
        name, settings, where = own
        job = _merged(shared, settings, _nested(varied), {"": given})
        name = "-".join([name] * bool(name) + [_label(k, v) for k, v in varied.items()]) or "job"
        config = _build(job, str(Path(out) / name), f'{where} (job "{name}")')
        _check(config, f'{where} (job "{name}")')
        tells = {k: v for section in settings.values() for k, v in section.items()} | varied
        jobs.append(PlannedJob(name, config, tells))
    _check_names(file, jobs)
    if halving and any(not j.config.dataset.eval_data and not j.config.dataset.eval_fraction for j in jobs):
        raise ConfigError(f"{source.at('halving')}: halving compares held-out losses; eval_fraction must not be 0")
    return SweepPlan(tuple(_without_common_settings(jobs)), halving)


class _Source:
    """A TOML file with the line of each setting, which `tomllib` does not report."""

    def __init__(self, file: str) -> None:
        self.file, self.values = file, read_toml(file)
        self._lines: dict[tuple[str, str], int] = {}
        table, jobs = "", 0
        for number, line in enumerate(Path(file).read_text(encoding="utf-8-sig").splitlines(), start=1):
            if header := re.match(r"\s*(\[{1,2})\s*([\w.]+)\s*\]", line):
                table = header[2]
                if header[1] == "[[":
                    jobs += 1
                table = re.sub(r"^job\b", f"job{jobs}", table)
                self._lines.setdefault((table, ""), number)
            elif key := re.match(r"""\s*["']?([\w-]+)["']?\s*[=.]""", line):
                self._lines.setdefault((table, key[1]), number)

    def at(self, table: str, key: str = "") -> str:
        """FILE:LINE of a setting or table, or FILE if it is not found."""
        places = ((table, key), (f"{table}.{key}".lstrip("."), ""), (table, ""))
        line = next((self._lines[place] for place in places if place in self._lines), None)
        return f"{self.file}:{line}" if line else self.file


SectionValues = dict[str, dict[str, Any]]
"""Section of `RunConfig` ("" for its own fields) -> setting -> value."""


def _sections() -> dict[str, type[Any]]:
    hints = typing.get_type_hints(RunConfig)
    return {name: hint for name, hint in hints.items() if is_dataclass(hint)}  # type: ignore[misc]


def _homes() -> dict[str, str]:
    """Name of each setting of a job -> its section."""
    homes = {f.name: "" for f in fields(RunConfig) if f.name not in _GIVEN and f.name not in _sections()}
    for section, kind in _sections().items():
        homes |= {f.name: section for f in fields(kind)}
    return homes


def _settings(source: _Source, values: Mapping[str, Any], table: str) -> SectionValues:
    """Values of one table, flat or in sections. Each is checked alone, so that an error can give its line."""
    found: SectionValues = {}
    for key, value in values.items():
        if key in _sections() and isinstance(value, dict):
            inner = f"{table}.{key}".lstrip(".")
            for name, inner_value in value.items():
                found.setdefault(key, {})[name] = _checked(source, inner, name, inner_value, key)
        else:
            home = _home(source.at(table, key), key)
            found.setdefault(home, {})[key] = _checked(source, table, key, value, home)
    return found


def _home(where: str, key: str) -> str:
    homes = _homes()
    if key in _GIVEN:
        raise ConfigError(f"{where}: {key} is given on the command line, as {_GIVEN[key]}, for the whole sweep")
    if key not in homes:
        hint = other_names.hint(key, [*homes, *_TABLES])
        raise ConfigError(f'{where}: unknown setting "{key}".{hint}')
    return homes[key]


def _checked(source: _Source, table: str, key: str, value: Any, home: str) -> Any:
    where = source.at(table, key)
    if table.startswith("job") and key in _SHARED:
        raise ConfigError(f"{where}: {key} belongs to the base model, which all jobs share; set it above the jobs")
    if home == "":
        check_values(RunConfig, {key: value}, where)
    else:
        from_dict(_sections()[home], {key: value}, where, RunConfig)
    return value


def _grid(source: _Source, table: Any) -> list[dict[str, Any]]:
    """Every combination of a grid's values; one empty combination without a grid."""
    if not isinstance(table, dict):
        raise ConfigError(f"{source.at('', 'grid')}: grid is a section: [grid]")
    for key, values in table.items():
        where = source.at("grid", key)
        home = _home(where, key)
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {key} = {values!r}: a grid lists the values to try, as [a, b, c]")
        if key in _SHARED:
            raise ConfigError(f"{where}: {key} belongs to the base model, which all jobs share; it cannot vary")
        for n, value in enumerate(values):
            _checked(source, "grid", key, value, home)
            if value in values[:n]:
                raise ConfigError(f"{where}: {key} lists {value!r} twice")
    return [dict(zip(table, choice, strict=True)) for choice in itertools.product(*table.values())]


def _own_settings(source: _Source, jobs: Any) -> Iterator[tuple[str, SectionValues, str]]:
    """Name, settings and place of each [[job]]."""
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise ConfigError(f"{source.at('job')}: jobs are a list of tables, each headed [[job]]")
    for n, job in enumerate(jobs, start=1):
        table = f"job{n}"
        name = job.get("name", "" if len(jobs) == 1 else f"job{n}")
        if not isinstance(name, str):
            raise ConfigError(f"{source.at(table, 'name')}: name = {name!r} is not a string")
        own = _settings(source, {k: v for k, v in job.items() if k != "name"}, table)
        yield name, own, source.at(table)


def _nested(flat: Mapping[str, Any]) -> SectionValues:
    homes, nested = _homes(), dict[str, dict[str, Any]]()
    for key, value in flat.items():
        nested.setdefault(homes[key], {})[key] = value
    return nested


def _merged(*layers: SectionValues) -> SectionValues:
    """Merges settings; later layers override earlier ones."""
    merged: SectionValues = {}
    for layer in layers:
        for section, values in layer.items():
            merged[section] = merged.get(section, {}) | values
    return merged


def _build(settings: SectionValues, out: str, where: str) -> RunConfig:
    top = dict(settings.get("", {})) | {"out": out}
    return from_dict(RunConfig, top | {k: v for k, v in settings.items() if k}, where)


def _check(config: RunConfig, where: str) -> None:
    """Raises ConfigError for settings that jobs with a shared base do not support."""
    lora = config.lora
    if lora.bias != "none" or lora.modules_to_save:
        setting = "modules_to_save" if lora.modules_to_save else f'bias = "{lora.bias}"'
        raise ConfigError(f"{where}: {setting}: jobs share one base, so only A and B can train; use loratune train")
    training = config.training
    if training.learning_rate == "auto":
        raise ConfigError(f'{where}: learning_rate "auto" is itself a sweep; list rates under [grid]')
    for name, only in (("optim", "adamw"), ("activations", "auto"), ("memory", None)):
        if getattr(training, name) != only:
            raise ConfigError(f"{where}: {name} is for single runs; jobs of a sweep share their rows")
    alone = [name for name in training.log_to if name != "tensorboard"]
    if alone:
        raise ConfigError(f"{where}: log_to {alone[0]} supports one run per process; a sweep reports to tensorboard")


def _check_names(file: str, jobs: list[PlannedJob]) -> None:
    seen: set[str] = set()
    for job in jobs:
        if not re.fullmatch(r"[\w+=,@-][\w.+=,@-]*", job.name):
            raise ConfigError(f"{file}: a job cannot be called {job.name!r}, because its name becomes a folder")
        if job.name in seen:
            raise ConfigError(f'{file}: two jobs are called "{job.name}"; give each its own name')
        seen.add(job.name)


def _label(key: str, value: Any) -> str:
    """Text of a grid's value in a name: rate0.0003."""
    if isinstance(value, float):
        text = f"{value:g}"
    else:
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return _SHORT.get(key, key) + re.sub(r"[^\w.+=,@-]+", "_", text)


def _without_common_settings(jobs: list[PlannedJob]) -> Iterator[PlannedJob]:
    """Removes settings from `varied` that are the same in all jobs."""
    for job in jobs:
        differs = {k: v for k, v in job.varied.items() if any(other.varied.get(k) != v for other in jobs)}
        yield replace(job, varied=differs)
