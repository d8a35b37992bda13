"""Keys of an adapter's tensors in files, where PEFT would not find the layer's own path.

While PEFT 0.21 reads a file, it renames keys as transformers renames those of older checkpoints. Some of these rules
also change the path of a layer of today's model. Laguna's `mlp.shared_experts` gets a second dot, and PEFT leaves the
adapter there at its first values, with only a warning. So such a key is written in its older form, which the rules
lead back to the path. If no form leads back, the key stays, and `notes` says that PEFT drops the tensors.

Source: `build_peft_weight_mapping` in
`peft.utils.transformers_weight_conversion`; `transformers.conversion_mapping`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

PREFIX = "base_model.model."


def in_files(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the keys of PEFT's layout, with the keys that PEFT leads to the same layers."""
    rules = _rules(model)
    return {_older(rules, key) if rules else key: tensor for key, tensor in tensors.items()}


def read_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reverses `in_files`. A file whose keys are the layers' own paths stays as it is."""
    rules = _rules(model)
    return {_own(rules, key) if rules else key: tensor for key, tensor in tensors.items()}


def notes(model: nn.Module, paths: Collection[str]) -> tuple[str, ...]:
    """A sentence if PEFT drops the adapters of some of the layers at `paths`."""
    rules = _rules(model)
    keys = {path: f"{PREFIX}{path}.lora_A.weight" for path in paths} if rules else {}
    lost = [path for path, key in keys.items() if _renamed(rules, _older(rules, key)) != key]
    if not lost:
        return ()
    first = f'"{lost[0]}"' + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
    return (
        f"PEFT will drop the adapters of {first}: it renames their keys by rules for older checkpoints. "
        "loratune reads them; for PEFT name them in exclude_modules",
    )


def _rules(model: nn.Module) -> list[Any]:
    """transformers' renamings of keys of older checkpoints of this model, in order."""
    if not isinstance(model, PreTrainedModel):
        return []
    return [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]


def _older(rules: list[Any], key: str) -> str:
    """The key in a file of a tensor whose key is `key` by the path of its layer."""
    if ".lora_" not in key or _renamed(rules, key) == key:
        return key
    older = _renamed([rule.reverse_transform() for rule in reversed(rules)], key)
    return older if _renamed(rules, older) == key else key


def _own(rules: list[Any], key: str) -> str:
    """The key by the path of the layer of a tensor whose key in a file is `key`."""
    own = _renamed(rules, key)
    return own if own != key and _older(rules, own) == key else key


def _renamed(rules: list[Any], key: str) -> str:
    plain = key.removeprefix(PREFIX)
    for rule in rules:
        plain, _ = rule.rename_source_key(plain)
    return PREFIX + plain
