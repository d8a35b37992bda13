"""Sizes of a model and its adapter that memory and speed depend on, read from a model with or without data.

A model on PyTorch's meta device has all modules and shapes but no weights. So the same code estimates a model that
was never downloaded and a model that is about to train.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loratune.base.model_config import layer_configs
from loratune.fused.fit import RecipeFit
from loratune.fused.recipes import decoder_layers
from loratune.lora.contract import adapter_tensors_of
from loratune.memory.ledger import LayerLedger
from loratune.ops.meter import rounded
from loratune.precision.contract import format_of, weight_format
from loratune.precision.linear import QuantisedLinear, formats_in
from loratune.tables import PRECISIONS

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")
"""Names of the number of experts per token in configurations."""
LayerCopy = Callable[[str, nn.Module], nn.Module]
"""Path and decoder layer -> the layer on the meta device, with its adapters, in the precision that will train."""


@dataclass(frozen=True)
class ModelSurvey:
    """A model and the adapter that will train on it."""

    base_bytes: int
    """Bytes of the frozen weights, in their precision."""
    trainable: int
    """Trained parameters; their masters are float32."""
    layer_trainable: int
    """Largest number of trained parameters in one layer."""
    layers: int
    ledgers: tuple[LayerLedger, ...]
    """One ledger for each decoder layer; layers of the same shape share one. Empty if layers run as modules."""
    layer_elements: int
    """Largest number of frozen elements that the products of one layer read."""
    width: int
    vocabulary: int
    rotary_dim: int
    element_bytes: int
    quantised: str
    """Precision of the base; "" for floating point."""
    active_elements: int = 0
    """Elements of all layers that one token is multiplied with."""
    active_columns: int = 0
    """Inputs and outputs of these products, per token."""
    embedding_bytes: int = 0
    """Bytes of the table of input embeddings; 0 if the head shares it."""

    def copies_bytes(self, *, hold_transposed: bool = False) -> int:
        """Bytes of the working copies of all fused layers, with transposed weights if these are held."""
        return sum(ledger.copies_bytes(hold_transposed=hold_transposed) for ledger in self.ledgers)


def survey(
    model: PreTrainedModel,
    trained: Mapping[nn.Module, int],
    trainable: int,
    *,
    precision: str = "auto",
    fit: RecipeFit | None = None,
    layer_copy: LayerCopy | None = None,
) -> ModelSurvey:
    """Reads a model on any device.

    Args:
        trained: adapted layer -> trained parameters.
        trainable: trained parameters of the model.
        precision: precision of the base in the run, as in `RunConfig`; "auto" for its present precision.
        fit: recipe of the fused decoder layers; None if they run as modules.
        layer_copy: by default `without_values`, for a model that already has its adapters and its precision.
    """
    layers = decoder_layers(model)
    quantised = precision if precision in PRECISIONS else next((form.name for form in formats_in(layers)), "")
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    weight = cast(Tensor, head.weight if isinstance(head, nn.Module) else model.get_input_embeddings().weight)
    per_token = _experts_per_token(config)
    active = [_active(module, per_token) for layer in layers for module in layer.modules()]
    return ModelSurvey(
        base_bytes=_base_bytes(model, layers, quantised),
        trainable=trainable,
        layer_trainable=max((sum(trained.get(m, 0) for m in layer.modules()) for layer in layers), default=0),
        layers=len(layers),
        ledgers=() if fit is None else _ledgers(model, layers, trained, fit, layer_copy or _with_values_dropped),
        layer_elements=max((sum(map(_elements, layer.modules())) for layer in layers), default=0),
        width=weight.shape[1],
        vocabulary=weight.shape[0],
        rotary_dim=_head_dim(config, weight.shape[1]),
        active_elements=sum(elements for elements, _ in active),
        active_columns=sum(columns for _, columns in active),
        element_bytes=model.dtype.itemsize,
        quantised=quantised,
        embedding_bytes=_own_table(model, head),
    )


def trained_in(model: nn.Module) -> dict[nn.Module, int]:
    """Adapted layer -> parameters of the active adapter."""
    return {
        m: sum(p.numel() for p in adapter_tensors_of(m).values()) for m in model.modules() if adapter_tensors_of(m)
    }


def without_values(layer: nn.Module) -> nn.Module:
    """A copy of a module on the meta device; makes no copy of a weight."""
    memo: dict[int, object] = {}
    for parameter in layer.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in layer.buffers()}
    made = copy.deepcopy(layer, memo)
    for module in made.modules():
        if isinstance(module, QuantisedLinear):
            frozen = module.frozen
            dense = torch.empty(frozen.shape, dtype=frozen.dtype, device="meta")
            module.frozen = format_of(frozen).quantise(dense)
    return made


def _with_values_dropped(_: str, layer: nn.Module) -> nn.Module:
    return without_values(layer)


def _ledgers(
    model: PreTrainedModel, layers: nn.ModuleList, trained: Mapping[nn.Module, int], fit: RecipeFit, make: LayerCopy
) -> tuple[LayerLedger, ...]:
    """One ledger for each layer; layers with the same shapes and adapters share one."""
    paths = {id(module): path for path, module in model.named_modules()}
    known: dict[object, LayerLedger] = {}

    def ledger(layer: nn.Module) -> LayerLedger:
        def source() -> tuple[nn.Module, RecipeFit]:
            made = make(paths[id(layer)], layer)
            return made, _refitted(fit, layer, made)

        return LayerLedger(source)

    return tuple(known.setdefault(_shapes(layer, trained), ledger(layer)) for layer in layers)


def _shapes(layer: nn.Module, trained: Mapping[nn.Module, int]) -> object:
    """Key of a layer: layers with equal keys take the same memory."""
    found = []
    for path, module in layer.named_modules():
        tensors = tuple((name, tensor.shape) for name, tensor in module.named_parameters(recurse=False))
        frozen = module.frozen.shape if isinstance(module, QuantisedLinear) else None
        found.append((path, tensors, frozen, trained.get(module, 0)))
    return tuple(found)


def _refitted(fit: RecipeFit, layer: nn.Module, made: nn.Module) -> RecipeFit:
    """The recipe of `layer` for a copy of it."""
    recipe, (old, new) = fit.recipe, (layer.get_submodule, made.get_submodule)
    return replace(
        fit,
        norms={new(path): fit.norms[old(path)] for path in recipe.norms},
        activations={new(recipe.activation): fit.activations[old(recipe.activation)]},
        attention={},
    )


def _head_dim(config: PreTrainedConfig, width: int) -> int:
    """Columns of the widest head; the width over the number of heads if the configuration names none."""
    found = [0]
    for layer in layer_configs(config):
        named, heads = getattr(layer, "head_dim", None), getattr(layer, "num_attention_heads", None)
        found.append(named if isinstance(named, int) else width // heads if isinstance(heads, int) and heads else 0)
    return max(found)


def _experts_per_token(config: PreTrainedConfig) -> int:
    """Experts that the router chooses for a token, the most of any layer; 1 if the configuration names no number."""
    values = [getattr(layer, key, None) for layer in layer_configs(config) for key in _CHOSEN]
    return max((value for value in values if isinstance(value, int)), default=1)


def _active(module: nn.Module, per_token: int) -> tuple[int, int]:
    """Elements of a module's weights that one token is multiplied with, and the columns of inputs and outputs.

    Of experts that are held in one tensor, `per_token` count.
    """
    if isinstance(module, QuantisedLinear):
        return module.in_features * module.out_features, module.in_features + module.out_features
    elements = columns = 0
    for name, tensor in module.named_parameters(recurse=False):
        if tensor.dim() == 3:
            chosen = min(tensor.shape[0], per_token)
            elements += chosen * tensor.shape[1] * tensor.shape[2]
            columns += chosen * (tensor.shape[1] + tensor.shape[2])
        elif tensor.dim() == 2 and name == "weight":
            elements, columns = elements + tensor.numel(), columns + sum(tensor.shape)
    return elements, columns


def _own_table(model: PreTrainedModel, head: nn.Module | None) -> int:
    table = cast(Tensor, model.get_input_embeddings().weight)
    shared = head is None or cast(Tensor, head.weight) is table
    return 0 if shared else rounded(table.numel() * table.element_size())


def _elements(module: nn.Module) -> int:
    """Elements of a linear layer's weight; 0 for other modules."""
    if isinstance(module, QuantisedLinear):
        return module.in_features * module.out_features
    return sum(p.numel() for n, p in module.named_parameters(recurse=False) if n == "weight" and p.dim() == 2)


def _base_bytes(model: PreTrainedModel, layers: nn.ModuleList, quantised: str) -> int:
    """Bytes of all parameters and buffers, each counted once, in the precision of the run."""
    to_quantise = {
        id(m.weight) for layer in layers for m in layer.modules() if isinstance(m, nn.Linear | Conv1D) and quantised
    }
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            total += rounded(module.frozen.nbytes)
        adapter = adapter_tensors_of(module)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen or name in adapter:
                continue
            seen.add(id(tensor))
            if id(tensor) in to_quantise:
                total += rounded(weight_format(quantised).bytes_held(tensor.shape, tensor.element_size()))
            else:
                total += rounded(tensor.element_size() * tensor.numel())
    return total
