"""What a model knows about its adapters: one plain object on the root module, no registry anywhere.

    model.loratune_adapters: Adapters
        adapters: name -> Adapter             the weights of every adapter, in use or not
            layers:  path -> LayerWeights     A and B of one layer
            modules: path -> Module           its copies of modules_to_save
            biases:  path -> Parameter        its copies of trained biases
        layers: path -> LoraLayer             the layers that stand in, each holding at most one adapter

An adapter's name is a key of `Adapters.adapters` and occurs nowhere else: in no module, parameter or tensor name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError, nearest
from loratune.lora.linear import LoraLayer
from loratune.ops.frozen import FrozenWeight

_ATTRIBUTE = "loratune_adapters"


@dataclass
class LayerWeights:
    """One adapter's weights at one layer."""

    kind: type[LoraLayer]
    lora_A: nn.Parameter
    """(r, d_in), float32 or, on a float64 base, float64."""
    lora_B: nn.Parameter
    """(d_out, r)"""
    scaling: float

    def fits(self, weight: Tensor | FrozenWeight) -> bool:
        """Whether A and B are where the layer's weight is, in the masters' dtype for it."""
        return self.lora_A.device == weight.device and self.lora_A.dtype == master_dtype(weight)

    def follow(self, weight: Tensor | FrozenWeight) -> None:
        """Moves A and B to the device of the layer's weight and to the masters' dtype for it."""
        for parameter in (self.lora_A, self.lora_B):
            parameter.data = parameter.data.to(weight.device, master_dtype(weight))


@dataclass
class Adapter:
    """One adapter, whole. Its tensors are its own; only those in use are also found in the model."""

    config: LoraConfig
    layers: dict[str, LayerWeights] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter path -> copy. Paths of tied biases share one Parameter."""
    stored: bool = False
    """True if a `Store` says where A and B are, in the dtype they compute in; such an adapter cannot train."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every Parameter that trains, each once, by its name in the model while this adapter is in use."""
        named: dict[str, nn.Parameter] = {}
        for path, weights in self.layers.items():
            named[f"{path}.lora_A"], named[f"{path}.lora_B"] = weights.lora_A, weights.lora_B
        for path, module in self.modules.items():
            named |= {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
        named |= self.biases
        first = {id(parameter): name for name, parameter in reversed(named.items())}
        return {name: parameter for name, parameter in named.items() if first[id(parameter)] == name}


class Residence(Protocol):
    """What switching asks of a store of adapters in host memory (`lora.store`)."""

    def bring(self, names: Collection[str]) -> None:
        """Has those of the named adapters that it keeps on the device when the work issued from now on runs."""

    def forget(self, name: str) -> None:
        """Lets go of an adapter, if it keeps it."""

    def prepare(self, name: str, selection: Any, adapter: Adapter) -> Callable[[], None]:
        """Takes in the tensors of a new adapter; what is returned puts them in the place of the old ones."""


Plan = list[tuple[LoraLayer, LayerWeights | None]]
"""Each layer that stands in, and what an adapter has for it."""


@dataclass
class Adapters:
    """All adapters of one model, and which of them it computes with."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Path of a stand-in or of a module of modules_to_save -> every path at which it stands."""
    active: dict[str, float] = field(default_factory=dict)
    """Name -> weight of the adapters in use; empty is the bare base."""
    base_modules: dict[str, nn.Module] = field(default_factory=dict)
    """Path -> module of the base that stands aside for the active adapter's copy."""
    base_biases: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter path -> bias of the base that stands aside for the active adapter's copy."""
    merged: str | None = None
    active_before_merge: dict[str, float] = field(default_factory=dict)
    plans: dict[str | None, Plan] = field(default_factory=dict)
    """Name -> how to switch to it, until adapters or layers come or go; None is the bare base."""
    store: Residence | None = None
    unfrozen: list[nn.Parameter] = field(default_factory=list)
    """Parameters of the base that required a gradient before the first adapter came."""

    def get(self, name: str) -> Adapter:
        """The adapter called `name`. Raises AdapterError with near names."""
        if name not in self.adapters:
            have = ", ".join(f'"{n}"' for n in self.adapters) or "none"
            raise AdapterError(f'no adapter "{name}"; attached: {have}.{nearest(name, self.adapters)}')
        return self.adapters[name]

    def require_unmerged(self, action: str) -> None:
        """Raises AdapterError if an adapter is merged into the weights."""
        if self.merged is not None:
            raise AdapterError(f'cannot {action} while adapter "{self.merged}" is merged; call unmerge first')


def find(model: nn.Module) -> Adapters | None:
    """The adapters of `model`, or None if it has none."""
    state = getattr(model, _ATTRIBUTE, None)
    assert state is None or isinstance(state, Adapters)
    return state


def require(model: nn.Module) -> Adapters:
    """The adapters of `model`. Raises AdapterError if it has none."""
    state = find(model)
    if state is None:
        raise AdapterError(f"this {type(model).__name__} has no adapters; attach or load one to it first")
    return state


def install(model: nn.Module, state: Adapters) -> None:
    """Puts `state` on the root module, as a plain attribute."""
    setattr(model, _ATTRIBUTE, state)


def uninstall(model: nn.Module) -> None:
    """Takes the state off the root module again."""
    delattr(model, _ATTRIBUTE)


def master_dtype(weight: Tensor | FrozenWeight) -> torch.dtype:
    """dtype in which an adapter of a layer with this weight is kept and trained."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def identity(tensor: Tensor) -> int:
    """Equal for tensors that are the same Parameter or share their storage from the first element on."""
    return tensor.data_ptr() or id(tensor)


def ties(model: nn.Module, parameters: Iterable[Tensor]) -> dict[int, list[str]]:
    """Identity of each given parameter -> every path of `model` under which it is found."""
    found: dict[int, list[str]] = {identity(p): [] for p in parameters}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if (key := identity(parameter)) in found:
            found[key].append(path)
    return found
