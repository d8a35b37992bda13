"""The adapters of a model at a glance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from loratune.errors import expect
from loratune.lora.state import Adapters, find
from loratune.precision.linear import count_parameters


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One adapter."""

    name: str
    weight: float | None
    """Weight in the sum in use, 1 for a single active adapter; None if it is not in use."""
    merged: bool
    layers: int
    """Number of adapted layers."""
    ranks: tuple[int, ...]
    """All ranks that occur, ascending."""
    variant: str
    """Class of the variant: "LoraVariant" is plain LoRA."""
    parameters: int
    """Values that train, modules_to_save and biases included."""
    in_full: tuple[str, ...]
    """Paths of modules_to_save and biases."""
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    stored: bool
    """True if it is in a `Store`, rounded for inference."""

    def __str__(self) -> str:
        use = "merged" if self.merged else "not in use" if self.weight is None else "active"
        use += f", weight {self.weight:g}" if self.weight not in (None, 1.0) else ""
        ranks = ", ".join(map(str, self.ranks))
        more = f", {len(self.in_full)} modules and biases in full" if self.in_full else ""
        where = f"{', '.join(self.dtypes)} on {', '.join(self.devices)}{', in a store' if self.stored else ''}"
        return f'"{self.name}" ({use}): {self.layers} layers, rank {ranks}, {self.parameters:,} values{more}, {where}'


@dataclass(frozen=True, slots=True, repr=False)
class Status:
    """The adapters of a model; `print` it."""

    model: str
    """Class of the model."""
    adapters: tuple[AdapterStatus, ...]
    active: tuple[str, ...]
    """Names of the adapters in use."""
    merged: str | None
    """Name of the adapter that is merged into the weights."""
    trainable: int
    """Values of the model that require a gradient now."""
    total: int
    """Values of the base model."""
    devices: tuple[str, ...]
    """Of the base model."""
    dtypes: tuple[str, ...]
    """Of the base model, the most frequent first."""

    def __repr__(self) -> str:
        if self.merged is not None:
            use = f'"{self.merged}" is merged'
        else:
            use = f"active: {', '.join(self.active) or 'none (bare base)'}"
        lines = [
            f"{self.model}: {self.total:,} parameters, {', '.join(self.dtypes)} on {', '.join(self.devices)}; "
            f"{self.trainable:,} values train; {use}"
        ]
        return "\n".join(lines + [f"  {adapter}" for adapter in self.adapters])


def status(model: nn.Module) -> Status:
    """Adapters of `model`, those in use, the merged one, counts, devices and dtypes. Changes nothing.

    Raises: ArgumentError: `model` is not a module.
    """
    expect(model, nn.Module, "model", "status(model)")
    state = find(model) or Adapters()
    own = {id(p) for adapter in state.adapters.values() for p in adapter.parameters().values()}
    own |= {id(p) for layer in state.layers.values() for p in layer.adapter_tensors().values()}  # of a sum
    parameters = list(model.parameters())
    base = [p for p in parameters if id(p) not in own] or parameters
    held = sum(p.numel() for p in parameters if id(p) in own)
    replaced = {id(p): p.numel() for module in state.base_modules.values() for p in module.parameters()}
    replaced |= {id(p): p.numel() for p in state.base_biases.values()}
    return Status(
        model=type(model).__name__,
        adapters=tuple(_adapter(state, name) for name in state.adapters),
        active=tuple(state.active),
        merged=state.merged,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=count_parameters(model) - held + sum(replaced.values()),
        devices=_devices(base),
        dtypes=_dtypes(base),
    )


def _adapter(state: Adapters, name: str) -> AdapterStatus:
    adapter = state.get(name)
    tensors = list(adapter.parameters().values())
    layers = adapter.layers.values()
    variants = Counter(type(weights.variant).__name__ for weights in layers)
    return AdapterStatus(
        name=name,
        weight=state.active.get(name),
        merged=state.merged == name,
        layers=len(layers),
        ranks=tuple(sorted({weights.r for weights in layers})),
        variant=", ".join(variants),
        parameters=sum(tensor.numel() for tensor in tensors),
        in_full=(*adapter.modules, *adapter.biases),
        devices=_devices(tensors),
        dtypes=_dtypes(tensors),
        stored=adapter.stored,
    )


def _devices(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(tensor.device) for tensor in tensors))


def _dtypes(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return tuple(dtype for dtype, _ in sizes.most_common())
