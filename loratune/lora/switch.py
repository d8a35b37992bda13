"""Switches adapters by re-pointing the tensors that the model computes with; `inject` makes all checks before.

A replaced layer gets the tensors of the adapter in use. A module trained in full, or a bias, replaces its counterpart
in the base, which is kept outside of the model. A tensor that enters the model takes the device and dtype of the
tensor that it replaces, because the model may have been moved in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.lora.layer import PLAIN
from loratune.lora.state import Adapter, Adapters, LayerWeights, SwitchEntry
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
        for name in weights:
            _bring_in(model, state, state.adapters[name])
    state.active = dict(weights)


def _point(state: Adapters, name: str | None) -> None:
    """Gives every layer the tensors of one adapter, or none.

    There are hundreds of layers, and a switch may come before every answer, so this writes to the layers' dicts:
    `nn.Module.__setattr__` would take ten times as long to find out that a Parameter is a Parameter.
    """
    adapter = None if name is None else state.adapters[name]
    follows = adapter is not None and not adapter.stored
    for layer, weights, tensors, attributes in state.switches.get(name) or _entries(state, name):
        parameters = layer._parameters
        if follows and weights is not None:
            weight = parameters.get(layer.weight_name)
            leader = frozen_of(layer) if weight is None else weight
            if not weights.fits(leader):
                weights.follow(leader)
        parameters.update(tensors)
        layer.__dict__.update(attributes)


def _entries(state: Adapters, name: str | None) -> list[SwitchEntry]:
    """Looks up the values that each layer takes from adapter `name`."""
    adapter = Adapter(LoraConfig()) if name is None else state.adapters[name]
    entries = state.switches[name] = []
    for path, layer in state.layers.items():
        weights = adapter.layers.get(path)
        tensors: dict[str, nn.Parameter | None] = dict.fromkeys(layer.tensor_names())
        attributes: dict[str, object] = {"variant": PLAIN, "scaling": 0.0, "lora_dropout": 0.0}
        if weights is not None:
            tensors.update(weights.tensors)
            attributes = {"variant": weights.variant, "scaling": weights.scaling}
            attributes["lora_dropout"] = adapter.config.lora_dropout
        entries.append((layer, weights, tensors, attributes))
    return entries


def _point_to_sum(state: Adapters, weights: Mapping[str, float]) -> None:
    """Gives every layer the rank-concatenated A and B of several adapters."""
    chosen = [(state.adapters[name], weight) for name, weight in weights.items()]
    for path, layer in state.layers.items():
        here = [(adapter, adapter.layers[path], weight) for adapter, weight in chosen if path in adapter.layers]
        for adapter, part, _ in here:
            if not adapter.stored:
                part.follow(frozen_of(layer))
        if here:
            layer.hold(*_summed([(part, weight) for _, part, weight in here]), 1.0, 0.0)
        else:
            layer.release()


def _summed(parts: list[tuple[LayerWeights, float]]) -> tuple[nn.Parameter, nn.Parameter]:
    """Rank-concatenated A (sum of r, d_in) and B (d_out, sum of r) with scaling and weight folded into B.

    In a convolution with groups B is (d_out, sum of r / groups), and the ranks of each group stay together.
    """
    first = parts[0][0]
    groups = first.r // first.lora_B.shape[1]
    with torch.no_grad():
        A = torch.cat([part.lora_A.unflatten(0, (groups, -1)) for part, _ in parts], dim=1).flatten(0, 1)
        B = torch.cat([part.lora_B * (part.scaling * weight) for part, weight in parts], dim=1)
    return nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)


def _bring_in(model: nn.Module, state: Adapters, adapter: Adapter) -> None:
    """Replaces modules and biases of the base by the adapter's own."""
    for path, own in adapter.modules.items():
        state.base_modules[path] = model.get_submodule(path)
        _exchange(model, state.paths[path], state.base_modules[path], own)
    # All are noted before any is replaced: one module may have several paths.
    state.base_biases.update({path: model.get_parameter(path) for path in adapter.biases})
    for path, bias in adapter.biases.items():
        _set_bias(model, path, bias)


def _restore_base(model: nn.Module, state: Adapters) -> None:
    """Undoes `_bring_in`."""
    for path, bias in state.base_biases.items():
        _set_bias(model, path, bias)
    for path, base in state.base_modules.items():
        _exchange(model, state.paths[path], model.get_submodule(path), base)
    state.base_biases.clear()
    state.base_modules.clear()


def _exchange(model: nn.Module, paths: Sequence[str], outgoing: nn.Module, incoming: nn.Module) -> None:
    """Replaces `outgoing` by `incoming`, which has the same structure, on the same device and in the same mode."""
    tensors = dict(outgoing.named_parameters()) | dict(outgoing.named_buffers())
    for name, tensor in (dict(incoming.named_parameters()) | dict(incoming.named_buffers())).items():
        _follow(tensor, tensors[name])
    incoming.train(outgoing.training)
    set_module(model, paths, incoming)


def _set_bias(model: nn.Module, path: str, bias: nn.Parameter) -> None:
    """Puts `bias` at `path`, on the device and in the dtype of the one there."""
    owner, _, name = path.rpartition(".")
    _follow(bias, model.get_parameter(path))
    setattr(model.get_submodule(owner), name, bias)


def _follow(tensor: Tensor, leader: Tensor) -> None:
    tensor.data = tensor.data.to(leader.device, leader.dtype)


def set_module(model: nn.Module, paths: Sequence[str], module: nn.Module) -> None:
    """Puts one instance at every path."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def is_plain(weights: Mapping[str, float]) -> bool:
    """True for one adapter at full weight (or none): its own tensors are in use and can train."""
    return len(weights) <= 1 and all(weight == 1.0 for weight in weights.values())
