"""Opens folders of trained adapters as a model that answers: base, tokenizer, adapters, stop tokens.

A folder written by `loratune train` records its base and its chat template in `run.toml`. A plain PEFT folder names
its base in `adapter_config.json`. Several folders share one base, which is loaded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    """Settings of the run that made the first adapter; None if another program made it."""
    forms: Mapping[str | None, tuple[PromptForm, ...]] = field(default_factory=dict)
    """Adapter name, or None for a base alone -> forms of its training data; empty if unknown."""


def open_folders(
    folders: Sequence[str],
    *,
    model: str | None = None,
    precision: Precision = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Loads the base that the adapters in `folders` were made for, and the adapters.

    Args:
        folders: folders of adapters over one base, or a single base model.
        model: base model to use instead of the recorded one.
        trust_remote_code: as in `load`. The setting in a run.toml does not count, since the folder may be anyone's.
        precision: precision of the base; "auto" is the precision of the first adapter's run if that was quantised.

    Raises: AdapterError: a folder holds no adapter, or the adapters belong to different bases. ModelError: the base
        is not found.
    """
    if len(folders) == 1 and not _is_adapter(folders[0]):
        return _open_base(folders[0], precision, device, trust_remote_code)
    runs = {folder: read_run(folder) for folder in folders}
    bases = {folder: model or _base_of(folder, runs[folder]) for folder in folders}
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
    loaded = load(base, precision, device, trust_remote_code=trust_remote_code)
    template = run.dataset.chat_template if run else None
    tokenizer = load_tokenizer(base, template, trust_remote_code=trust_remote_code)
    _load_all(loaded, names)
    activate(loaded, next(iter(names)))
    folders_of = {name: Path(folder) for name, folder in names.items()}
    forms: dict[str | None, tuple[PromptForm, ...]] = {n: prompting.read(folder) for n, folder in names.items()}
    return Opened(loaded, tokenizer, base, folders_of, stop_ids(loaded, tokenizer), run, forms)


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
    return from_dict(RunConfig, read_toml(str(file)), str(file)) if file.exists() else None


def _open_base(name: str, precision: Precision, device: str | None, trust_remote_code: bool) -> Opened:
    loaded = load(name, precision, device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return Opened(loaded, tokenizer, name, {}, stop_ids(loaded, tokenizer), None, {None: prompting.read(name)})


def _is_adapter(folder: str) -> bool:
    """True for an adapter's folder, and for a folder without any configuration, whose error message is better
    then."""
    path = Path(folder)
    return path.is_dir() and not (path / "config.json").exists()


def _base_of(folder: str, run: RunConfig | None) -> str:
    """The base model that run.toml names; the base in adapter_config.json if that model no longer exists."""
    recorded = read_info(folder).base_model
    candidates = [c for c in (run.model if run else None, recorded) if c]
    for candidate in candidates:
        try:
            resolve(candidate)
        except ModelError:
            continue
        return candidate
    named = " or ".join(candidates) or "not recorded"
    raise AdapterError(f"{folder}: its base model ({named}) is not here; give its folder with --model")


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
