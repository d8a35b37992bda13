"""The contract between an adapted layer and the code that computes it without calling its `forward`.

A fused decoder layer never calls its linear layers. It reads the frozen weight and the adapter, and computes both
itself. That is right only for layers whose output is

    y = x Wᵀ + b + scaling · drop(x) Aᵀ Bᵀ

so a layer must *declare* this sum by overriding `fusion`. Attributes such as `lora_A` prove nothing: a subclass may
hold them and use them differently. A subclass that overrides `forward` and does not override `fusion` again has made
no declaration, and its layers run as modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from torch import nn
from transformers.pytorch_utils import Conv1D

from loratune.ops.bank.pool import BankLayer, BankPool
from loratune.precision.linear import QuantisedLinear


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """The adapter in use at one layer: y += scaling · drop(x) Aᵀ Bᵀ."""

    lora_A: nn.Parameter
    """(r, d_in), in the dtype of the masters"""
    lora_B: nn.Parameter
    """(d_out, r)"""
    scaling: float
    dropout: float
    """Probability of zeroing an element of x while the layer is in training mode."""
    salt: int
    """Number of the layer in the dropout hash, so that layers have different masks; see `ops.dropout`."""

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True)
class BankSum:
    """The layer's entry in a bank: each token of a row gets the low-rank sum of its own slot."""

    layer: BankLayer
    pool: BankPool


class NoAdapter:
    """Type of `NO_ADAPTER`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NO_ADAPTER"


NO_ADAPTER: Final = NoAdapter()
"""The layer computes x Wᵀ + b: a plain linear layer, or an adapted one with no adapter in use."""

Fusion = LowRankSum | BankSum | NoAdapter | str
"""A string is the reason why the layer must run as a module."""

_PLAIN = (nn.Linear, QuantisedLinear, Conv1D)


class AdaptedLayer(nn.Module):
    """A layer that replaces a base layer of the model and can hold adapters.

    It shares the Parameters of the base layer, so state-dict keys, tied weights and code that reads `layer.weight`
    stay valid.
    """

    _declares_fusion: ClassVar[bool] = True
    _base: tuple[nn.Module]
    """The base layer. In a tuple, so that `nn.Module` does not register it as a child."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._declares_fusion = defines_last(cls, "fusion", "forward")

    @classmethod
    def from_base(cls, base: nn.Module) -> Self:
        """A replacement for `base` with the same Parameters, buffers, hooks and attributes, holding no adapter."""
        layer = cls.__new__(cls)
        layer.__dict__.update(base.__dict__)
        layer._parameters = dict(base._parameters)
        layer._base = (base,)
        return layer

    def to_base(self) -> nn.Module:
        """The base layer, with the Parameters that the replacement has now."""
        base = self._base[0]
        for name in base._parameters:
            base._parameters[name] = self._parameters[name]
        return base.train(self.training)

    def fusion(self) -> Fusion:
        """The formula of `forward`, for code that computes it elsewhere."""
        raise NotImplementedError

    def adapter_tensors(self) -> Mapping[str, nn.Parameter]:
        """Attribute name -> tensor of the adapter in use. Empty without one, and for layers of a bank."""
        return {}

    @property
    def rank(self) -> int:
        """Rank of the adapter in use. 0 without one, and for layers of a bank, where each slot has a rank."""
        return 0


def fusion_of(module: object) -> Fusion:
    """The formula that `module` declares, or the reason why it must run as a module."""
    kind = type(module).__name__
    if not isinstance(module, nn.Module):
        return f"a {kind} is not a module"
    if "forward" in vars(module):
        return f"the forward of this {kind} was replaced on the instance"
    if isinstance(module, AdaptedLayer):
        if not module._declares_fusion:
            return f"{kind} overrides forward and does not declare a low-rank sum again"
        return module.fusion()
    return NO_ADAPTER if type(module) in _PLAIN else f"a {kind} is not a plain linear layer"


def rank_of(module: nn.Module) -> int:
    """Rank of the adapter in use at `module`; 0 for a module without one."""
    return module.rank if isinstance(module, AdaptedLayer) else 0


def adapter_tensors_of(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Attribute name -> tensor of the adapter in use at `module`; empty for a module without one."""
    return module.adapter_tensors() if isinstance(module, AdaptedLayer) else {}


def defines_last(cls: type, claim: str, subject: str) -> bool:
    """True if `cls` takes attribute `claim` from the same class as `subject`, or from a more derived one.

    A statement about `subject` that was made before `subject` was overridden is no longer known to hold.
    """
    holders = [next(base for base in cls.__mro__ if name in vars(base)) for name in (claim, subject)]
    return cls.__mro__.index(holders[0]) <= cls.__mro__.index(holders[1])
