"""Builds a new adapter without changing the model: initial weights, copies of modules_to_save and of biases.

Everything that can fail fails here, before the model is touched. Initial values come from a generator of their own,
seeded by the caller and drawn in the order of the model's modules. So attaching is reproducible on any device and
does not touch torch's global generator.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.layer import LoraLayer
from loratune.lora.paths import ModulePaths
from loratune.lora.select import Selection
from loratune.lora.state import Adapter, LayerWeights, identity, master_dtype
from loratune.lora.target import Target
from loratune.precision.linear import frozen_of


def build(
    model: nn.Module,
    config: LoraConfig,
    selection: Selection,
    seed: int | None,
    device: torch.device | None = None,
) -> Adapter:
    """An adapter for `model`, whose bare base must be in use. Changes nothing.

    Args:
        seed: seed of the initial values; None leaves the layers' tensors uninitialised, for a reader that fills them.
        device: device of the layers' tensors; by default the device of each layer.

    Raises: AdapterError: there is no bias to train; two modules of modules_to_save share memory.
    """
    adapter = Adapter(copy.deepcopy(config))
    adapter.modules = _copies(selection.saved)
    adapter.biases = _biases(model, config, selection)
    if seed is not None and config.bias != "none" and not adapter.biases:
        raise AdapterError(
            f'bias "{config.bias}": {type(model).__name__} has no bias to train there; set it to "none"'
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for target in selection.targets:
        adapter.layers[target.path] = _weights(target, config, generator, device)
    return adapter


def _weights(
    target: Target, config: LoraConfig, generator: torch.Generator | None, device: torch.device | None
) -> LayerWeights:
    weight = frozen_of(target.base)
    dtype = master_dtype(weight)
    tensors = {name: torch.empty(spec.shape, dtype=dtype, device="cpu") for name, spec in target.tensors().items()}
    if generator is not None:
        target.variant.initialise(tensors, target.base, target.kind, config, target.scaling, generator)
    parameters = {name: nn.Parameter(tensor.to(device or weight.device)) for name, tensor in tensors.items()}
    return LayerWeights(target.kind, target.variant, parameters, target.scaling, target.shapes_in_files())


def _copies(saved: tuple[ModulePaths, ...]) -> dict[str, nn.Module]:
    """Trainable copies of the modules; modules that are tied to each other stay tied."""
    _check_memory(saved)
    memo: dict[int, object] = {}
    copies = {entry.paths[0]: _with_base_layers(copy.deepcopy(entry.module, memo)) for entry in saved}
    for module in copies.values():
        module.requires_grad_(True)
    return copies


def _with_base_layers(module: nn.Module) -> nn.Module:
    """`module` with its own base layers, where other adapters have replaced them."""
    if isinstance(module, LoraLayer):
        return module.to_base()
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, LoraLayer):
            module.set_submodule(path, child.to_base())
    return module


def _check_memory(saved: tuple[ModulePaths, ...]) -> None:
    """Raises AdapterError if two Parameters of `saved` are views of one memory: their copies would not be."""
    parameters = [p for entry in saved for p in entry.module.parameters()]
    if len({identity(p) for p in parameters}) < len({id(p) for p in parameters}):
        raise AdapterError("modules_to_save: two parameters share their memory without being the same Parameter")


def _biases(model: nn.Module, config: LoraConfig, selection: Selection) -> dict[str, nn.Parameter]:
    """Trainable copies of the biases that `config.bias` names, tied where the base's biases are."""
    if config.bias == "none":
        return {}
    adapted = {path for target in selection.targets for path in target.paths}
    saved = tuple(path for entry in selection.saved for path in entry.paths)
    copies: dict[int, nn.Parameter] = {}
    biases: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, name = path.rpartition(".")
        if name != "bias" or (config.bias == "lora_only" and owner not in adapted):
            continue
        if any(owner == root or owner.startswith(root + ".") for root in saved):
            continue
        biases[path] = copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
    return biases
