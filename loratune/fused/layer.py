"""Decoder layers that run as one autograd node each (`fused.block`), recognised by what they are made of, not by
name.

A layer qualifies if it has the parts of a Llama layer and nothing else: two norms with a weight, query, key, value
and output projections with or without a norm of each head, gate and up projections, SiLU, down. Llama, Mistral,
Qwen 2 and 3 and many others are built so. Whether the parts are also *used* so is measured: `base.forward.prepare`
takes the fused layers only if they reproduce the model's own hidden states.

While rows run, each such layer is stood in for by a `FusedLayer` that shares all of its children, so parameter paths
stay what they are. The adapters' float32 masters are cast once a forward into working copies, and while they train
they drop what the modules would (`ops.dropout`).
The frozen weights of projections that read the same input are laid side by side in memory (`precision.dense`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from loratune.base import one_pass
from loratune.fused import block
from loratune.fused.activation import SwiGlu
from loratune.fused.policy import ActivationPlan, Level
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
from loratune.ops.attention import documents as attention
from loratune.ops.dropout import random_row_key
from loratune.ops.host import HostOffload
from loratune.ops.state import ForwardState

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_OPTIONS = ("scaling", "sliding_window", "softcap", "s_aux")
Options = dict[nn.Module, dict[str, Any]]
"""Attention layer -> keyword arguments of `ops.attention.documents.document_attention`."""
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FusedLayer(nn.Module):
    """Stands in for a decoder layer, with the same children; runs packed rows only, without a cache."""

    before: block.Before
    behind: block.Behind
    keep: block.Keep

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        copies: Copies,
        options: Options,
        keep: block.Keep,
        below: block.Passage,
        state: ForwardState,
    ) -> FusedLayer:
        """The stand-in for `base`, which must pass `fusible`.

        Args:
            copies: takes up the working copies of the adapters.
            options: see `attention_options`.
            below: the way to the layer below.
            state: state of the forward that runs this layer.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        attn, mlp = _child(base, "self_attn"), _child(base, "mlp")
        first, second = _child(base, "input_layernorm"), _child(base, "post_attention_layernorm")
        into = [_linear(attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        dim = int(attn.head_dim)  # type: ignore[arg-type]
        heads = block.Heads(
            into[0].out_features // dim, into[1].out_features // dim, dim, *_head_norm(attn, dim, into)
        )
        layer.before = block.Before(projection_of(into, copies), _weight(first), _eps(first), heads, below)
        below.above = layer.before.above
        gate_up, activation, down = mlp_of(
            [_linear(mlp, "gate_proj"), _linear(mlp, "up_proj")], SwiGlu(), [_linear(mlp, "down_proj")], copies
        )
        layer.behind = block.Behind(
            projection_of([_linear(attn, "o_proj")], copies),
            gate_up,
            activation,
            down,
            _weight(second),
            _eps(second),
            block.Passage(down.pad_columns, down.measure_dy),
        )
        layer._options, layer.keep, layer._state = options[attn], keep, state
        layer._dropped = [module for part in (attn, mlp) for module in part.children() if dropout_of(module)]
        if copies.pool is not None:  # the segments of a bank count from the start of the row
            layer.keep = replace(keep, tile=sys.maxsize)
        layer._masters = (
            masters_of(into),
            masters_of([_linear(attn, "o_proj")])
            + masters_of([_linear(mlp, "gate_proj"), _linear(mlp, "up_proj")])
            + masters_of([_linear(mlp, "down_proj")]),
        )
        return layer

    _dropped: list[nn.Module]
    """Those of its linear layers whose adapters have dropout."""
    _masters: tuple[list[Tensor], list[Tensor]]
    _options: dict[str, Any]
    _state: ForwardState

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: object = None,
        **kwargs: Any,
    ) -> Tensor:
        """(1, T, d) -> (1, T, d)."""
        if past_key_values is not None or position_embeddings is None:
            raise NotImplementedError("fused layers run packed rows, without a cache and with rotary positions")
        cos, sin = (table.reshape(-1, table.shape[-1]) for table in position_embeddings)
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        borders = {k: v for k, v in kwargs.items() if k in ("cu_seq_lens_q", "max_length_q", "spans", "contained")}
        tokens = rows.shape[0]  # and not `rows` below: what `attend` closes over lives until the backward

        def attend(*heads: Tensor) -> Tensor:
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in heads)
            attended, _ = attention.document_attention(
                cast(nn.Module, self.self_attn), query, key, value, attention_mask, **self._options, **borders
            )
            return attended.reshape(tokens, -1)

        before, behind = self.before, self.behind
        if any(module.training for module in self._dropped):
            row = self._state.dropout_row
            row = random_row_key(rows.device) if row is None else row
            before, behind = before.dropping(row), behind.dropping(row)
        out = block.decoder_layer(rows, cos, sin, before, behind, attend, self.keep, self._masters)
        return out.view_as(hidden_states)


