"""The adapters of a model: one plain object on the root module.

    model.loratune_adapters: Adapters
        adapters: name -> Adapter             the weights of every adapter, in use or not
            layers:  path -> LayerWeights     its tensors at one layer
            modules: path -> Module           its copies of modules_to_save
            biases:  path -> Parameter        its copies of trained biases
        layers: path -> LoraLayer             the replaced layers, each holding at most one adapter

An adapter's name is a key of `Adapters.adapters` and occurs nowhere else: in no module, parameter or tensor name.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loratune.config import LoraConfig
from loratune.errors import AdapterError, ArgumentError, nearest
from loratune.lora import direct_reads
from loratune.lora.layer import LoraLayer, LoraVariant
from loratune.lora.select import Selection
from loratune.ops.frozen import FrozenWeight

_ATTRIBUTE = direct_reads.ADAPTERS


@dataclass
class LayerWeights:
    """One adapter's weights at one layer."""

    kind: type[LoraLayer]
    variant: LoraVariant
    tensors: dict[str, nn.Parameter]
    """Attribute name -> tensor, as `variant.tensors` names them; float32 or, on a float64 base, float64."""
    scaling: float
    shapes_in_files: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Attribute name -> shape in PEFT's files, for tensors that have another shape here."""

    @property
    def lora_A(self) -> nn.Parameter:
        """(r, d_in)"""
        return self.tensors["lora_A"]

    @property
    def lora_B(self) -> nn.Parameter:
        """(d_out, r)"""
        return self.tensors["lora_B"]

    @property
    def r(self) -> int:
        """Rank; of experts, the rank of each expert's pair."""
        return self.variant.rank_of(self.lora_A)

    def keys(self) -> dict[str, str]:
        """Attribute name -> name in PEFT's files, after the layer's path and a dot."""
        specs = self.variant.tensors(self.kind, self.lora_A.shape[1], self.lora_B.shape[0], self.r)
        return {name: spec.key for name, spec in specs.items()}

    def in_files(self, path: str) -> dict[str, Tensor]:
        """Key in PEFT's files, without their prefix -> tensor of the layer at `path`, in the shape of the files."""
        slots: dict[str, Tensor] = {}
        for name, key in self.keys().items():
            shape, tensor = self.shapes_in_files.get(name), self.tensors[name]
            slots[f"{self.kind.path_in_files(path)}.{key}"] = tensor if shape is None else tensor.detach().view(shape)
        return slots

    def fits(self, weight: Tensor | FrozenWeight) -> bool:
        """True if the tensors are on the device of the layer's weight and in the masters' dtype for it."""
        lora_A = self.tensors["lora_A"]
        return lora_A.device == weight.device and lora_A.dtype == master_dtype(weight)

    def follow(self, weight: Tensor | FrozenWeight) -> None:
        """Moves the tensors to the device of the layer's weight and to the masters' dtype for it."""
        for parameter in self.tensors.values():
            parameter.data = parameter.data.to(weight.device, master_dtype(weight))

    def inference_dtype(self, weight: FrozenWeight) -> torch.dtype:
        """The dtype to which the layer rounds the tensors at each use; the masters' dtype if it does not.

        An embedding scales the looked-up rows before it rounds them, so rounding A first would give other bits.
        """
        rounds = self.variant.low_rank_sum and self.kind.is_linear
        return weight.dtype if rounds else self.lora_A.dtype


