"""`nn.Linear` with an adapter. The siblings for other kinds of layers are in `lora.layers`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from loratune.lora.layer import LoraLayer
from loratune.ops.lora import lora_linear


class LoraLinear(LoraLayer, nn.Linear):
    """`nn.Linear` plus low-rank update: x Wᵀ + b + scaling · (drop(x) Aᵀ) Bᵀ."""

    def base_forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b; (..., d_in) -> (..., d_out). A subclass with a forward of its own keeps that forward's bits."""
        base = self._base[0]
        if type(base).forward is nn.Linear.forward:
            return linear(x, self.weight, self.bias)
        base._parameters["weight"], base._parameters["bias"] = self._parameters["weight"], self._parameters["bias"]
        out: Tensor = base.forward(x)
        return out

    def lora_forward(self, x: Tensor) -> Tensor:
        """`base_forward` plus the low-rank update."""
        return lora_linear(x, self.weight, self.bias, *self._plain_arguments())

    @staticmethod
    def features(base: nn.Module) -> tuple[int, int]:
        """(d_in, d_out) of an `nn.Linear`."""
        assert isinstance(base, nn.Linear)
        return base.in_features, base.out_features
