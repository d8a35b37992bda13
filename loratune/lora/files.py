"""Adapters on disk, in PEFT's format, both ways: a folder with adapter_config.json and adapter_model.safetensors.

One function, `_slots`, maps the keys of the file to the tensors of an adapter. Saving reads the tensors and loading
fills them. A file must fit the model exactly: a missing, unexpected or misshapen tensor is an error that names it,
and nothing of the file is used. The adapter is built beside the model and joins it last.

Only safetensors are read: unpickling a .bin or .pt file can run any code that its author put there.

Format: PEFT 0.21. Keys start with "base_model.model."; the adapter's name is not part of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from loratune import atomic, foreign, manifest
from loratune.config import LoraConfig
from loratune.errors import AdapterError, OutputError, expect, nearest
from loratune.lora import peft_config, peft_keys, tied
from loratune.lora.build import build
from loratune.lora.inject import Attached, add
from loratune.lora.paths import find_modules
from loratune.lora.peft_config import CONFIG_FILE, AdapterConfig
from loratune.lora.peft_keys import PREFIX
from loratune.lora.portable import portable as portable_form
from loratune.lora.select import Selection, select
from loratune.lora.state import Adapter, require
from loratune.lora.switch import is_plain, switch
from loratune.precision.finite import check_finite

WEIGHTS_FILE = "adapter_model.safetensors"
"""Start of every key in an adapter's file."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_LISTED = 6


@dataclass(frozen=True)
class AdapterInfo:
    """Facts about an adapter's folder that need neither its tensors nor the base model."""

    folder: Path
    config: LoraConfig
    base_model: str | None
    task_type: str | None
    shapes: dict[str, tuple[int, ...]]
    """Tensor key -> shape."""
    dtypes: tuple[str, ...]
    size_bytes: int

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def save(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    *,
    overwrite: bool = False,
    portable: bool = False,
) -> None:
    """Writes adapter `name` of `model` to `directory`, which PEFT, transformers, vLLM and llama.cpp read.

    A new folder appears whole or not at all. In an existing folder other files stay, and the configuration is written
    last: whenever it can be read, the tensors that belong to it are there. The adapter need not be active.

    Args:
        portable: multiply each layer's scaling into its B and pad all layers to one rank, so that readers that ignore
            rank_pattern, alpha_pattern or use_rslora compute the same (`lora.portable`).

    Raises:
        ArgumentError: an argument has the wrong type.
        AdapterError: no such adapter; a tensor holds NaN or infinity; with `portable`, it is not a low-rank sum.
        OutputError: there is an adapter already (and not `overwrite`), no space, or no permission.
    """
    expect(model, nn.Module, "model", "save(model, directory)")
    expect(directory, str | Path, "directory", "save(model, directory)")
    folder = Path(directory)
    config, weights = _content(model, folder, name, portable)
    if folder.is_file():
        raise OutputError(f"{folder}: is a file; an adapter is saved as a folder")
    taken = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if (folder / file).exists()]
    if taken and not overwrite:
        raise OutputError(f"{folder}: holds an adapter already ({taken[0]}); choose another folder or pass overwrite")
    if not folder.exists():
        with atomic.new_directory(folder) as temporary:
            atomic.write_bytes(temporary / WEIGHTS_FILE, weights)
            atomic.write_text(temporary / CONFIG_FILE, config)
        return
    atomic.remove(folder / manifest.FILE)
    _replace(folder / CONFIG_FILE, folder / WEIGHTS_FILE, config, weights)


def _replace(config_path: Path, weights_path: Path, config: str, weights: bytes) -> None:
    """Replaces both files such that the old configuration is never seen with the new tensors."""
    same = config_path.exists() and config_path.read_bytes() == config.encode()
    if config_path.exists() and not same:
        backup = config_path.read_bytes()
        config_path.unlink()
        try:
            atomic.write_bytes(weights_path, weights)
        except OutputError:
            atomic.write_bytes(config_path, backup)
            raise
    else:
        atomic.write_bytes(weights_path, weights)
    if not same:
        atomic.write_text(config_path, config)


