"""Decoder layers that run as one autograd node each (`fused.block`) in the place of a model's own.

While rows run, a `FusedLayer` replaces each decoder layer. It shares all of the layer's children, so parameter paths
stay as they are. The adapters' float32 masters are cast into working copies once in each forward, and while they
train they drop the same elements as the modules would (`ops.dropout`). Frozen weights of projections that read the
same input share one matrix (`fused.stacking`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from loratune.fused import block
from loratune.fused.fit import RecipeFit
from loratune.fused.link import LayerLink
from loratune.fused.policy import ActivationPlan, Level
from loratune.fused.recipes import decoder_layers
from loratune.fused.stacking import Copies, dropout_of
from loratune.fused.structure import LayerStructure, Rotation, SavePolicy
from loratune.ops.attention import documents
from loratune.ops.attention.documents import AttentionOptions, RowBoundaries
from loratune.ops.dropout import random_row_key
from loratune.ops.host import HostOffload
from loratune.ops.state import ForwardState

_BOUNDARIES = RowBoundaries.__annotations__.keys()
_REFUSED = ("attention_mask", "past_key_values", "layer_past")
"""Keyword arguments of a layer that must be None."""


class FusedLayer(nn.Module):
    """Replaces a decoder layer, with the same children. Runs packed rows only, without a cache."""

    structure: LayerStructure
    policy: SavePolicy
    _attention: nn.Module
    _options: AttentionOptions
    _dropping: list[nn.Module]
    """Linear layers whose adapters have dropout."""
    _masters: tuple[list[Tensor], list[Tensor]]
    _state: ForwardState

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        fit: RecipeFit,
        copies: Copies,
        policy: SavePolicy,
        below: LayerLink,
        state: ForwardState,
    ) -> FusedLayer:
        """The replacement of `base`, a decoder layer of the model that `fit` describes.

        Args:
            copies: receives the working copies of the adapters.
            below: link to the layer below.
            state: state of the forward that runs this layer.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        layer.structure, layer._masters = fit.structure(base, copies, below), fit.masters(base)
        # Positions in a bank's segments count from the start of the row, so its MLP runs in one tile.
        layer.policy = policy if copies.pool is None else replace(policy, tile=sys.maxsize)
        layer._state = state
        vars(layer)["_attention"] = base.get_submodule(fit.recipe.attention)  # not a second child
        layer._options = fit.attention[layer._attention]
        layer._dropping = [m for path in fit.recipe.linears if dropout_of(m := base.get_submodule(path))]
        return layer

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: object,
    ) -> Tensor:
        """(1, T, d) -> (1, T, d)."""
        if any(value is not None for value in (*args, *map(kwargs.get, _REFUSED))):
            raise NotImplementedError("fused layers run packed rows, without a mask and without a cache")
        rotation = None
        if position_embeddings is not None:
            rotation = Rotation(*(table.reshape(-1, table.shape[-1]) for table in position_embeddings))
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        boundaries = cast(RowBoundaries, {name: kwargs[name] for name in _BOUNDARIES if name in kwargs})
        tokens = rows.shape[0]  # `attend` lives until the backward, and must not hold `rows`

        def attend(*heads: Tensor) -> Tensor:
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in heads)
            attended, _ = documents.document_attention(
                self._attention, query, key, value, None, **self._options, **boundaries
            )
            return attended.reshape(tokens, -1)

        structure = self.structure
        if any(module.training for module in self._dropping):
            row = self._state.dropout_row
            structure = structure.with_dropout(random_row_key(rows.device) if row is None else row)
        out = block.decoder_layer(rows, rotation, structure, attend, self.policy, self._masters)
        return out.view_as(hidden_states)


@contextmanager
def installed(
    model: PreTrainedModel, fit: RecipeFit, plan: ActivationPlan | None, state: ForwardState
) -> Iterator[Copies]:
    """Replaces the decoder layers of a model by `FusedLayer`s, and puts them back on exit.

    Args:
        fit: a recipe of this model, with `RecipeFit.attention` filled in and no reason against it.
        plan: activations that each layer saves for its backward; None saves all.
        state: state of the forward that runs the layers.
    """
    layers = decoder_layers(model)
    originals = list(layers)
    plan = plan or ActivationPlan.uniform(Level.NONE, len(originals))
    copies, host, below = Copies(state=state, hold_transposed=plan.hold_transposed), HostOffload(), LayerLink()
    try:
        for index, (base, level) in enumerate(zip(originals, plan.levels, strict=True)):
            policy = SavePolicy(level, plan.tile, index, host)
            layer = layers[index] = FusedLayer.from_base(base, fit, copies, policy, below, state)
            below = layer.structure.above
        del layer  # frees its matrices before `copies.end` separates the weights
        yield copies
    finally:
        for index, base in enumerate(originals):
            layers[index] = base
        copies.end()
