"""Modules of modules_to_save that are tied to others in the base, usually a head to the embeddings.

As in PEFT, the adapter holds copies of the named modules alone, so they are no longer tied to a module that is not
named. Two named modules stay tied to each other, unless an adapter's file holds different values for them. Once
merged, the model is untied, and its configuration must say so: otherwise `from_pretrained` would tie it again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.lora.paths import ModulePaths
from loratune.lora.state import Adapter, identity, ties


def outside(model: nn.Module, saved: Iterable[ModulePaths]) -> dict[str, str]:
    """Parameter of a saved module -> a parameter outside of all saved modules that it is tied to."""
    entries = list(saved)
    inside = {p for entry in entries for path in entry.paths for p in paths_below(model, path)}
    parameters = [p for entry in entries for p in entry.module.parameters()]
    found: dict[str, str] = {}
    for where in ties(model, parameters).values():
        others = [path for path in where if path not in inside]
        if others:
            found[next(path for path in where if path in inside)] = others[0]
    return found


def notes(model: nn.Module, saved: Iterable[ModulePaths]) -> tuple[str, ...]:
    """A sentence for each saved module whose copy is no longer tied."""
    return tuple(
        f"{inner.rpartition('.')[0]} is tied to {outer.rpartition('.')[0]} in the base; the adapter trains a copy of "
        "it alone, so a merged model is untied"
        for inner, outer in outside(model, saved).items()
    )


def paths_below(model: nn.Module, path: str) -> list[str]:
    """Every path of a parameter in the module at `path`."""
    module = model.get_submodule(path)
    return [f"{path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]


def partners(model: nn.Module, path: str) -> set[str]:
    """Paths of the modules that share a parameter with the module at `path`."""
    parameters = list(model.get_submodule(path).parameters())
    return {place.rpartition(".")[0] for where in ties(model, parameters).values() for place in where}


def separate_if_different(adapter: Adapter, slots: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> bool:
    """Unties the adapter's copies if a file gives different values to tied ones. Returns whether it did."""
    of_modules = {identity(p) for module in adapter.modules.values() for p in module.parameters()}
    first: dict[int, str] = {}
    for key, slot in slots.items():
        if identity(slot) not in of_modules:
            continue
        twin = first.setdefault(identity(slot), key)
        if twin != key and not given[key].equal(given[twin]):
            adapter.modules = {path: copy.deepcopy(module) for path, module in adapter.modules.items()}
            return True
    return False


def declare_untied(model: nn.Module) -> list[Any]:
    """Sets tie_word_embeddings to False in the configurations of a model whose head is not tied any more.

    Returns: the changed configurations, for `declare_tied`.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    try:
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
    except NotImplementedError:  # transformers' answer for models that read images or sound
        return []
    mine, shared = (getattr(module, "weight", None) for module in (head, table))
    if not isinstance(mine, Tensor) or not isinstance(shared, Tensor) or identity(mine) == identity(shared):
        return []
    found = {id(config): config for config in (model.config, model.config.get_text_config())}
    changed = [config for config in found.values() if getattr(config, "tie_word_embeddings", False)]
    for config in changed:
        config.tie_word_embeddings = False
    return changed


def declare_tied(configs: Iterable[Any]) -> None:
    """Undoes `declare_untied`."""
    for config in configs:
        config.tie_word_embeddings = True
