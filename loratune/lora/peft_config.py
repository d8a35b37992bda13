"""PEFT's adapter_config.json: every field that PEFT 0.21 writes. Reading loses no meaning.

Writing resolves settings that only loratune can resolve ("all-linear", layer numbers) into module names, so that
PEFT, transformers, vLLM and llama.cpp select the same layers. Reading takes PEFT's own defaults for missing fields.
It refuses by name every field that is not implemented here and would change the result, so an adapter never loads as
a different one.

Format: PEFT 0.21 `LoraConfig.save_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from loratune import foreign
from loratune.config import LoraConfig, from_dict
from loratune.errors import AdapterError, ConfigError
from loratune.lora import expert_targets, peft_targets
from loratune.lora.paths import find_modules
from loratune.lora.select import ALL_LINEAR, check_settings, names_path
from loratune.lora.state import Adapter
from loratune.lora.variants import settings_of, values_of

CONFIG_FILE = "adapter_config.json"

# Fields that PEFT 0.21 writes and loratune does not use, with the value that means "not used".
UNUSED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "revision": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Fields about an adapter's origin or its training elsewhere. They do not change its output.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Types of the fields that are not settings here. PEFT refuses other values, or fails on them later. All may be null.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    name: (kinds, words)
    for kinds, words, names in (
        ((str,), "text", "base_model_name_or_path megatron_core peft_version revision task_type"),
        (
            (bool,),
            "true or false",
            "ensure_weight_tying fan_in_fan_out inference_mode lora_bias use_dora use_qalora",
        ),
        (
            (dict,),
            "an object",
            "arrow_config auto_mapping corda_config eva_config kasa_config loftq_config lora_ga_config "
            "megatron_config monteclora_config runtime_config use_bdlora velora_config",
        ),
        ((list,), "a list", "alora_invocation_tokens layer_replication"),
        ((int,), "a whole number", "qalora_group_size"),
        ((list, dict), "a list or an object", "trainable_token_indices"),
    )
    for name in names.split()
}
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
# Initialisations that do not change the base weights; after training they make no difference.
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter_config.json that was read."""

    lora: LoraConfig
    base_model: str | None
    """base_model_name_or_path: the model that the adapter was made for, if its author recorded it."""
    task_type: str | None
    peft_version: str | None


def read(folder: Path) -> AdapterConfig:
    """Reads adapter_config.json in `folder`.

    Raises: AdapterError: it is missing, not JSON, not of a LoRA adapter, or sets a field not implemented here.
    """
    path = folder / CONFIG_FILE
    values = foreign.read_json(path, AdapterError)
    values = peft_targets.read_back(values, path)
    try:
        settings = settings_of(values)
        _check_fields(path, values, _names(settings))
        lora = from_dict(settings, _values(values, _names(settings)), str(path))
        check_settings(lora)
    except ConfigError as error:
        raise AdapterError(_at(path, error)) from error
    base = values.get("base_model_name_or_path")
    return AdapterConfig(lora, base or None, values.get("task_type"), values.get("peft_version"))


def _names(settings: type[LoraConfig]) -> list[str]:
    return [f.name for f in fields(settings)]


def _check_fields(path: Path, given: dict[str, Any], known: Iterable[str]) -> None:
    kind = given.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f'{path}: peft_type is {kind!r}; loratune reads "LORA" adapters only')
    _check_types(path, given)
    for name, value in given.items():
        off = value == UNUSED[name] if name in UNUSED else not value  # {} turns a feature of PEFT on
        if name in known or name in _HARMLESS or value is None or off:
            continue
        why = " (a field that loratune does not implement)" if name in UNUSED else " (an unknown field)"
        raise AdapterError(f"{path}: {name} = {_short(value)}{why}; ignoring it would change the adapter's output")
    init = given.get("init_lora_weights", True)
    if init is not None and init not in (*_HARMLESS_INITS, *values_of("init_lora_weights")):
        raise AdapterError(
            f"{path}: init_lora_weights = {init!r} changes the base weights; convert the adapter with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion) first"
        )
    if not given.get("target_modules") and not given.get("target_parameters"):
        raise AdapterError(f"{path}: target_modules is missing, so the adapted layers are unknown")


