"""Decoder layers that run as one autograd node each (`ops.block`), recognised by what they are made of, not by name.

A layer qualifies if it has the parts of a Llama layer and nothing else: two norms with a weight, query, key, value
and output projections with or without a norm of each head, gate and up projections, SiLU, down. Llama, Mistral,
Qwen 2 and 3 and many others are built so. Whether the parts are also *used* so is measured: `base.forward.prepare`
takes the fused layers only if they reproduce the model's own hidden states.

While rows run, each such layer is stood in for by a `FusedLayer` that shares all of its children, so parameter paths
stay what they are. The adapters' float32 masters are cast once a forward into working copies.
The frozen weights of projections that read the same input are laid side by side in memory, once; the Parameters
become views of that, with the values that they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from loratune.ops import attention, block
from loratune.ops.frozen import Dense
from loratune.ops.host import Host
from loratune.ops.policy import Level, Plan
from loratune.ops.projection import Projection

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_OPTIONS = ("scaling", "sliding_window", "softcap", "s_aux")
Options = dict[nn.Module, dict[str, Any]]
"""Attention layer -> keyword arguments of `ops.attention.document_attention`."""
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass
class Copies:
    """The working copies of every adapter in fused layers."""

    masters: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    """Factor of each copy: 1 for A, the scaling for B."""
    _cast_all: Callable[[], None] | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the values that the masters have now: one launch on a GPU."""
        if not self.masters:
            return
        if self._cast_all is None and self.copies[0].is_cuda and self.copies[0].dtype != self.masters[0].dtype:
            from loratune.ops.kernels import CastAll  # imports Triton

            self._cast_all = CastAll(self.masters, self.copies, self.scales)
        if self._cast_all is not None:
            self._cast_all()
            return
        torch._foreach_copy_(self.copies, self.masters)
        torch._foreach_mul_(self.copies, self.scales)


