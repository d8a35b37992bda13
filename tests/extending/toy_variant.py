"""Two toy variants of LoRA: one with a further tensor and another formula, one with other initial values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.lora.layer import LoraLayer, LoraVariant, TensorSpec


@dataclass(kw_only=True)
class GatedConfig(LoraConfig):
    use_gate: bool = False


class GatedLora(LoraVariant):
    """y = x Wᵀ + b + gate ⊙ scaling · drop(x) Aᵀ Bᵀ, with one learned gate for each output channel."""

    settings = GatedConfig

    def tensors(self, kind: type[LoraLayer], d_in: int, d_out: int, r: int) -> dict[str, TensorSpec]:
        return super().tensors(kind, d_in, d_out, r) | {"lora_gate": TensorSpec("lora_gate", (d_out,))}

    def initialise(
        self,
        tensors: Mapping[str, Tensor],
        base: nn.Module,
        kind: type[LoraLayer],
        config: LoraConfig,
        scaling: float,
        generator: torch.Generator,
    ) -> None:
        super().initialise(tensors, base, kind, config, scaling, generator)
        tensors["lora_gate"].fill_(1.0)

    def forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
        gate = layer.get_parameter("lora_gate").to(x.dtype)
        return layer.base_forward(x) + gate * layer.low_rank(x)

    def delta(self, layer: LoraLayer) -> Tensor:
        return layer.get_parameter("lora_gate")[:, None] * layer.low_rank_delta()


@dataclass(kw_only=True)
class OrthogonalConfig(LoraConfig):
    init_lora_weights: bool | Literal["gaussian", "orthonormal"] = True


class OrthogonalLora(LoraVariant):
    """Plain LoRA whose A starts with orthonormal rows."""

    settings = OrthogonalConfig

    def initialise(
        self,
        tensors: Mapping[str, Tensor],
        base: nn.Module,
        kind: type[LoraLayer],
        config: LoraConfig,
        scaling: float,
        generator: torch.Generator,
    ) -> None:
        super().initialise(tensors, base, kind, config, scaling, generator)
        tensors["lora_A"].copy_(torch.linalg.qr(tensors["lora_A"].T).Q.T)


GATED, ORTHOGONAL = GatedLora(), OrthogonalLora()