def fusible(model: PreTrainedModel) -> bool:
    """True if every decoder layer is made of the parts of a Llama layer, and its adapters are plain LoRA."""
    layers = _layers(model)
    return layers is not None and all(_fusible(layer) for layer in layers)


def attention_options(model: PreTrainedModel, run: Callable[[], object]) -> Options:
    """What each attention layer asks of the attention function (scaling, window, ...), by listening while `run` runs.

    Reading it off attributes would be a guess: a window, stands in the layer here, in its configuration there.
    """
    heard: Options = {}

    def listening(module: nn.Module, *tensors: Tensor, **asked: Any) -> tuple[Tensor, None]:
        heard[module] = {name: asked[name] for name in _OPTIONS if name in asked}
        return attention.document_attention(module, *tensors, **asked)

    name, before = attention.IMPLEMENTATION + "_listening", model.config._attn_implementation
    AttentionInterface.register(name, listening)
    model.set_attn_implementation(name)
    try:
        run()
    finally:
        model.set_attn_implementation(before)
    return heard


@contextmanager
def installed(
    model: PreTrainedModel, options: Options, plan: ActivationPlan | None = None, state: ForwardState | None = None
) -> Iterator[Copies]:
    """Puts `FusedLayer`s in the place of the decoder layers of a `fusible` model, and the layers back on exit.

    The norm behind the last layer runs in one pass, unless it trains. `plan` says what each layer keeps for its
    backward; None keeps everything.
    """
    layers, state = _layers(model), state or ForwardState()
    assert layers is not None
    before = list(layers)
    plan = plan or ActivationPlan.uniform(Level.NONE, len(before))
    copies, host = Copies(both_ways=plan.both_ways), HostOffload()
    below = block.Passage(0)
    decoder = model.get_decoder()
    norm = getattr(decoder, "norm", None)
    try:
        for index, (base, level) in enumerate(zip(before, plan.levels, strict=True)):
            keep = block.Keep(level, plan.tile, index, host)
            layer = layers[index] = FusedLayer.from_base(base, copies, options, keep, below, state)
            below = layer.behind.up
        del layer  # or its matrices would live on beside the weights that `copies.end` separates from them
        if isinstance(norm, nn.Module):
            decoder.norm = one_pass.stand_in(norm) or norm
        yield copies
    finally:
        if norm is not None:
            decoder.norm = norm
        for index, base in enumerate(before):
            layers[index] = base
        copies.end()


def _layers(model: PreTrainedModel) -> nn.ModuleList | None:
    layers = getattr(model.get_decoder(), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


def _fusible(layer: nn.Module) -> bool:
    if {name for name, _ in layer.named_children()} != _LAYER:
        return False
    attn, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
    if {name for name, _ in attn.named_children()} not in (_ATTENTION, _ATTENTION | {"q_norm", "k_norm"}):
        return False
    if {name for name, _ in mlp.named_children()} != _MLP or type(mlp.act_fn).__name__ not in (
        "SiLU",
        "SiLUActivation",
    ):
        return False
    linears = [*(getattr(attn, name) for name in _ATTENTION), mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [
        layer.input_layernorm,
        layer.post_attention_layernorm,
        *(getattr(attn, n, None) for n in ("q_norm", "k_norm")),
    ]
    return (
        all(can_stack(module) for module in linears)
        and len({dropout_of(module) for module in linears if adapter_of(module) is not None}) <= 1
        and of_one_form(linears)
        and all(n is None or (isinstance(getattr(n, "weight", None), Tensor) and _eps(n) > 0) for n in norms)
        and isinstance(getattr(attn, "head_dim", None), int)
        and not _trains_more(layer, linears)
    )


def _trains_more(layer: nn.Module, linears: Sequence[nn.Linear]) -> bool:
    """True if parameters train that belong to no adapter of the fused linear layers."""
    adapters = {id(tensor) for tensor in masters_of(linears)}
    return any(p.requires_grad for p in layer.parameters() if id(p) not in adapters)


def _head_norm(attn: nn.Module, dim: int, into: Sequence[nn.Linear]) -> tuple[Tensor | None, float]:
    """The weights of the norms of query and key heads, (heads, head_dim), and their epsilon."""
    if not hasattr(attn, "q_norm"):
        return None, 0.0
    tables = [
        _weight(_child(attn, name)).expand(member.out_features // dim, dim)
        for name, member in zip(("q_norm", "k_norm"), into[:2], strict=True)
    ]
    return torch.cat(tables), _eps(_child(attn, "q_norm"))


def _child(module: nn.Module, name: str) -> nn.Module:
    return cast(nn.Module, getattr(module, name))


def _linear(module: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, getattr(module, name))


def _weight(norm: nn.Module) -> Tensor:
    return cast(Tensor, norm.weight).detach()


def _eps(norm: object) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)
