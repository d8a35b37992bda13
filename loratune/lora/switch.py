"""Re-pointing: which adapter's tensors the model computes with. The mechanism below `inject`, without its checks.

A layer that stands in is handed the A and B of the adapter in use. A module trained in full, or a bias, changes
places with the base's. What comes in follows what leaves to its device and dtype, so that a model may be moved while
some of its tensors rest outside of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loratune.lora.state import Adapter, Adapters, LayerWeights


def switch(model: nn.Module, state: Adapters, weights: dict[str, float]) -> None:
    """Makes the model compute with the weighted sum of the named adapters; no checks."""
    _restore_base(model, state)
    chosen = [(state.adapters[name], weight) for name, weight in weights.items()]
    for path, layer in state.layers.items():
        parts = [(a.layers[path], a.config, weight) for a, weight in chosen if path in a.layers]
        for part, _, _ in parts:
            part.follow(layer.weight)
        if not parts:
            layer.release()
        elif is_plain(weights):
            part, config, _ = parts[0]
            layer.hold(part.lora_A, part.lora_B, part.scaling, config.lora_dropout)
        else:
            layer.hold(*_summed([(part, weight) for part, _, weight in parts]), 1.0, 0.0)
    if chosen and is_plain(weights):
        _bring_in(model, state, chosen[0][0])
    state.active = dict(weights)


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
