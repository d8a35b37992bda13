"""An adapter without its model: the low-rank update of each layer, read from a folder and written to one.

Combining, resizing and inspecting adapters is arithmetic on A and B. It does not need the base model, which is a
thousand times larger. So these functions work on files: a folder in PEFT's format becomes a mapping of layer paths to
updates, with the scaling of each layer resolved from r, lora_alpha, the patterns and rsLoRA.

The written adapter is as plain as the format allows: one rank for all layers (padded with zeros where a layer needs
less), lora_alpha equal to r, no patterns, no rsLoRA. alpha / r is then 1 for every reader, also for vLLM, which
leaves the patterns out of the scaling, and for llama.cpp, which knows neither them nor rsLoRA.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from loratune import atomic, foreign
from loratune.adapters.lowrank import padded
from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError, OutputError
from loratune.lora import peft_config
from loratune.lora.expressions import fits_end
from loratune.lora.files import WEIGHTS_FILE, find_folder, read_tensors
from loratune.lora.layers import KEY_PAIRS, LoraEmbedding
from loratune.lora.peft_config import CONFIG_FILE
from loratune.lora.peft_keys import PREFIX
from loratune.lora.variants import variant_of
from loratune.precision.finite import check_finite, fault_of

REPORT_FILE = "provenance.json"
"""Beside an adapter that was computed from others: its sources, the method, and the error."""

_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, slots=True)
class Update:
    """One layer's update, scaling · B A."""

    lora_A: Tensor
    """(r, d_in), float32; of an embedding (r, vocabulary)."""
    lora_B: Tensor
    """(d_out, r), float32; of an embedding (d, r)."""
    scaling: float = 1.0
    keys: tuple[str, str] = KEY_PAIRS[0]
    """Names of A and B in files, after the layer's path and a dot; see `LoraLayer.keys`."""
    transposed: bool = False
    """True if the layer stores its weight as (d_in, d_out): embeddings, transformers' Conv1D."""
    kernel: tuple[int, ...] = ()
    """Kernel size of a convolution: A is (r, channels · kernel size) here and (r, channels, *kernel) in files."""

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)"""
        return self.lora_B.shape[0], self.lora_A.shape[1]


@dataclass(frozen=True, slots=True)
class AdapterUpdates:
    """The content of an adapter's folder."""

    folder: Path
    config: LoraConfig
    fields: dict[str, Any]
    """adapter_config.json, unchanged."""
    layers: dict[str, Update]
    """Path of a layer -> its update, in the order of the model's layers (layers.2 before layers.10)."""
    others: dict[str, Tensor]
    """Key -> tensor trained in full: modules_to_save and biases."""


def read_updates(directory: str | Path) -> AdapterUpdates:
    """Reads an adapter's folder, ours or PEFT's.

    Raises: AdapterError: it is not a LoRA adapter, uses a feature not implemented here, is not a low-rank sum, is
        damaged, or holds values that are not finite.
    """
    folder = find_folder(directory)
    config = peft_config.read(folder).lora
    variant = variant_of(config)
    if not variant.low_rank_sum:
        raise AdapterError(
            f"{folder}: uses {type(variant).__name__}; only plain low-rank updates can be combined or resized"
        )
    if config.target_parameters:
        raise AdapterError(
            f"{folder}: adapts experts (target_parameters), and only updates of layers can be combined or resized; "
            "merge the adapter, or train it again without target_parameters"
        )
    fields = foreign.read_json(folder / CONFIG_FILE, AdapterError)
    tensors = read_tensors(folder)
    _check_finite(folder, tensors)
    layers: dict[str, Update] = {}
    for key in sorted(tensors, key=_natural):
        keys = pair_of(key)
        if keys is None:
            continue
        path = key.removeprefix(PREFIX).removesuffix(f".{keys[0]}")
        partner = key.removesuffix(keys[0]) + keys[1]
        if partner not in tensors:
            raise AdapterError(f"{folder}: has {key} without {partner}")
        scaling = _scaling(config, path, tensors[key].shape[0])
        transposed = keys == LoraEmbedding.keys or bool(fields.get("fan_in_fan_out"))
        _check_factors(folder, path, tensors[key], tensors[partner])
        lora_A, lora_B = (tensors[name].float().flatten(1) for name in (key, partner))
        layers[path] = Update(lora_A, lora_B, scaling, keys, transposed, tuple(tensors[key].shape[2:]))
    if not layers:
        raise AdapterError(f"{folder}: {WEIGHTS_FILE} holds no lora_A and lora_B")
    return AdapterUpdates(folder, config, fields, layers, _others(tensors, config))


def pair_of(key: str) -> tuple[str, str] | None:
    """Names of A and B after a layer's path, if `key` belongs to an A; else None."""
    return next((keys for keys in KEY_PAIRS if key.endswith(f".{keys[0]}")), None)