def _content(model: nn.Module, folder: Path, name: str, in_portable_form: bool) -> tuple[str, bytes]:
    """The text of the configuration and the bytes of the tensors, for `folder`."""
    adapter = require(model).get(name)
    if in_portable_form:
        adapter = portable_form(name, adapter)
    tensors = peft_keys.in_files(model, _copies(adapter))
    check_finite(tensors, str(folder), AdapterError)
    return peft_config.to_json(model, adapter), to_bytes(tensors, metadata={"format": "pt"})


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Copies on the CPU of all tensors of an adapter, by their keys in the file. Raises AdapterError."""
    return _copies(require(model).get(name))


def _copies(adapter: Adapter) -> dict[str, Tensor]:
    return {key: slot.detach().to("cpu", copy=True).contiguous() for key, slot in _slots(adapter).items()}


def load_adapter(model: nn.Module, directory: str | Path, name: str = "default", *, active: bool = True) -> Attached:
    """Adds the adapter in `directory` to `model` under `name` and makes it the active one.

    Args:
        directory: a folder in PEFT's format, or one that holds `name/` in that format.
        name: need not be the name it was trained under, which files do not record.
        active: False leaves the adapters in use as they are.

    Raises: AdapterError: the folder is not a LoRA adapter, uses a feature not implemented here, is damaged, or was
        made for another model; the name is taken. ArgumentError: an argument has the wrong type. The model is then
        unchanged.
    """
    expect(model, nn.Module, "model", "load_adapter(model, directory)")
    expect(directory, str | Path, "directory", "load_adapter(model, directory)")
    folder = find_folder(directory, name)
    read = peft_config.read(folder)
    tensors = read_tensors(folder)
    return add(model, name, lambda: _fitted(model, folder, read, tensors), active=active)


def attach_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    name: str = "default",
    *,
    active: bool = True,
) -> Attached:
    """Adds an adapter whose tensors are in memory, for example those of `adapter_tensors` or of another process.

    Args:
        tensors: key as in PEFT's files ("base_model.model...lora_A.weight") -> tensor; copied.
        config: with which the tensors were made.
        active: False leaves the adapters in use as they are.

    Raises: AdapterError: a tensor is missing, unexpected or misshapen; the name is taken. ArgumentError: an argument
        has the wrong type. The model is then unchanged.
    """
    call = "attach_tensors(model, tensors, config)"
    expect(model, nn.Module, "model", call)
    expect(tensors, Mapping, "tensors", call)
    expect(config, LoraConfig, "config", call, "Write LoraConfig(r=16, ...)")
    read = AdapterConfig(config, None, None, None)
    return add(model, name, lambda: _fitted(model, Path("tensors"), read, tensors), active=active)


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor], name: str = "default") -> None:
    """Copies tensors into adapter `name`, which need not be active; the reverse of `adapter_tensors`.

    Raises: AdapterError: no such adapter; a tensor is missing, unexpected or misshapen; the adapter is merged or in a
        store. Nothing is then copied.
    """
    state = require(model)
    state.require_unmerged("set tensors")
    expect(tensors, Mapping, "tensors", "set_adapter_tensors(model, tensors, name)")
    adapter = state.get(name)
    if adapter.stored:
        raise AdapterError(f'adapter "{name}" is in a store, which holds rounded copies; detach it and load it again')
    slots, place = _slots(adapter), Path("tensors")
    _check_keys(place, slots, tensors)
    _check_shapes(place, slots, tensors)
    with torch.no_grad():
        for key, slot in slots.items():
            slot.copy_(tensors[key])
    if not is_plain(state.active):
        switch(model, state, dict(state.active))  # a sum holds copies


def read_adapter(
    model: nn.Module, directory: str | Path, name: str, device: torch.device | None = None
) -> tuple[Selection, Adapter]:
    """The adapter in `directory`, fitted to `model` and filled, with its layers' tensors on `device`.

    Changes nothing. The bare base, or an adapter without modules and biases of its own, must be in use.
    Raises: AdapterError: as `load_adapter`.
    """
    folder = find_folder(directory, name)
    return _fitted(model, folder, peft_config.read(folder), read_tensors(folder), device)


def read_config(directory: str | Path) -> LoraConfig:
    """The configuration of a saved adapter. Raises AdapterError."""
    return peft_config.read(find_folder(directory)).lora


def read_info(directory: str | Path) -> AdapterInfo:
    """Facts about an adapter's folder, for display; reads no tensor. Raises AdapterError."""
    folder = find_folder(directory)
    read = peft_config.read(folder)
    path = _weights_path(folder)
    shapes, dtypes = {}, set()
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                part = file.get_slice(key)
                shapes[key] = tuple(part.get_shape())
                dtypes.add(str(part.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise AdapterError(_damaged(path, error)) from error
    size = path.stat().st_size
    return AdapterInfo(folder, read.lora, read.base_model, read.task_type, shapes, tuple(sorted(dtypes)), size)


def find_folder(directory: str | Path, name: str | None = None) -> Path:
    """The folder that holds adapter_config.json: `directory`, or `directory/name`, where PEFT puts named adapters.

    Raises: AdapterError: there is none; the message names the files found instead.
    """
    folder = Path(directory)
    foreign.check_name(str(folder), AdapterError)
    if folder.is_file():
        if folder.suffix in _PICKLES:
            raise AdapterError(_pickled(folder))
        raise AdapterError(f"{folder}: is a file; name the folder that holds {CONFIG_FILE}")
    if not folder.is_dir():
        near = nearest(folder.name, [path.name for path in folder.parent.glob("*/")])
        raise AdapterError(f"{folder}: there is no such folder.{near}")
    if (folder / CONFIG_FILE).is_file():
        return folder
    inner = [path.name for path in _listing(folder) if (path / CONFIG_FILE).is_file()]
    if name in inner:
        return folder / str(name)
    if inner:
        raise AdapterError(
            f"{folder}: holds the adapters {', '.join(inner)}; name one, for example {folder / inner[0]}"
        )
    for suspect in _listing(folder):
        if suspect.suffix in _PICKLES:
            raise AdapterError(_pickled(suspect))
    raise AdapterError(f"{folder}: has no {CONFIG_FILE}, so it is not an adapter")


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read: {error.strerror or error}") from error


def _pickled(path: Path) -> str:
    return f"{path}: is a pickle, which can run any code when read; only safetensors are read: convert it with PEFT"


def _damaged(path: Path, error: Exception) -> str:
    return f"{path}: is damaged or not a safetensors file ({error})"


def _weights_path(folder: Path) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    for suspect in _listing(folder):
        if suspect.suffix in _PICKLES:
            raise AdapterError(_pickled(suspect))
    raise AdapterError(f"{folder}: has no {WEIGHTS_FILE}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in the adapter's `folder`, by key.

    Raises: AdapterError: missing, damaged, pickled, or not the ones that the folder's manifest lists.
    """
    path = _weights_path(folder)
    _check_manifest(folder)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(_damaged(path, error)) from error
    return tensors


def _check_manifest(folder: Path) -> None:
    """Raises AdapterError if a file of the adapter is not as its run has written it."""
    try:
        found = manifest.read(folder)
    except ValueError:
        raise AdapterError(f"{folder / manifest.FILE}: is damaged; restore it, or delete it") from None
    fault = found.fault_in(folder, sorted({CONFIG_FILE, WEIGHTS_FILE, *found.files})) if found else None
    if fault is not None:
        raise AdapterError(
            f"{folder}: {fault} since the run was saved; restore it from a copy. If you changed it on purpose, "
            f"delete {manifest.FILE}"
        )


def _slots(adapter: Adapter) -> dict[str, Tensor]:
    """Key in the file -> the adapter's own tensor. Several keys may have one tensor where weights are tied."""
    slots: dict[str, Tensor] = {}
    for path, weights in adapter.layers.items():
        slots |= {PREFIX + key: tensor for key, tensor in weights.in_files(path).items()}
    for path, bias in adapter.biases.items():
        owner = path.removesuffix("bias").rstrip(".")
        slots[PREFIX + (f"{owner}.base_layer.bias" if owner in adapter.layers else path)] = bias
    for path, module in adapter.modules.items():
        slots |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    return slots


def _fitted(
    model: nn.Module,
    folder: Path,
    read: AdapterConfig,
    tensors: Mapping[str, Tensor],
    device: torch.device | None = None,
) -> tuple[Selection, Adapter]:
    """The adapter of the file, built for `model` and filled; changes nothing."""
    tensors = peft_keys.read_back(model, tensors)
    entries = read.lora.modules_to_save
    config = replace(read.lora, modules_to_save=_saved_paths(model, entries, tensors) if entries else None)
    selection = select(model, config, strict=False)
    needed, held = sum(t.parameters for t in selection.targets), sum(t.numel() for t in tensors.values())
    if needed > 4 * held + (1 << 20):  # before they are allocated; smaller differences are named below
        raise AdapterError(
            f"{folder}: was made for another model or rank: with r = {config.r} these layers need {needed:,} values, "
            f"but the file has {held:,}"
        )
    adapter = build(model, config, selection, seed=None, device=device)
    slots = _slots(adapter)
    given = _given(model, folder, slots, tensors)
    _check_keys(folder, slots, given)
    _check_shapes(folder, slots, given)
    if tied.separate_if_different(adapter, slots, given):
        slots = _slots(adapter)
    filled: dict[int, str] = {}
    with torch.no_grad():
        for key, slot in slots.items():
            twin = filled.setdefault(id(slot), key)
            if twin != key and not torch.equal(given[key], given[twin]):
                raise AdapterError(f"{folder}: {key} and {twin} differ, but are tied to each other in this model")
            slot.copy_(given[key])
    return selection, adapter


def _saved_paths(model: nn.Module, entries: Iterable[str], keys: Iterable[str]) -> list[str] | None:
    """The modules that PEFT saved in full: their path ends in an entry, and the file has a tensor of them.

    PEFT matches any ending ("norm" takes `input_layernorm`) and always adds the names of classification heads. So
    the file decides, and not the configuration.
    """
    owners = {suffix for key in keys for suffix in _parents(key.removeprefix(PREFIX))}
    paths = [entry.paths[0] for entry in find_modules(model)]
    found = [path for path in paths if path in owners and any(path.endswith(entry) for entry in entries)]
    also = {path for own in found for path in tied.partners(model, own)}  # PEFT's ensure_weight_tying saves them too
    return [path for path in paths if path in found or (path in owners and path in also)] or None


def _parents(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def _given(
    model: nn.Module, folder: Path, slots: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The file's tensors by key, without tensors of the base, which PEFT also saves for embeddings and biases.

    Raises: AdapterError: a tensor of the base differs from the model's: the adapter was made for another base.
    """
    given = {key: tensor for key, tensor in tensors.items() if key in slots}
    base = model.state_dict() if len(given) < len(tensors) else {}
    for key in [key for key in tensors if key not in slots]:
        plain = key.removeprefix(PREFIX)
        for wrapper in (".base_layer.", ".original_module.", ".modules_to_save."):
            plain = plain.replace(wrapper, ".")
        if PREFIX + plain in slots and ".original_module." not in key:
            given.setdefault(PREFIX + plain, tensors[key])
        elif plain not in base:
            given[key] = tensors[key]
        elif not _same(base[plain], tensors[key]):
            raise AdapterError(f"{folder}: was made for another base model: {plain} differs from this model's")
    return given


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """True if the tensors are equal once both are rounded to the narrower of their dtypes."""
    if ours.shape != theirs.shape:
        return False
    ours = ours.cpu()
    if {ours.dtype, theirs.dtype} == {torch.float16, torch.bfloat16}:  # each lacks digits or range of the other
        return torch.allclose(ours.float(), theirs.float(), rtol=2.0**-7, atol=2.0**-14)
    return torch.equal(ours, theirs.to(ours.dtype)) or torch.equal(ours.to(theirs.dtype), theirs)


def _check_keys(folder: Path, slots: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing = [key for key in slots if key not in given]
    unexpected = [key for key in given if key not in slots]
    if not missing and not unexpected:
        return
    lines = [f"{folder}: does not fit this model"]
    if unexpected:
        near = nearest(unexpected[0], missing or slots, limit=1)
        lines.append(f"unexpected {_listed(unexpected)}.{near}")
    if missing:
        lines.append(f"missing {_listed(missing)}")
    raise AdapterError("; ".join(lines))


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(key.removeprefix(PREFIX) for key in keys[:_MAX_LISTED]) + more


def _check_shapes(folder: Path, slots: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    wrong = [key for key, slot in slots.items() if slot.shape != given[key].shape]
    if wrong:
        key = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise AdapterError(
            f"{folder}: was made for another model or rank: {key.removeprefix(PREFIX)} is "
            f"{tuple(given[key].shape)} in the file, {tuple(slots[key].shape)} expected here{more}"
        )
