"""`nn.MultiheadAttention` with an adapter on its packed projection of query, key and value and on `out_proj`.

The module calls neither projection: it reads `in_proj_weight` and `out_proj.weight` and hands them to one function,
and `nn.TransformerEncoderLayer` reads them as well. So these layers show W + scaling · B A there, rounded once to
the dtype of W. Every reader then computes with the adapter, gradients reach A and B, and the result has the bits of
a merge. The sum exists for the length of one forward: 4 · embed_dim² values.

As in PEFT, an adapter of the module has two pairs of one rank: A (r, d) and B (3 d, r) of the packed projection, and
a pair of `out_proj`, whose files name the path `.base_layer.out_proj`. PEFT (0.21 and before) adds the update of
`out_proj` twice, once in the attention's merge and once in that of the linear layer. A file means what its reader
computes, so the update is 2 · alpha / r · B A here too. Dropout of the input of one projection is not
possible here, because the input of `out_proj` never leaves PyTorch's function.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import linear

from loratune.lora.layer import LoraLayer

_PACKED = "in_proj_weight"


class _ShownSum(LoraLayer):
    """A layer whose weight is read by another module, and that shows the sum there."""

    is_linear = False
    has_dropout = False

    def shown(self) -> Tensor:
        """W, or W + scaling · B A in the dtype of W while an adapter is in use."""
        weight = self.own_weight
        return weight if self.lora_A is None else self.sum_with(weight).to(weight.dtype)


class LoraOutProjection(_ShownSum, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """`out_proj` of an `nn.MultiheadAttention`."""

    is_part = True
    scaling_factor = 2.0

    @classmethod
    def path_in_files(cls, path: str) -> str:
        """PEFT's path, inside of the base layer that its adapted attention holds."""
        attention, _, leaf = path.rpartition(".")
        return f"{attention}.base_layer.{leaf}" if attention else f"base_layer.{leaf}"

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The sum, for the attention that reads it."""
        return self.shown()

    def base_forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        return linear(x, self.own_weight, self.bias)

    def lora_forward(self, x: Tensor) -> Tensor:
        """`base_forward` with the sum."""
        return linear(x, self.shown(), self.bias)

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out)"""
        assert isinstance(base, nn.Linear)
        return base.in_features, base.out_features


class LoraMultiheadAttention(_ShownSum, nn.MultiheadAttention):
    """`nn.MultiheadAttention`, with the packed projection of query, key and value adapted."""

    weight_name = _PACKED
    parts: ClassVar = {"out_proj": LoraOutProjection}

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """The sum, for this module's forward and for `nn.TransformerEncoderLayer`."""
        return self.shown()

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """As `nn.MultiheadAttention.forward`, which reads the sums."""
        return nn.MultiheadAttention.forward(self, *args, **kwargs)

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(embed_dim, 3 · embed_dim)"""
        d_out, d_in = base._parameters[_PACKED].shape  # type: ignore[union-attr]
        return d_in, d_out

    def extra_repr(self) -> str:
        """Rank of the adapter in use."""
        return "no adapter" if self.lora_A is None else f"rank={self.rank}"


def attention_kind(base: nn.Module) -> tuple[type[LoraLayer] | None, str]:
    """(kind, "") for a packed `nn.MultiheadAttention`, or (None, reason)."""
    name = type(base).__name__
    if type(base).forward is not nn.MultiheadAttention.forward:
        return None, f"{name} is a MultiheadAttention with a forward of its own"
    if base._parameters.get(_PACKED) is None:
        return None, f"this {name} has separate weights for query, key and value of different widths"
    if not isinstance(base.out_proj, nn.Linear) or base.out_proj._parameters.get("weight") is None:
        return None, f"out_proj of this {name} is a {type(base.out_proj).__name__}"
    return LoraMultiheadAttention, ""