@dataclass
class Adapter:
    """One adapter, whole. Its tensors are its own; only the tensors in use are also found in the model."""

    config: LoraConfig
    layers: dict[str, LayerWeights] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    biases: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter path -> copy. Paths of tied biases share one Parameter."""
    stored: bool = False
    """True if a `Store` decides where the tensors are; they are rounded for inference and cannot train."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every Parameter that trains, each once, by its name in the model while this adapter is in use."""
        named: dict[str, nn.Parameter] = {}
        for path, weights in self.layers.items():
            named |= {f"{path}.{name}": parameter for name, parameter in weights.tensors.items()}
        for path, module in self.modules.items():
            named |= {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
        named |= self.biases
        first = {id(parameter): name for name, parameter in reversed(named.items())}
        return {name: parameter for name, parameter in named.items() if first[id(parameter)] == name}

    def sum_refusal(self) -> str | None:
        """The reason why this adapter cannot be weighted or added to others, or None."""
        variant = next((w.variant for w in self.layers.values() if not w.variant.low_rank_sum), None)
        return None if variant is None else f"uses {type(variant).__name__}, which is not a low-rank sum"


class AdapterStore(Protocol):
    """A store of adapters in host memory, as switching uses it (`lora.store`)."""

    def bring(self, names: Collection[str]) -> None:
        """Makes its adapters among `names` available on the device for the work issued from now on."""

    def release(self, name: str) -> None:
        """Frees the memory of an adapter, if it holds it."""

    def prepare(self, name: str, selection: Selection, adapter: Adapter) -> Callable[[], None]:
        """Copies the tensors of a new adapter into host memory; the returned function exchanges old for new."""


SwitchEntry = tuple[LoraLayer, LayerWeights | None, dict[str, nn.Parameter | None], dict[str, object]]
"""One layer's part of a switch, looked up once: the layer, the adapter's weights, the value of every tensor name of
the layer, and the values of its other attributes. A plain tuple, which Python unpacks faster than a named one."""


@dataclass
class Adapters:
    """All adapters of one model, and which of them it computes with."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    paths: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """First path of a replaced layer or of a module of modules_to_save -> all its paths."""
    active: dict[str, float] = field(default_factory=dict)
    """Name -> weight of the adapters in use; empty is the bare base."""
    base_modules: dict[str, nn.Module] = field(default_factory=dict)
    """Path -> module of the base that the active adapter's copy has replaced."""
    base_biases: dict[str, nn.Parameter] = field(default_factory=dict)
    """Parameter path -> bias of the base that the active adapter's copy has replaced."""
    merged: str | None = None
    active_before_merge: dict[str, float] = field(default_factory=dict)
    untied: list[Any] = field(default_factory=list)
    """Configurations that say the head is not tied while an adapter is merged."""
    switches: dict[str | None, list[SwitchEntry]] = field(default_factory=dict)
    """Name -> entries for a switch to it, valid until adapters or layers change; None is the bare base."""
    store: AdapterStore | None = None
    unfrozen: list[nn.Parameter] = field(default_factory=list)
    """Parameters of the base that required a gradient before the first adapter was attached."""
    hook: RemovableHandle | None = None
    """Of `_warn_of_save_pretrained`."""

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
    """The adapters of `model`. Raises AdapterError if it has none. ArgumentError: it is no module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the first argument is the model, but a {type(model).__name__} was given")
    state = find(model)
    if state is None:
        raise AdapterError(f"this {type(model).__name__} has no adapters; attach or load one to it first")
    return state


def install(model: nn.Module, state: Adapters) -> None:
    """Puts `state` on the root module, as a plain attribute."""
    setattr(model, _ATTRIBUTE, state)
    if state.hook is None:
        state.hook = model.register_state_dict_pre_hook(_warn_of_save_pretrained)


def uninstall(model: nn.Module) -> None:
    """Removes the state from the root module."""
    if (state := find(model)) is not None and state.hook is not None:
        state.hook.remove()
    delattr(model, _ATTRIBUTE)
    direct_reads.forget(model)


def _warn_of_save_pretrained(model: nn.Module, _prefix: str, _keep_vars: bool) -> None:
    """Warns if transformers' `save_pretrained` asks for the weights, because it cannot write an adapter.

    The names of an adapter's tensors mean nothing to `from_pretrained`, which skips them. A call of `state_dict` by
    other code is complete, so it is not warned of: a Trainer's checkpoint can be loaded into the same model.
    """
    state = find(model)
    if state is None or state.merged is not None or not state.adapters:
        return
    if all(frame.f_code.co_name != "save_pretrained" for frame, _ in traceback.walk_stack(None)):
        return
    name = next(iter(state.active or state.adapters))
    warnings.warn(
        f"save_pretrained writes the base model; from_pretrained will not find the adapters attached to it "
        f"({', '.join(state.adapters)}). Save each with loratune.save(model, directory, {name!r}), or call "
        f"loratune.merge(model, {name!r}) first to write merged weights",
        UserWarning,
        stacklevel=2,
    )


def master_dtype(weight: Tensor | FrozenWeight) -> torch.dtype:
    """dtype in which an adapter of a layer with this weight is stored and trained."""
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
