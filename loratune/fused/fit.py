"""A recipe applied to a model: formulas of its norms and activations, and the structure of each layer.

Formulas are found once (`recipe_fits`). Adapters, hooks and training modes change between runs, so `why_not` checks
them each time before fused layers replace modules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.fused.formulas import NormForm, activation_kind, is_hooked, norm_form
from loratune.fused.link import LayerLink, ResidualBranch
from loratune.fused.recipes import LayerRecipe, decoder_layers, recipes_for
from loratune.fused.stacking import (
    Copies,
    adapter_of,
    can_stack,
    dropout_of,
    masters_of,
    mlp_of,
    of_one_form,
    projection_of,
)
from loratune.fused.structure import AttentionHalf, LayerStructure, MlpActivation, MlpHalf
from loratune.lora.contract import fusion_of
from loratune.ops.attention.documents import AttentionOptions
from loratune.ops.layer import IDENTITY, ActivationKind, HeadSpec, NormSpec
from loratune.precision.linear import frozen_of

F = TypeVar("F")


@dataclass
class RecipeFit:
    """A recipe that fits a model, with the formulas of the model's norms and activations."""

    recipe: LayerRecipe
    norms: Mapping[nn.Module, NormForm]
    activations: Mapping[nn.Module, ActivationKind]
    attention: dict[nn.Module, AttentionOptions] = field(default_factory=dict)
    """Attention layer -> arguments that it passes to the attention function."""

    def why_not(self, model: PreTrainedModel) -> str | None:
        """Reason why the model's layers cannot be replaced now; None if they can."""
        reasons = (self._why_not(layer) for layer in decoder_layers(model))
        return next((reason for reason in reasons if reason is not None), None)

    def attention_layers(self, model: PreTrainedModel) -> set[nn.Module]:
        """Attention layers of the decoder layers."""
        return {layer.get_submodule(self.recipe.attention) for layer in decoder_layers(model)}

    def structure(self, layer: nn.Module, copies: Copies, below: LayerLink) -> LayerStructure:
        """The structure of one decoder layer; `copies` receives the working copies of its adapters."""
        recipe, get = self.recipe, layer.get_submodule
        heads = [get(path) for path in recipe.query_key_value]
        scale = float(_attribute(layer, recipe.residual_multiplier, 1.0))
        attention = AttentionHalf(
            projection_of(heads, copies),
            projection_of([get(recipe.output)], copies),
            self.head_spec(layer),
            self._norm(layer, recipe.attention_norm),
            ResidualBranch(self._norm(layer, recipe.attention_post_norm), scale),
        )
        mlp = self._mlp(layer, copies, scale)
        below.reader = attention.reader
        parallel = recipe.parallel is not None and bool(_attribute(layer, recipe.parallel, False))
        return LayerStructure(attention, mlp, parallel, below, LayerLink(mlp.gradient_format))

    def masters(self, layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Masters of the adapters of query, key and value, and of all later projections."""
        recipe, get = self.recipe, layer.get_submodule
        later = ([recipe.output], recipe.up, [recipe.down])
        return (
            masters_of([get(path) for path in recipe.query_key_value]),
            [master for paths in later for master in masters_of([get(path) for path in paths])],
        )

    def head_spec(self, layer: nn.Module) -> HeadSpec:
        """Division of the query, key and value columns into heads. `rotary_dim` is the whole head here."""
        recipe, get = self.recipe, layer.get_submodule
        dim = _attribute(layer, recipe.head_dim, 0)
        columns = sum(frozen_of(get(path)).shape[0] for path in recipe.query_key_value)
        query = frozen_of(get(recipe.output)).shape[1] // dim
        spec = HeadSpec(
            query, (columns // dim - query) // 2, dim, dim, interleaved=recipe.interleaved, grouped=recipe.grouped
        )
        if recipe.head_norms is None:
            return spec
        modules = [get(path) for path in recipe.head_norms]
        weights = [module.get_parameter("weight").detach() for module in modules]
        whole = weights[0].numel() != dim
        counts = spec.query, spec.key_value
        table = torch.cat([w.view(-1, dim).expand(count, dim) for w, count in zip(weights, counts, strict=True)])
        return replace(spec, norm=self.norms[modules[0]].spec(table), whole_width=whole)

    def _mlp(self, layer: nn.Module, copies: Copies, scale: float) -> MlpHalf:
        recipe, get = self.recipe, layer.get_submodule
        first, second = [get(path) for path in recipe.up], get(recipe.down)
        gated = sum(frozen_of(module).shape[0] for module in first) != frozen_of(second).shape[1]
        activation = MlpActivation(self.activations[get(recipe.activation)], gated)
        up, link, down = mlp_of(first, activation, [second], copies)
        branch = ResidualBranch(self._norm(layer, recipe.mlp_post_norm), scale)
        return MlpHalf(up, down, link, self._norm(layer, recipe.mlp_norm), branch)

    def _norm(self, layer: nn.Module, path: str | None) -> NormSpec:
        if path is None:
            return IDENTITY
        module = layer.get_submodule(path)
        bias = module._parameters.get("bias")
        weight = module.get_parameter("weight").detach()
        return self.norms[module].spec(weight, None if bias is None else bias.detach())

    def _why_not(self, layer: nn.Module) -> str | None:
        recipe = self.recipe
        if not recipe.fits(layer):
            return "its children have changed"
        linears = [layer.get_submodule(path) for path in recipe.linears]
        for path, module in zip(recipe.linears, linears, strict=True):
            fusion = fusion_of(module)
            if isinstance(fusion, str):
                return f"{path}: {fusion}"
            if not can_stack(module):
                return f"{path}: the weight cannot be stacked"
        if len({dropout_of(module) for module in linears if adapter_of(module) is not None}) > 1:
            return "its adapters differ in dropout"
        if not of_one_form(linears):
            return "its weights differ in precision"
        for path, module in layer.named_modules():
            if path and is_hooked(module):
                return f"{path} has a hook"
            if isinstance(module, nn.Dropout) and module.training and module.p > 0.0:
                return f"{path} drops activations of the base model"
        adapters = {id(tensor) for tensor in masters_of(linears)}
        if any(p.requires_grad for p in layer.parameters() if id(p) not in adapters):
            return "parameters other than adapters train"
        return None


def recipe_fits(model: PreTrainedModel) -> Iterator[RecipeFit]:
    """Recipes that fit all decoder layers and whose norms and activations have known formulas."""
    layers = decoder_layers(model)
    for recipe in recipes_for(model):
        norms = _found(norm_form, (layer.get_submodule(path) for layer in layers for path in recipe.norms))
        kinds: dict[nn.Module, ActivationKind] | None = _found(
            activation_kind, (layer.get_submodule(recipe.activation) for layer in layers)
        )
        if norms is None or kinds is None or not all(_is_sound(layer, recipe, norms) for layer in layers):
            continue
        yield RecipeFit(recipe, norms, kinds)


def fusible(model: PreTrainedModel) -> bool:
    """True if the decoder layers fit a recipe and may be replaced now. Nothing is run."""
    return any(fit.why_not(model) is None for fit in recipe_fits(model))


def _found(find: Callable[[nn.Module], F | None], modules: Iterator[nn.Module]) -> dict[nn.Module, F] | None:
    found: dict[nn.Module, F] = {}
    for module in modules:
        formula = find(module)
        if formula is None:
            return None
        found[module] = formula
    return found


def _is_sound(layer: nn.Module, recipe: LayerRecipe, norms: Mapping[nn.Module, NormForm]) -> bool:
    """True if the layer's attributes and norms suit the recipe."""
    if not isinstance(_attribute(layer, recipe.head_dim, None), int):
        return False
    if not isinstance(_attribute(layer, recipe.residual_multiplier, 1.0), float | int):
        return False
    of_heads = {norms[layer.get_submodule(path)] for path in recipe.head_norms or ()}
    if len(of_heads) > 1 or any(form.kind != "rms" for form in of_heads):
        return False
    parallel = recipe.parallel is not None and _attribute(layer, recipe.parallel, False)
    return not parallel or (recipe.attention_post_norm is None and recipe.mlp_post_norm is None)


def _attribute(layer: nn.Module, path: str | None, default: F) -> F:
    """The attribute at a dotted path, or the default if there is none."""
    if path is None:
        return default
    try:
        found: F = operator.attrgetter(path)(layer)
    except AttributeError:
        return default
    return found
