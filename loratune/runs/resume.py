"""Checks whether a run can be resumed, before any expensive work.

A resumed run equals the uninterrupted run to the bit. So every setting that decides the result must be unchanged: the
model, the adapter's shape, the optimisation, and the rendered data. Data are compared by content, so files may move.
Settings of place and speed may change: device, processes, cache, trackers, saving interval.

Three settings may rise to train longer: epochs, max_steps and early_stopping_patience. The schedule is then stretched
over the new number of steps, so the run differs from one that had this number from the start. A note says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from loratune import atomic, foreign
from loratune.base import identity
from loratune.base.identity import RunIdentity
from loratune.config import RunConfig, from_dict, read_toml
from loratune.data.examples import Example
from loratune.data.feed import Dataset
from loratune.errors import ConfigError, LoratuneError, OutputError
from loratune.training import checkpoint

T = TypeVar("T")
_FREE = frozenset(
    {
        "out",
        "device",
        "overwrite",
        "resume",
        "dataset.num_proc",
        "dataset.cache_dir",
        "training.activations",
        "training.memory",
        "training.save_every_steps",
        "training.log_to",
    }
)
_BY_CONTENT = frozenset({"data", "dataset.eval_data", "dataset.chat_template"})
_MAY_RISE = frozenset({"training.epochs", "training.max_steps", "training.early_stopping_patience"})


@dataclass(frozen=True)
class ResumedRun:
    """A run that can be continued."""

    config: RunConfig
    """The settings, with names of files that are valid in this directory."""
    checkpoint: Path
    """The newest intact one."""
    identity: RunIdentity
    notes: list[str]
    """On settings that have risen, and on damaged checkpoints."""


def find_run(config: RunConfig) -> ResumedRun:
    """The run in `config.out`, its newest intact checkpoint, and notes.

    Raises:
        OutputError: there is no run, or no intact checkpoint.
        ConfigError: a setting that decides the result, or the base model, has changed.
    """
    out = Path(config.out)
    if checkpoint.newest(out / "checkpoints") is None:
        raise OutputError(f"{out}: there is no checkpoint to resume from; start again with --overwrite")
    file = out / "run.toml"
    before = from_dict(RunConfig, read_toml(str(file)), str(file))
    known = identity_of(out, before.model)
    newest, notes = checkpoint.newest_intact(out / "checkpoints", known.run)
    if newest is None:
        raise OutputError(f"no checkpoint is intact, first {notes[0]}; start again with --overwrite")
    step = checkpoint.read_progress(newest).step
    notes = [f"{fault}; the run continues from step {step}" for fault in notes]
    progress = checkpoint.read_progress(newest)
    lost = checkpoint.lost_best(newest, progress, known.run)
    if lost is not None:
        notes.append(
            f"{lost}; this best adapter (held-out loss {progress.best_eval_loss:.4f}) is lost, and the best of "
            "the remaining steps is kept"
        )
    if not known.run and known.base.weights is None:
        notes.append(
            f"{out}: began without {identity.IDENTITY_FILE}, so nobody can tell whether its base has changed"
        )
    notes += _compare(before, config)
    return ResumedRun(_located(before, config, known), newest, known, notes)


def check_base(out: Path, known: RunIdentity, now: identity.BaseIdentity) -> None:
    """Raises ConfigError if the run in `out` began with another base than `now`."""
    why = identity.difference(known.base, now)
    if why is not None:
        raise ConfigError(f"{out}: {why}, so the run cannot be resumed; restore it, or start again with --overwrite")


def check_unfinished(out: Path, step: int, *, finished: bool) -> None:
    """Raises ConfigError if the run in `out` is complete."""
    if finished and (out / "README.md").exists():
        raise ConfigError(
            f"{out}: this run is complete ({step} steps); raise --epochs, --max-steps or, if it stopped early, "
            "--early-stopping-patience to go on"
        )


def identity_of(out: Path, model: str) -> RunIdentity:
    """The identity of the run in `out`, which began with the base `model`.

    A run from before there were identities has an empty id, and no fingerprint of its base.

    Raises: OutputError: the identity is damaged, or it is missing and its checkpoints are newer than that.
    """
    try:
        known = identity.read(out)
    except LoratuneError as error:
        raise OutputError(f"{out}: cannot be resumed: {error}") from error
    if known is None and checkpoint.adopt(out / "checkpoints"):
        return RunIdentity("", identity.BaseIdentity(model, None, None, None), None)
    if known is None:
        raise OutputError(
            f"{out}: has no {identity.IDENTITY_FILE}, so its base and checkpoints cannot be verified; start again "
            "with --overwrite"
        )
    return known


def _located(before: RunConfig, now: RunConfig, known: RunIdentity) -> RunConfig:
    """`now`, where names that are unchanged since the run began mean the same files in any directory."""
    found = identity.located(before, known, Path(now.out))
    settings = replace(
        now.dataset,
        eval_data=_moved(before.dataset.eval_data, now.dataset.eval_data, found.dataset.eval_data),
        chat_template=_moved(before.dataset.chat_template, now.dataset.chat_template, found.dataset.chat_template),
    )
    return replace(
        now,
        model=_moved(before.model, now.model, found.model),
        data=_moved(before.data, now.data, found.data),
        dataset=settings,
    )


def _moved(before: T, now: T, found: T) -> T:
    return found if now == before else now


def record_data(out: Path, dataset: Dataset) -> None:
    """Stores the hashes of the data, for `check_data`."""
    content = {"files": dataset.file_hashes, "examples": _hash(dataset)}
    atomic.write_text(_data_file(out), atomic.to_json(content))


def check_data(out: Path, dataset: Dataset) -> None:
    """Raises ConfigError if the run in `out` trained on other data; the message names the change."""
    try:
        before = json.loads(foreign.regular(_data_file(out)).read_bytes())
        files, examples = list(before["files"].values()), before["examples"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        why = (
            f"{_data_file(out)}: cannot be read, so the run cannot be resumed ({error}); start again with --overwrite"
        )
        raise OutputError(why) from error
    if examples == _hash(dataset):
        return
    known = files + [None] * len(dataset.file_hashes)
    changed = [path for (path, now), then in zip(dataset.file_hashes.items(), known, strict=False) if now != then]
    cause = changed[0] if changed else "the tokenizer or chat template"
    raise ConfigError(
        f"{out}: {cause} has changed since the run began, so it cannot be resumed; start again with --overwrite"
    )


def _data_file(out: Path) -> Path:
    return out / "checkpoints" / "data.json"


def _compare(before: RunConfig, now: RunConfig) -> list[str]:
    notes = []
    old, new = dict(_flat(before)), dict(_flat(now))
    for name in [name for name in new if name not in _FREE | _BY_CONTENT and old[name] != new[name]]:
        if name == "model" and Path(old[name]).resolve() == Path(new[name]).resolve():
            continue  # the fingerprint of its files is compared as well
        both = f"{now.out}: {name} is {old[name]!r} in this run and {new[name]!r} now"
        if name not in _MAY_RISE:
            raise ConfigError(f"{both}; restore it to resume, or start again with --overwrite")
        if not _rises(name, old[name], new[name]):
            raise ConfigError(f"{both}; to resume, it can only rise")
        notes.append(f"{name} rises from {old[name]} to {new[name]}: the schedule stretches over the new steps")
    return notes


def _rises(name: str, old: int | None, new: int | None) -> bool:
    """True if a limit rises. None means no limit; a limit in epochs may become one in steps."""
    if new is None:
        return True
    return name == "training.max_steps" if old is None else new > old


def _flat(config: Any, prefix: str = "") -> Sequence[tuple[str, Any]]:
    """Every setting by its dotted name."""
    pairs: list[tuple[str, Any]] = []
    for setting in fields(config):
        value = getattr(config, setting.name)
        name = prefix + setting.name
        pairs += _flat(value, name + ".") if is_dataclass(value) else [(name, value)]
    return pairs


def _hash(dataset: Dataset) -> str:
    """SHA-256 (hex) of all tokens and weights, training and held-out."""
    digest = hashlib.sha256()
    parts: tuple[list[Example], list[Example]] = (dataset.train, dataset.eval)
    for examples in parts:
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example).to_bytes(8, "little"))
            digest.update(example.token_ids.tobytes())
            digest.update(example.weights.tobytes())
    return digest.hexdigest()