def _check_types(path: Path, given: dict[str, Any]) -> None:
    """Raises AdapterError for values that PEFT refuses, in fields that are not settings here or must not be null."""
    for name, value in given.items():
        expected, words = _TYPES.get(name, ((type(value),), ""))
        if value is not None and type(value) not in expected:
            raise AdapterError(f"{path}: {name} = {_short(value)} is not {words}")
    for name in ("r", "lora_alpha", "bias"):
        if name in given and given[name] is None:
            raise AdapterError(f"{path}: {name} is null, and the update cannot be computed without it")
    if given.get("task_type") not in (None, *_TASKS):
        raise AdapterError(f"{path}: task_type is {_short(given['task_type'])}; PEFT knows {', '.join(_TASKS)}")


def _values(given: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Values for the configuration, with PEFT's defaults (r 8, lora_alpha 8) where a field is missing."""
    values = {"r": 8, "lora_alpha": 8} | {n: v for n, v in given.items() if n in known and v is not None}
    for name in ("layers_to_transform", "layers_pattern"):
        if name in values and not isinstance(values[name], list):
            values[name] = [values[name]]  # PEFT takes one number or name as well,
        if not values.get(name):  # and empty for "no restriction"
            values.pop(name, None)
    if values.get("init_lora_weights") not in (
        True,
        False,
        "gaussian",
        "orthogonal",
        *values_of("init_lora_weights"),
    ):
        values.pop("init_lora_weights", None)
    values.setdefault("target_modules", [])
    if str(values["target_modules"]).lower() == ALL_LINEAR:
        values["target_modules"] = ALL_LINEAR
    return values


def _at(path: Path, error: ConfigError) -> str:
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_json(model: nn.Module, adapter: Adapter) -> str:
    """The text of adapter_config.json for an adapter of `model`."""
    config = adapter.config
    modules = {path: entry for entry in find_modules(model) for path in entry.paths}
    every = list(modules)
    values: dict[str, Any] = dict(UNUSED)
    values |= {name: getattr(config, name) for name in _names(type(config))}
    experts = expert_targets.parameter_paths((path, weights.variant) for path, weights in adapter.layers.items())
    adapted = [modules[path] for path, weights in adapter.layers.items() if not weights.kind.is_part]
    unclear = any(not names_path(config.target_modules, entry.paths[0]) for entry in adapted) or any(
        entry.paths[0].rpartition(".")[2] in peft_targets.rewritten_names(model) for entry in adapted
    )
    if config.target_modules == ALL_LINEAR or config.layers_to_transform is not None or unclear:
        values |= peft_targets.named(model, [entry.paths[0] for entry in adapted], values)
    if experts:
        values["target_parameters"] = peft_targets.parameters_named(model, experts, values["target_parameters"])
    if adapter.modules:
        values["modules_to_save"] = [_ending(path, every) for path in adapter.modules]
    task = task_type(model)
    values |= {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else _auto_mapping(model),
        "base_model_name_or_path": getattr(model, "name_or_path", "") or None,
        "fan_in_fan_out": any(weights.kind.fan_in_fan_out for weights in adapter.layers.values()),
        "inference_mode": True,
        "lora_alpha": _whole(config.lora_alpha),
        "alpha_pattern": {key: _whole(alpha) for key, alpha in values["alpha_pattern"].items()},
    }
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def task_type(model: nn.Module) -> Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"] | None:
    """PEFT's task type of a language model; None for other models, for which PEFT expects a head in the file."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        return None
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values() else None


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """Value of PEFT's `auto_mapping`, by which AutoPeftModel finds the class of a model without a task type."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _ending(path: str, every: list[str]) -> str:
    """The shortest entry of modules_to_save that ends only this module's path, since PEFT matches any ending."""
    parts = path.split(".")
    names = (".".join(parts[i:]) for i in reversed(range(len(parts))))
    return next((name for name in names if sum(p.endswith(name) for p in every) == 1), path)


def _whole(number: float) -> float:
    """The number as an int if it is whole, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number
