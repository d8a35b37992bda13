"""Opens folders of trained adapters as a model that answers: base, tokenizer, adapters, stop tokens.

A folder written by `loratune train` contains its chat template, and the absolute path and fingerprints of its base
(`base.identity`). So it means the same base in every directory, or raises an error. A plain PEFT folder has only a
name, in `adapter_config.json`. Several folders share one base, which is loaded once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loratune.base import identity
from loratune.base.identity import BaseIdentity, RunIdentity
from loratune.base.load import load, load_tokenizer, resolve, stop_ids
from loratune.config import Precision, RunConfig, from_dict, read_toml
from loratune.data import prompting
from loratune.data.prompting import PromptForm
from loratune.errors import AdapterError, ModelError
from loratune.lora.files import load_adapter, read_config, read_info
from loratune.lora.inject import activate
from loratune.lora.store import Store
from loratune.tables import PRECISIONS

RESIDENT = 8
"""Adapters that are on the device at a time; if there are more, a `Store` holds them in host memory."""


@dataclass(frozen=True)
class Opened:
    """A base model in memory with the adapters of some folders; the first of them is active."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    """The user's name for the base model."""
    adapters: dict[str, Path]
    """Adapter name -> its folder; empty for a bare base model."""
    stop_ids: frozenset[int]
    run: RunConfig | None
    """Settings of the run that made the first adapter, with names of files that are valid in this directory.
    None if another program made it."""
    forms: Mapping[str | None, tuple[PromptForm, ...]] = field(default_factory=dict)
    """Adapter name, or None for a base alone -> forms of its training data; empty if unknown."""
    notes: tuple[str, ...] = ()
    """Remarks for the user about the choice of the base."""


