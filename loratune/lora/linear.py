"""One linear layer with at most one adapter in use, and its whole life: from base, forward, merge, back to base.

    W' = W + scaling · B A        A: (r, d_in)    B: (d_out, r)    W frozen

A `LoraLinear` *is* an `nn.Linear`: it takes over the very Parameter objects of the layer it stands in for, so that
state-dict keys, tied weights and code that asks for `layer.weight.dtype` stay valid. It holds the adapter in use
and nothing of the others: switching re-points `lora_A` and `lora_B`, and with none in use the layer computes what
the original did, to the bit. Adapter names never reach a layer.

`LoraLayer` is the part that does not depend on the kind of layer; `lora.layers` has the siblings for
transformers' Conv1D and for embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loratune.lora.contract import NO_ADAPTER, AdaptedLayer, Fusion, LowRankSum
from loratune.ops.lora import lora_linear
from loratune.ops.state import ForwardState


class LoraLayer(AdaptedLayer):
    """A layer that stands in for `base` and adds the low-rank update of the adapter it holds."""

    transposed: ClassVar[bool] = False
    """True if `weight` is (d_in, d_out), so that B A is added to it transposed."""
    weight: Tensor
    lora_A: nn.Parameter | None
    """(r, d_in), or None when no adapter is in use here."""
    lora_B: nn.Parameter | None
    """(d_out, r), or None when no adapter is in use here."""
    scaling: float
    """Factor of B A: lora_alpha / r, or lora_alpha / √r with rsLoRA."""
    lora_dropout: float
    """Probability of zeroing an element of the adapter's input while training."""
    salt: int = 0
    """What sets this layer's dropout apart from others', see `ops.dropout`."""
    state: ForwardState | None = None
    """State of the packed forward that runs this layer; None outside of one."""
    _base: tuple[nn.Module]  # in a tuple, so that nn.Module does not register it as a child
    _unmerged: Tensor | None  # the weight before `merge`, on the CPU

    @classmethod
    def from_base(cls, base: nn.Module) -> Self:
        """A stand-in for `base` with the same Parameters, buffers, hooks and attributes, holding no adapter."""
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        layer._parameters = dict(base._parameters)
        layer.register_parameter("lora_A", None)
        layer.register_parameter("lora_B", None)
        layer._base = (base,)
        layer._unmerged = None
        layer.release()
        return layer

    def to_base(self) -> nn.Module:
        """The original instance, with whatever Parameters `weight` and `bias` have become since."""
        base = self._base[0]
        for name in base._parameters:
            base._parameters[name] = self._parameters[name]
        return base.train(self.training)

    def hold(self, lora_A: nn.Parameter, lora_B: nn.Parameter, scaling: float, dropout: float) -> None:
        """Puts an adapter's weights, (r, d_in) and (d_out, r), to use."""
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scaling, self.lora_dropout = scaling, dropout

    def release(self) -> None:
        """Lets go of the adapter: the layer computes what the original did, to the bit."""
        self.lora_A = self.lora_B = None
        self.scaling, self.lora_dropout = 0.0, 0.0

    @torch.no_grad()
    def delta(self) -> Tensor:
        """scaling · B A in the shape of `weight` and the dtype of the adapter."""
        left, right = self._factors()
        return (left @ right).mul_(self.scaling)

    @torch.no_grad()
    def merge(self, *, reversible: bool = True) -> None:
        """Adds `delta` to the weight in place, rounded once to its dtype, and lets go of the adapter.

        Memory: `unmerge` must give back the exact bits, which no arithmetic on the rounded sum can, so the weight
        before the merge is kept in CPU memory; reversible=False keeps nothing.
        """
        left, right = self._factors()
        if reversible:
            self._unmerged = self.weight.detach().to("cpu", copy=True)
        if self.weight.dtype == left.dtype:
            self.weight.addmm_(left, right, alpha=self.scaling)
        else:
            self.weight.copy_(torch.addmm(self.weight.to(left.dtype), left, right, alpha=self.scaling))
        self.release()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the weight of before `merge`, to the bit."""
        assert self._unmerged is not None
        self.weight.copy_(self._unmerged)
        self._unmerged = None

    def adapter_tensors(self) -> dict[str, nn.Parameter]:
        """Attribute name -> tensor of the adapter in use; empty without one."""
        if self.lora_A is None or self.lora_B is None:
            return {}
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @property
    def rank(self) -> int:
        """Rank of the adapter in use, 0 without one."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def fusion(self) -> Fusion:
        """The low-rank sum of the adapter in use."""
        if self.lora_A is None or self.lora_B is None:
            return NO_ADAPTER
        return LowRankSum(self.lora_A, self.lora_B, self.scaling, self.lora_dropout, self.salt)

    def extra_repr(self) -> str:
        """As of the original, and the rank of the adapter in use."""
        rank = "no adapter" if self.lora_A is None else f"rank={self.lora_A.shape[0]}"
        return f"{self._base[0].extra_repr()}, {rank}"

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of a layer of the kind that this class stands in for."""
        raise NotImplementedError

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is B A in the orientation of `weight`."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        return (self.lora_A.T, self.lora_B.T) if self.transposed else (self.lora_B, self.lora_A)


class LoraLinear(LoraLayer, nn.Linear):
    """`nn.Linear` plus low-rank update: x Wᵀ + b + scaling · (drop(x) Aᵀ) Bᵀ."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        if self.lora_A is None or self.lora_B is None:
            return linear(input, self.weight, self.bias)
        dropout = self.lora_dropout if self.training else 0.0
        adapter = self.lora_A, self.lora_B, self.scaling, dropout, self.salt
        return lora_linear(input, self.weight, self.bias, *adapter, self.state)

    fusion = LoraLayer.fusion

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of an `nn.Linear`."""
        assert isinstance(base, nn.Linear)
        return base.in_features, base.out_features


@contextmanager
def running_with(model: nn.Module, state: ForwardState) -> Iterator[None]:
    """Gives `state` to the adapter layers of `model`, and their previous state back on exit."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer.state for layer in layers]
    for layer in layers:
        layer.state = state
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.state = earlier