def _scaling(config: LoraConfig, path: str, r: int) -> float:
    patterns = config.alpha_pattern.items()
    alpha = next((a for key, a in patterns if fits_end("alpha_pattern", key, path)), config.lora_alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def _check_factors(folder: Path, path: str, lora_A: Tensor, lora_B: Tensor) -> None:
    flat = lora_A.dim() == lora_B.dim() >= 2 and all(size == 1 for size in lora_B.shape[2:])
    if not flat or lora_A.shape[0] != lora_B.shape[1]:
        raise AdapterError(
            f"{folder}: {path} has A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}; they must be (r, d_in) and "
            "(d_out, r), or (r, channels, *kernel) and (d_out, r, 1, ...) of a convolution without groups"
        )


def _others(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Tensors trained in full, without tensors of the base, which PEFT also saves for embeddings."""
    ends = tuple(f".{key}" for keys in KEY_PAIRS for key in keys)
    rest = {key: tensor for key, tensor in tensors.items() if not key.endswith(ends)}
    return {
        key: tensor
        for key, tensor in rest.items()
        if ".base_layer." not in key or (config.bias != "none" and key.endswith(".bias"))
    }


def _check_finite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if fault_of(tensor):
            raise AdapterError(f"{folder}: {key} holds values that are not finite")


def _natural(key: str) -> list[tuple[int, str]]:
    """Sort key that puts "layers.10" after "layers.9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def check_rank(rank: int, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Paths of the layers in which `rank` adds nothing, because their smaller side is below it.

    Args:
        shapes: path of a layer -> (d_out, d_in).

    Raises: ConfigError: the rank is below 1, or above the smaller side of every layer.
    """
    if rank < 1:
        raise ConfigError(f"rank is {rank}; a rank is at least 1")
    widest = max(shapes, key=lambda path: min(shapes[path]))
    d_out, d_in = shapes[widest]
    if rank > min(d_out, d_in):
        raise ConfigError(
            f'rank {rank} is larger than every layer: the widest, "{widest}", is {d_in} -> {d_out}, so the largest '
            f"useful rank is {min(d_out, d_in)}"
        )
    return [path for path, shape in shapes.items() if rank > min(shape)]


def narrow_line(rank: int, narrow: Sequence[str]) -> list[str]:
    """A line of a report that names layers whose smaller side is below `rank`; none without such layers."""
    if not narrow:
        return []
    return [f"  note: {len(narrow)} layers are narrower than rank {rank} and padded with zeros, first {narrow[0]}"]


def check_out(out: str | Path, sources: Iterable[str | Path], *, overwrite: bool) -> Path:
    """The folder to write to. Raises OutputError: it is taken, cannot be written, or is one of the sources."""
    folder = Path(out)
    for source in sources:
        if Path(source).exists() and folder.exists() and folder.samefile(source):
            raise OutputError(f"{out}: is one of the sources; name another folder for the result")
    atomic.check_new(folder, overwrite=overwrite)
    return folder


def write_updates(
    out: Path,
    layers: Mapping[str, Update],
    fields: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    others: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> int:
    """Writes an ordinary adapter to `out`, whole or not at all, and `report` beside it. Returns its rank.
    Args:
        fields: adapter_config.json; fields of ranks and scalings are set here.

    Raises: OutputError: `out` exists (without `overwrite`), the disk is full or read-only. AdapterError: a tensor
        holds NaN or infinity.
    """
    rank = max(update.r for update in layers.values())
    tensors: dict[str, Tensor] = dict(others or {})
    for path, update in layers.items():
        factors = padded(update.lora_A, update.lora_B * update.scaling, rank)
        kernels = update.kernel, (1,) * len(update.kernel)
        for key, factor, kernel in zip(update.keys, factors, kernels, strict=True):
            shape = (len(factor), -1, *kernel)
            tensors[f"{PREFIX}{path}.{key}"] = factor.cpu().contiguous().view(shape)
    check_finite(tensors, str(out), AdapterError)
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    with atomic.new_directory(out, overwrite=overwrite) as temporary:
        atomic.write_bytes(temporary / WEIGHTS_FILE, to_bytes(tensors, metadata={"format": "pt"}))
        atomic.write_text(temporary / CONFIG_FILE, json.dumps({**fields, **plain}, indent=2, sort_keys=True) + "\n")
        atomic.write_text(temporary / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    return rank


def read_report(folder: Path) -> dict[str, Any]:
    """The report that `write_updates` wrote beside an adapter; empty if there is none.

    Raises: AdapterError: it is damaged.
    """
    file = folder / REPORT_FILE
    if not os.path.lexists(file):
        return {}
    report = foreign.read_json(file, AdapterError)
    sources, recipe, error = (report.get(name) for name in ("sources", "recipe", "relative_error"))
    numbers = [*sources.values(), error or 0] if isinstance(sources, dict) else [sources]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) or not (
        recipe is None or (isinstance(recipe, dict) and isinstance(recipe.get("method"), str))
    ):
        raise AdapterError(f"{file}: damaged; remove it, since the adapter works without it")
    return report


def selection_fields(sources: Sequence[AdapterUpdates], paths: Iterable[str]) -> dict[str, Any]:
    """Fields of adapter_config.json that select exactly the layers that any of the sources adapts."""
    given = [{name: source.fields.get(name) for name in _SELECTION} for source in sources]
    if all(fields == given[0] for fields in given):
        return given[0]
    none: dict[str, Any] = dict.fromkeys(_SELECTION)
    lists = [fields["target_modules"] for fields in given if isinstance(fields["target_modules"], list)]
    if len(lists) == len(given) and not any(fields[name] for fields in given for name in _SELECTION[1:]):
        return none | {"target_modules": sorted({name for names in lists for name in names})}
    return none | {"target_modules": list(paths)}


def same_base(sources: Sequence[AdapterUpdates], model: str | None) -> str | None:
    """The base model that the sources were made for; `model`, if given, overrides their records.

    Raises: AdapterError: they record different ones.
    """
    if model is not None:
        return model
    recorded = {source.folder: source.fields.get("base_model_name_or_path") for source in sources}
    named = {folder: str(base) for folder, base in recorded.items() if base}
    for folder, base in named.items():
        first = next(iter(named))
        if Path(base).name != Path(named[first]).name:
            raise AdapterError(
                f"{first} was made for {named[first]}, but {folder} for {base}; adapters of different models cannot "
                "be combined. If both are the same model, say so with --model"
            )
    return next(iter(named.values()), None)


def to_device(update: Update, device: torch.device) -> Update:
    """The same update on `device`."""
    return replace(update, lora_A=update.lora_A.to(device), lora_B=update.lora_B.to(device))