def open_folders(
    folders: Sequence[str],
    *,
    model: str | None = None,
    precision: Precision = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Opened:
    """Loads the base that the adapters in `folders` were made for, and the adapters.

    Args:
        folders: folders of adapters over one base, or a single base model.
        model: base model to use instead of the recorded one.
        trust_remote_code: as in `load`. The setting in a run.toml does not count, since the folder may be anyone's.
        precision: precision of the base; "auto" is the precision of the first adapter's run if that was quantised.
        chat_template: file with a template to use instead of the stored one.

    Raises: AdapterError: a folder holds no adapter, the adapters belong to different bases, or a base or template has
        changed since the training. ModelError: the base is not found.
    """
    if len(folders) == 1 and not _is_adapter(folders[0]):
        return _open_base(folders[0], precision, device, chat_template, trust_remote_code)
    runs = {folder: read_run(folder) for folder in folders}
    known = {folder: identity.read(Path(folder)) for folder in folders}
    seen: dict[str, BaseIdentity] = {}
    bases = {folder: model or _base_of(folder, runs[folder], known[folder], seen) for folder in folders}
    base = bases[folders[0]]
    for folder, other in bases.items():
        if resolve(other) != resolve(base):
            raise AdapterError(
                f"{folder} belongs to {other}, but {folders[0]} to {base}; adapters that are loaded together share "
                "one base. --model NAME sets one base for all"
            )
    names = _names(folders)
    run = runs[folders[0]]
    if precision == "auto" and run is not None and run.precision in PRECISIONS:
        precision = run.precision
    template = chat_template or _template_of(folders, runs, known)
    tokenizer = load_tokenizer(base, template, trust_remote_code=trust_remote_code)
    loaded = load(base, precision, device, trust_remote_code=trust_remote_code)
    notes = _check_loaded(known, base, chosen=model is not None)
    _load_all(loaded, names)
    activate(loaded, next(iter(names)))
    if run is not None:
        run = identity.located(run, known[folders[0]], Path(folders[0]))
    places = {name: Path(folder) for name, folder in names.items()}
    forms: dict[str | None, tuple[PromptForm, ...]] = {n: prompting.read(folder) for n, folder in names.items()}
    return Opened(loaded, tokenizer, base, places, stop_ids(loaded, tokenizer), run, forms, tuple(notes))


def _check_loaded(known: Mapping[str, RunIdentity | None], base: str, *, chosen: bool) -> list[str]:
    """Compares the loaded base with the bases of the trainings. Returns notes on a base that the user has chosen.

    Raises: AdapterError: a base that the user has not chosen differs.
    """
    now, notes = identity.describe(base), list[str]()
    for folder, of_run in known.items():
        why = identity.difference(of_run.base, now) if of_run else None
        if why is not None and not chosen:
            raise AdapterError(f"{folder}: {why}; name a base with --model to use it all the same")
        if why is not None:
            notes.append(f"{folder}: {why}; used because of --model")
        if of_run is None and not chosen and now.path is not None and not Path(base).expanduser().is_absolute():
            notes.append(f"{folder}: records no fingerprint of its base; its relative name means {now.path} here")
    return notes


def _template_of(
    folders: Sequence[str], runs: Mapping[str, RunConfig | None], known: Mapping[str, RunIdentity | None]
) -> str | None:
    """The file of the chat template that all adapters were trained with; None for the tokenizer's own.

    Raises: AdapterError: the adapters have different templates, or a template is not stored and its name is relative.
    """
    hashes = {of_run.chat_template for of_run in known.values() if of_run is not None}
    if len(hashes) > 1:
        raise AdapterError(
            f"{', '.join(folders)}: were trained with different chat templates; name one for all with --chat-template"
        )
    first, run = folders[0], runs[folders[0]]
    stored = next((folder for folder in folders if known[folder] is not None), None)
    if stored is not None:
        return identity.template_file(Path(stored), known[stored])
    named = run.dataset.chat_template if run else None
    if named is not None and not (Path(named).is_absolute() and Path(named).is_file()):
        raise AdapterError(f"{first}: its chat template ({named}) is not stored; name the file with --chat-template")
    return named


def _load_all(model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Loads adapters: a few beside the model, many into host memory, from which a store copies those in use."""
    stored = _storable(names) if len(names) > RESIDENT else []
    if stored:
        store = Store(model, RESIDENT)
        for name in stored:
            store.load(names[name], name)
    for name, folder in names.items():
        if name not in stored:
            load_adapter(model, folder, name=name)


def _storable(names: Mapping[str, str]) -> list[str]:
    configs = {name: read_config(folder) for name, folder in names.items()}
    return [name for name, config in configs.items() if not config.modules_to_save and config.bias == "none"]


def read_run(folder: str | Path) -> RunConfig | None:
    """The settings in the folder's run.toml, or None if it has none (an adapter made elsewhere)."""
    file = Path(folder) / "run.toml"
    return from_dict(RunConfig, read_toml(str(file)), str(file)) if os.path.lexists(file) else None


def _open_base(
    name: str, precision: Precision, device: str | None, chat_template: str | None, trust_remote_code: bool
) -> Opened:
    tokenizer = load_tokenizer(name, chat_template, trust_remote_code=trust_remote_code)
    loaded = load(name, precision, device, trust_remote_code=trust_remote_code)
    return Opened(loaded, tokenizer, name, {}, stop_ids(loaded, tokenizer), None, {None: prompting.read(name)})


def _is_adapter(folder: str) -> bool:
    """True for an adapter's folder, and for a folder without any configuration, whose error message is better
    then."""
    path = Path(folder)
    return path.is_dir() and not (path / "config.json").exists()


def _base_of(folder: str, run: RunConfig | None, known: RunIdentity | None, seen: dict[str, BaseIdentity]) -> str:
    """The base model of an adapter: the recorded one, or one with the same fingerprint under a recorded name.

    Args:
        seen: bases that were described already.

    Raises: AdapterError: there is none, or a base of this name is another model.
    """
    candidates = [] if known is None else [identity.base_name(known.base), known.base.model]
    candidates += [name for name in (run.model if run else None, read_info(folder).base_model) if name]
    differences, faults = [], []
    for candidate in dict.fromkeys(candidates):
        try:
            resolve(candidate)
        except ModelError as error:
            if Path(candidate).expanduser().is_dir():
                faults.append(str(error))
            continue
        if known is None:
            return candidate
        if candidate not in seen:
            seen[candidate] = identity.describe(candidate)
        why = identity.difference(known.base, seen[candidate])
        if why is None:
            return candidate
        differences.append(why)
    if differences:
        raise AdapterError(f"{folder}: {differences[0]}; name a base with --model to use it all the same")
    if faults:
        raise AdapterError(f"{folder}: its base model cannot be used: {faults[0]}; or name another with --model")
    raise AdapterError(f"{folder}: its base model ({_any_of(candidates)}) is not here; give its folder with --model")


def _any_of(names: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(names)) or "not recorded"


def _names(folders: Sequence[str]) -> dict[str, str]:
    """Name -> folder: the folder's own name, or parent-name where two folders have the same name."""
    names: dict[str, str] = {}
    for folder in folders:
        path = Path(folder).resolve()
        name = path.name if path.name not in names else f"{path.parent.name}-{path.name}"
        if name in names or path in [Path(other).resolve() for other in names.values()]:
            raise AdapterError(f"{folder} is given twice")
        names[name] = folder
    return names
