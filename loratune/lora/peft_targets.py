"""The layers of an adapter in the words that PEFT reads correctly.

PEFT 0.21 takes the names `gate`, `gate_proj`, `up_proj` and `down_proj` (`w1`, `w2`, `w3`) in the target_modules of
many mixtures for experts of older checkpoints, and rewrites them to the stacked parameters of today's experts. An
adapter of a dense or shared MLP with such a name would be dropped with a warning. It cannot be named there in any
form, also not by its path or a regular expression. But `target_parameters` can name the weight of a layer, and
the tensors have the same keys and shapes. PEFT has no dropout there, so the dropout is stored under a name of ours.

Of a module with two paths PEFT knows the first only, so files name no other.

Source: `_convert_peft_config_moe` in `peft.utils.transformers_weight_conversion`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import conversion_mapping

from loratune.errors import AdapterError
from loratune.lora.paths import find_modules, shortest_names

DROPOUT = "lora_dropout_in_training"
"""Field for the dropout of an adapter that PEFT reads without one."""
_WEIGHT = ".weight"
_REWRITTEN = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
# Type of a model -> the type whose experts it has; PEFT reads this table too.
_PATTERNS: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})


def rewritten_names(model: nn.Module) -> frozenset[str]:
    """Last components of paths that PEFT rewrites in target_modules for this model."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return _REWRITTEN.get(_PATTERNS.get(str(kind), ""), frozenset())


def named(model: nn.Module, paths: Collection[str], values: dict[str, Any]) -> dict[str, Any]:
    """Fields of adapter_config.json that select exactly the layers at `paths`, each given by its first path.

    Args:
        values: the other fields.
    """
    every = [entry.paths[0] for entry in find_modules(model)]
    rewritten = {path for path in paths if path.rpartition(".")[2] in rewritten_names(model)}
    fields = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    fields |= {"target_modules": shortest_names([path for path in paths if path not in rewritten], every)}
    if not rewritten:
        return fields
    parameters = [name for name, _ in model.named_parameters()]
    fields |= {"target_parameters": shortest_names([path + _WEIGHT for path in rewritten], parameters)}
    for field in ("rank_pattern", "alpha_pattern"):
        fields |= {field: values[field] | {f"({key}){_WEIGHT}": value for key, value in values[field].items()}}
    if values["lora_dropout"]:
        fields |= {"lora_dropout": 0.0, DROPOUT: values["lora_dropout"]}
    return fields


def parameters_named(model: nn.Module, experts: Collection[str], others: object) -> list[str]:
    """Value of target_parameters for expert weights at these paths, and `others` that `named` has chosen."""
    parameters = {name for name, _ in model.named_parameters()} | set(experts)
    weights = [name for name in others if name.endswith(_WEIGHT)] if isinstance(others, list) else []
    return sorted({*shortest_names(list(experts), parameters), *weights})


def read_back(given: dict[str, Any], where: object) -> dict[str, Any]:
    """The fields of a file with the weights of layers in target_parameters among target_modules; reverses `named`.

    Raises: AdapterError: they stand beside an expression in target_modules.
    """
    parameters = given.get("target_parameters")
    if not isinstance(parameters, list):  # its type is checked with those of the other fields
        return given
    layers = [name for name in parameters if str(name).endswith(_WEIGHT)]
    if not layers:
        return given
    modules = given.get("target_modules") or []
    if not isinstance(modules, list):
        raise AdapterError(
            f"{where}: target_parameters = {layers} beside target_modules as an expression (which loratune does not "
            "combine); without the parameters the adapter would be another one"
        )
    values = dict(given, target_parameters=[name for name in parameters if name not in layers] or None)
    values["target_modules"] = sorted({*modules, *(name.removesuffix(_WEIGHT) for name in layers)})
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = given.get(field) or {}
        doubles = {f"({key}){_WEIGHT}" for key in pattern}
        values[field] = {key: value for key, value in pattern.items() if key not in doubles}
    if DROPOUT in values:
        values["lora_dropout"] = values.pop(DROPOUT)
    return values
