"""What a model is made of, as far as memory and speed go; read off a model in memory or one without any data.

A model on PyTorch's "meta" device has every module and every shape and not a byte of weights, so the estimate of a
model that was never downloaded and the one of a model about to train are made by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.fused.fit import RecipeFit, recipe_fits
from loratune.fused.ledger import LayerShape, rounded
from loratune.fused.recipes import decoder_layers
from loratune.lora.contract import adapter_tensors_of, rank_of
from loratune.precision.contract import weight_format
from loratune.precision.linear import QuantisedLinear, formats_in, frozen_of
from loratune.tables import PRECISIONS


@dataclass(frozen=True)
class ModelSurvey:
    """A model and the adapter that is to be trained on it."""

    base_bytes: int
    """The frozen weights, each as it is held."""
    trainable: int
    """Parameters that are trained; their masters are float32."""
    copies_bytes: int
    """The adapters once more in the compute dtype, stacked as the fused layers want them; 0 without fused layers."""
    layer_trainable: int
    """Parameters that are trained in one layer, at most."""
    layers: int
    shape: LayerShape | None
    """Of the widest layer, where layers run fused; None where they run as modules."""
    layer_elements: int
    """Elements of the frozen products of one layer."""
    width: int
    vocabulary: int
    rotary_dim: int
    element_bytes: int
    quantised: str
    """"", "nf4" or "fp8"."""
    embedding_bytes: int = 0
    """The table of input embeddings, if the head does not share it."""


def survey(
    model: PreTrainedModel,
    ranks: Mapping[nn.Module, int],
    trainable: int,
    precision: str,
    dtype: torch.dtype,
    *,
    on_gpu: bool,
) -> ModelSurvey:
    """Reads a model, on any device.

    Args:
        ranks: adapted layer -> rank.
        trainable: parameters that train.
        precision: of the base as it will be held, as in `RunConfig`; "auto" is as it is.
        dtype: of the products.
        on_gpu: fused layers are for GPUs.
    """
    layers = decoder_layers(model)
    quantised = precision if precision in PRECISIONS else _quantised(layers)
    on_half_gpu = on_gpu and dtype in (torch.bfloat16, torch.float16)
    fit = next((fit for fit in recipe_fits(model) if fit.why_not(model) is None), None) if on_half_gpu else None
    per_layer = [_trained_in(layer, ranks) for layer in layers]
    shapes = [] if fit is None else [_shape(layer, fit, ranks, quantised, dtype) for layer in layers]
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    weight = cast(Tensor, head.weight if isinstance(head, nn.Module) else model.get_input_embeddings().weight)
    return ModelSurvey(
        base_bytes=_base_bytes(model, layers, quantised),
        trainable=trainable,
        copies_bytes=sum(shape.adapter_bytes for shape in shapes),
        layer_trainable=max(per_layer, default=0),
        layers=len(layers),
        shape=max(shapes, key=lambda shape: sum(shape.ranks)) if shapes else None,
        layer_elements=max((sum(_elements(m) for m in layer.modules()) for layer in layers), default=0),
        width=weight.shape[1],
        vocabulary=weight.shape[0],
        rotary_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        element_bytes=dtype.itemsize,
        quantised=quantised,
        embedding_bytes=_own_table(model, head),
    )


def _own_table(model: PreTrainedModel, head: nn.Module | None) -> int:
    table = cast(Tensor, model.get_input_embeddings().weight)
    shared = head is None or cast(Tensor, head.weight) is table
    return 0 if shared else rounded(table.numel() * table.element_size())


def ranks_of(model: nn.Module) -> dict[nn.Module, int]:
    """Adapted layer -> rank, of the adapter in use."""
    return {module: rank for module in model.modules() if (rank := rank_of(module))}


def _quantised(layers: nn.ModuleList) -> str:
    return next((form.name for form in formats_in(layers)), "")


def _elements(module: nn.Module) -> int:
    """Of a linear layer's weight; 0 for other modules."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    return module.in_features * module.out_features if isinstance(module, QuantisedLinear) else 0


def _trained_in(layer: nn.Module, ranks: Mapping[nn.Module, int]) -> int:
    total = 0
    for module in layer.modules():
        if module in ranks and isinstance(module, nn.Linear | QuantisedLinear):
            total += ranks[module] * (module.in_features + module.out_features)
    return total


def _base_bytes(model: PreTrainedModel, layers: nn.ModuleList, quantised: str) -> int:
    """Every parameter and buffer once, as it is or will be quantised."""
    to_quantise = {
        id(m.weight) for layer in layers for m in layer.modules() if isinstance(m, nn.Linear) and quantised
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


def _shape(
    layer: nn.Module, fit: RecipeFit, ranks: Mapping[nn.Module, int], quantised: str, dtype: torch.dtype
) -> LayerShape:
    recipe, heads = fit.recipe, fit.head_spec(layer)
    projections = (recipe.query_key_value, (recipe.output,), recipe.up, (recipe.down,))
    of_each = [sum(ranks.get(layer.get_submodule(path), 0) for path in paths) for paths in projections]
    width, mlp = frozen_of(layer.get_submodule(recipe.down)).shape
    return LayerShape(
        width=width,
        query_heads=heads.query,
        key_value_heads=heads.key_value,
        head_dim=heads.dim,
        mlp=mlp,
        head_norm=heads.norm is not None,
        ranks=(of_each[0], of_each[1], of_each[2], of_each[3]),
        element_bytes=dtype.itemsize,
        bordered=not quantised,
        carried=quantised != "fp8",
        in_8_bits=quantised == "fp8",
        in_4_bits=quantised == "nf4",
    )