class FusedLayer(nn.Module):
    """Stands in for a decoder layer, with the same children; runs packed rows only, without a cache."""

    before: block.Before
    behind: block.Behind
    keep: block.Keep

    @classmethod
    def from_base(cls, base: nn.Module, copies: Copies, options: Options, keep: block.Keep) -> FusedLayer:
        """The stand-in for `base`, which must pass `fusible`; `options` as in `attention_options`."""
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        attn, mlp = _child(base, "self_attn"), _child(base, "mlp")
        first, second = _child(base, "input_layernorm"), _child(base, "post_attention_layernorm")
        into = [_linear(attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        dim = int(attn.head_dim)  # type: ignore[arg-type]
        heads = block.Heads(
            into[0].out_features // dim, into[1].out_features // dim, dim, *_head_norm(attn, dim, into)
        )
        layer.before = block.Before(_projection(into, copies), _weight(first), _eps(first), heads)
        layer.behind = block.Behind(
            _projection([_linear(attn, "o_proj")], copies),
            _projection([_linear(mlp, "gate_proj"), _linear(mlp, "up_proj")], copies),
            _projection([_linear(mlp, "down_proj")], copies),
            _weight(second),
            _eps(second),
        )
        layer._options, layer.keep = options[attn], keep
        layer._masters = (
            _masters(into),
            _masters([_linear(attn, "o_proj"), *(_linear(mlp, n) for n in ("gate_proj", "up_proj", "down_proj"))]),
        )
        return layer

    _masters: tuple[list[Tensor], list[Tensor]]
    _options: dict[str, Any]

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
        borders = {k: v for k, v in kwargs.items() if k in ("cu_seq_lens_q", "max_length_q")}

        def attend(*heads: Tensor) -> Tensor:
            query, key, value = (tensor.transpose(0, 1)[None] for tensor in heads)
            attended, _ = attention.document_attention(
                cast(nn.Module, self.self_attn), query, key, value, attention_mask, **self._options, **borders
            )
            return attended.reshape(rows.shape[0], -1)

        out = block.decoder_layer(rows, cos, sin, self.before, self.behind, attend, self.keep, self._masters)
        return out.view_as(hidden_states)


class FusedNorm(nn.Module):
    """Stands in for the norm behind the last layer, with the same weight."""

    @classmethod
    def from_base(cls, base: nn.Module) -> FusedNorm:
        """The stand-in for `base`, a norm of the kind that the layers have."""
        norm = cls.__new__(cls)
        norm.__dict__.update(base.__dict__)
        return norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, d) -> (1, T, d)."""
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        return block.last_norm(rows, _weight(self), _eps(self)).view_as(hidden_states)


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
def installed(model: PreTrainedModel, options: Options, plan: Plan | None = None) -> Iterator[Copies]:
    """Puts `FusedLayer`s in the place of the decoder layers of a `fusible` model, and the layers back on exit.

    `plan` says what each of them keeps for its backward; None keeps everything.
    """
    layers = _layers(model)
    assert layers is not None
    copies, host = Copies(), Host()
    before = list(layers)
    plan = plan or Plan.uniform(Level.NONE, len(before))
    for index, (base, level) in enumerate(zip(before, plan.levels, strict=True)):
        layers[index] = FusedLayer.from_base(base, copies, options, block.Keep(level, plan.tile, index, host))
    decoder = model.get_decoder()
    norm = getattr(decoder, "norm", None)
    if norm is not None and type(norm) is type(getattr(before[0], "input_layernorm", None)):
        decoder.norm = FusedNorm.from_base(norm)
    try:
        yield copies
    finally:
        if norm is not None:
            decoder.norm = norm
        for index, base in enumerate(before):
            layers[index] = base


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
        all(_plain(module) for module in linears)
        and all(n is None or (isinstance(getattr(n, "weight", None), Tensor) and _eps(n) > 0) for n in norms)
        and isinstance(getattr(attn, "head_dim", None), int)
        and not any(p.requires_grad for n, p in layer.named_parameters() if not n.endswith(("lora_A", "lora_B")))
    )


def _plain(module: object) -> bool:
    """A linear layer in floating point; a plain adapter (`lora.linear`) or none; no dropout."""
    if type(module) is not nn.Linear and not (isinstance(module, nn.Linear) and hasattr(module, "lora_A")):
        return False
    return module.weight.is_floating_point() and getattr(module, "lora_dropout", 0.0) == 0.0


def _adapter(member: nn.Linear) -> tuple[Tensor, Tensor, float] | None:
    """lora_A, lora_B and scaling of the adapter in use. Known by its attributes: this package lies below `lora`."""
    lora_A = getattr(member, "lora_A", None)
    return None if lora_A is None else (lora_A, member.lora_B, member.scaling)  # type: ignore[return-value]


def _projection(members: Sequence[nn.Linear], copies: Copies) -> Projection:
    weight = _side_by_side([cast(nn.Parameter, member.weight) for member in members])
    bias = None
    if any(member.bias is not None for member in members):
        bias = torch.cat([weight.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in members])
    adapters = [_adapter(member) for member in members]
    total = sum(adapter[0].shape[0] for adapter in adapters if adapter is not None)
    if not total:
        return Projection(Dense(weight), bias, None, None, (), (), ())
    lora_A, lora_B = weight.new_zeros(total, weight.shape[1]), weight.new_zeros(weight.shape[0], total)
    rows, ranks, scalings = [], [], []
    row = rank = 0
    for member, adapter in zip(members, adapters, strict=True):
        at = slice(row, row + member.out_features)
        row = at.stop
        if adapter is None:
            continue
        columns = slice(rank, rank + adapter[0].shape[0])
        rank = columns.stop
        rows.append(at)
        ranks.append(columns)
        scalings.append(adapter[2])
        copies.masters += adapter[:2]
        copies.copies += [lora_A[columns], lora_B[at, columns]]
        copies.scales += [1.0, adapter[2]]
    return Projection(Dense(weight), bias, lora_A, lora_B, rows, ranks, scalings)


def _side_by_side(weights: Sequence[nn.Parameter]) -> Tensor:
    """One matrix of all rows; afterwards the Parameters are views of it."""
    first = weights[0].detach()
    step, adjacent = first.data_ptr(), all(w.is_contiguous() for w in weights)
    for weight in weights:
        adjacent &= (
            weight.data_ptr() == step and weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        )
        step += weight.numel() * weight.element_size()
    if adjacent:
        return first.as_strided((sum(w.shape[0] for w in weights), first.shape[1]), first.stride())
    stacked = torch.cat([weight.detach() for weight in weights])
    row = 0
    for weight in weights:
        weight.data = stacked[row : row + weight.shape[0]]
        row += weight.shape[0]
    return stacked


def _masters(members: Sequence[nn.Linear]) -> list[Tensor]:
    return [tensor for adapter in map(_adapter, members) if adapter is not None for tensor in adapter[:2]]


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
