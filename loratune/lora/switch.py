"""Re-pointing: which adapter's tensors the model computes with. The mechanism below `inject`, without its checks.

A layer that stands in is handed the A and B of the adapter in use. A module trained in full, or a bias, changes
places with the base's. What comes in follows what leaves to its device and dtype, so that a model may be moved while
some of its tensors rest outside of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loratune.lora.state import Adapter, Adapters, LayerWeights, Plan
from loratune.precision.linear import frozen_of


def switch(model: nn.Module, state: Adapters, weights: dict[str, float]) -> None:
    """Makes the model compute with the weighted sum of the named adapters; no checks."""
    if state.store is not None:
        state.store.bring(weights)
    _restore_base(model, state)
    if is_plain(weights):
        name = next(iter(weights), None)
        _point(state, name)
        if name is not None:
            _bring_in(model, state, state.adapters[name])
    else:
        _point_to_sum(state, weights)
    state.active = dict(weights)


def _point(state: Adapters, name: str | None) -> None:
    """Hands every layer the A and B of one adapter, or none.

    There are hundreds of layers, and a switch may come before every answer, so this writes to the layers' dicts:
    `nn.Module.__setattr__` would take ten times as long to find out that a Parameter is a Parameter.
    """
    adapter = None if name is None else state.adapters[name]
    follows = adapter is not None and not adapter.stored
    dropout = 0.0 if adapter is None else adapter.config.lora_dropout
    plan = state.plans.get(name) or _plan(state, name)
    for layer, part in plan:
        parameters, attributes = layer._parameters, layer.__dict__
        if part is None:
            parameters["lora_A"] = parameters["lora_B"] = None
            attributes["scaling"] = attributes["lora_dropout"] = 0.0
            continue
        if follows:
            weight = parameters.get("weight")
            leader = frozen_of(layer) if weight is None else weight
            if not part.fits(leader):
                part.follow(leader)
        parameters["lora_A"], parameters["lora_B"] = part.lora_A, part.lora_B
        attributes["scaling"], attributes["lora_dropout"] = part.scaling, dropout


def _plan(state: Adapters, name: str | None) -> Plan:
    """Looks up once what each layer gets from adapter `name`."""
    parts = {} if name is None else state.adapters[name].layers
    plan = state.plans[name] = [(layer, parts.get(path)) for path, layer in state.layers.items()]
    return plan


def _point_to_sum(state: Adapters, weights: Mapping[str, float]) -> None:
    """Hands every layer the rank-concatenated A and B of several adapters."""
    chosen = [(state.adapters[name], weight) for name, weight in weights.items()]
    for path, layer in state.layers.items():
        parts = [(a.layers[path], weight) for a, weight in chosen if path in a.layers]
        for (adapter, _), (part, _) in zip([c for c in chosen if path in c[0].layers], parts, strict=True):
            if not adapter.stored:
                part.follow(frozen_of(layer))
        if parts:
            layer.hold(*_summed(parts), 1.0, 0.0)
        else:
            layer.release()


def _summed(parts: list[tuple[LayerWeights, float]]) -> tuple[nn.Parameter, nn.Parameter]:
    """Rank-concatenated A (sum of r, d_in) and B (d_out, sum of r) with scaling and weight folded into B."""
    with torch.no_grad():
        A = torch.cat([part.lora_A for part, _ in parts], dim=0)
        B = torch.cat([part.lora_B * (part.scaling * weight) for part, weight in parts], dim=1)
    return nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)


def _bring_in(model: nn.Module, state: Adapters, adapter: Adapter) -> None:
    """Puts the adapter's own modules and biases in the places of the base's."""
    for path, own in adapter.modules.items():
        state.base_modules[path] = model.get_submodule(path)
        _exchange(model, state.places[path], state.base_modules[path], own)
    # All are noted before any is replaced: one module may stand at several paths.
    state.base_biases.update({path: model.get_parameter(path) for path in adapter.biases})
    for path, bias in adapter.biases.items():
        _set_bias(model, path, bias)


def _restore_base(model: nn.Module, state: Adapters) -> None:
    """Undoes `_bring_in`."""
    for path, bias in state.base_biases.items():
        _set_bias(model, path, bias)
    for path, base in state.base_modules.items():
        _exchange(model, state.places[path], model.get_submodule(path), base)
    state.base_biases.clear()
    state.base_modules.clear()


def _exchange(model: nn.Module, places: Sequence[str], leaving: nn.Module, coming: nn.Module) -> None:
    """Puts `coming`, of the same structure, where `leaving` is, on the same device and in the same mode."""
    tensors = dict(leaving.named_parameters()) | dict(leaving.named_buffers())
    for name, tensor in (dict(coming.named_parameters()) | dict(coming.named_buffers())).items():
        _follow(tensor, tensors[name])
    coming.train(leaving.training)
    place_module(model, places, coming)


def _set_bias(model: nn.Module, path: str, bias: nn.Parameter) -> None:
    """Puts `bias` at `path`, on the device and in the dtype of the one there."""
    owner, _, name = path.rpartition(".")
    _follow(bias, model.get_parameter(path))
    setattr(model.get_submodule(owner), name, bias)


def _follow(tensor: Tensor, leader: Tensor) -> None:
    tensor.data = tensor.data.to(leader.device, leader.dtype)


def place_module(model: nn.Module, places: Sequence[str], module: nn.Module) -> None:
    """Puts one instance at every path."""
    for path in places:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def is_plain(weights: Mapping[str, float]) -> bool:
    """True for one adapter at full weight (or none), which is held as it is and can train."""
    return len(weights) <= 1 and all(weight == 1.0 for weight in weights.values())
