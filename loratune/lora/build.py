"""A new adapter, made beside the model: initial weights, copies of modules_to_save and of biases.

Everything that can go wrong goes wrong here, before the model is touched. Initial values come from a generator of
their own, seeded by the caller and drawn in the order of the model's modules, so that attaching is reproducible on
any device and leaves torch's global generator alone.

Source of the initialisation: A Kaiming-uniform with a = √5, which is U(-1/√d_in, 1/√d_in), and B zero, as in the
reference implementation of arXiv:2106.09685; embeddings A zero and B normal.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.layers import LoraEmbedding
from loratune.lora.linear import LoraLayer
from loratune.lora.select import Place, Selection, Target
from loratune.lora.state import Adapter, LayerWeights, identity, master_dtype, ties
from loratune.precision.linear import frozen_of


def build(
    model: nn.Module,
    config: LoraConfig,
    selection: Selection,
    seed: int | None,
    device: torch.device | None = None,
) -> Adapter:
    """An adapter for `model`, whose base must be at rest (no adapter in use). Changes nothing.

    Args:
        seed: of the initial values; None leaves A and B uninitialised, for a reader that fills them.
        device: of A and B; by default that of each layer.

    Raises: AdapterError: a module of modules_to_save is tied to one that is not; there is no bias to train.
    """
    adapter = Adapter(copy.deepcopy(config))
    adapter.modules = _copies(model, selection.saved)
    adapter.biases = _biases(model, config, selection)
    if seed is not None and config.bias != "none" and not adapter.biases:
        raise AdapterError(
            f'bias "{config.bias}": {type(model).__name__} has no bias to train there; set it to "none"'
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for target in selection.targets:
        adapter.layers[target.path] = _weights(target, config.init_lora_weights, generator, device)
    return adapter


def _weights(
    target: Target, init: bool | str, generator: torch.Generator | None, device: torch.device | None
) -> LayerWeights:
    d_in, d_out = target.layer_class.features(target.base)
    weight = frozen_of(target.base)
    lora_A = torch.empty(target.r, d_in, dtype=master_dtype(weight))
    lora_B = torch.empty(d_out, target.r, dtype=master_dtype(weight))
    if generator is not None and issubclass(target.layer_class, LoraEmbedding):
        _fill_embedding(lora_A, lora_B, init, generator)
    elif generator is not None:
        _fill_linear(lora_A, lora_B, init, generator)
    A, B = (nn.Parameter(t.to(device or weight.device)) for t in (lora_A, lora_B))
    return LayerWeights(target.layer_class, A, B, target.scaling)


def _fill_linear(lora_A: Tensor, lora_B: Tensor, init: bool | str, generator: torch.Generator) -> None:
    r, d_in = lora_A.shape
    if init == "gaussian":
        lora_A.normal_(0.0, 1.0 / r, generator=generator)
    else:
        lora_A.uniform_(-1.0 / math.sqrt(d_in), 1.0 / math.sqrt(d_in), generator=generator)
    if init is False:
        lora_B.uniform_(-1.0 / math.sqrt(r), 1.0 / math.sqrt(r), generator=generator)
    else:
        lora_B.zero_()


def _fill_embedding(lora_A: Tensor, lora_B: Tensor, init: bool | str, generator: torch.Generator) -> None:
    lora_B.normal_(generator=generator)
    if init is False:
        lora_A.normal_(generator=generator)
    else:
        lora_A.zero_()


def _copies(model: nn.Module, saved: tuple[Place, ...]) -> dict[str, nn.Module]:
    """Trainable copies of the modules; those that are tied to each other stay tied."""
    _check_ties(model, saved)
    memo: dict[int, object] = {}
    copies = {place.paths[0]: _without_stand_ins(copy.deepcopy(place.module, memo)) for place in saved}
    for module in copies.values():
        module.requires_grad_(True)
    return copies


def _without_stand_ins(module: nn.Module) -> nn.Module:
    """`module` with the layers that other adapters have replaced in it put back."""
    if isinstance(module, LoraLayer):
        return module.to_base()
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, LoraLayer):
            module.set_submodule(path, child.to_base())
    return module


def _check_ties(model: nn.Module, saved: tuple[Place, ...]) -> None:
    """Raises AdapterError if a parameter of `saved` also belongs to a module outside of it."""
    inside = {p: "" for place in saved for path in place.paths for p in _paths_below(model, path)}
    parameters = [p for place in saved for p in place.module.parameters()]
    for where in ties(model, parameters).values():
        outside = [path for path in where if path not in inside]
        if outside:
            raise AdapterError(
                f'modules_to_save: "{next(p for p in where if p in inside)}" is tied to "{outside[0]}", which is not '
                "named; training one alone would break the tie. Name both modules, or neither"
            )
    if len({identity(p) for p in parameters}) < len({id(p) for p in parameters}):
        raise AdapterError("modules_to_save: two parameters share their memory without being the same Parameter")


def _paths_below(model: nn.Module, path: str) -> list[str]:
    module = model.get_submodule(path)
    return [f"{path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]


def _biases(model: nn.Module, config: LoraConfig, selection: Selection) -> dict[str, nn.Parameter]:
    """Trainable copies of the biases that `config.bias` names, tied where those of the base are."""
    if config.bias == "none":
        return {}
    adapted = {path for target in selection.targets for path in target.places}
    saved = tuple(path for place in selection.saved for path in place.paths)
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
