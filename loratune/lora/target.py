"""A layer that an adapter will adapt: the result of selecting and the input of building."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from loratune.lora.layer import LoraLayer, LoraVariant, TensorSpec


@dataclass(frozen=True)
class Target:
    """A layer to adapt."""

    path: str
    paths: tuple[str, ...]
    base: nn.Module
    kind: type[LoraLayer]
    variant: LoraVariant
    r: int
    scaling: float

    @property
    def features(self) -> tuple[int, int]:
        """(d_in, d_out)"""
        return self.kind.features(self.base)

    def tensors(self) -> dict[str, TensorSpec]:
        """Attribute name -> tensor of the adapter at this layer, with its shape in memory."""
        specs = self.variant.tensors(self.kind, *self.features, self.r)
        shapes = self.kind.shapes(self.base, specs)
        return {name: TensorSpec(spec.key, shapes[name]) for name, spec in specs.items()}

    def shapes_in_files(self) -> dict[str, tuple[int, ...]]:
        """Attribute name -> shape in PEFT's files, for tensors whose shape differs from that in memory."""
        return self.kind.shapes_in_files(self.base, self.variant.tensors(self.kind, *self.features, self.r))

    @property
    def parameters(self) -> int:
        """Number of values that train at this layer."""
        return sum(math.prod(spec.shape) for spec in self.tensors().values())

    @property
    def pattern_paths(self) -> tuple[str, ...]:
        """Paths that keys of rank_pattern and alpha_pattern match."""
        return tuple(name for path in self.paths for name in self.variant.pattern_paths(path))

    @property
    def is_low_rank_sum(self) -> bool:
        """True if the adapted layer computes y = x Wᵀ + b + scaling · drop(x) Aᵀ Bᵀ; see `lora.contract`."""
        return self.kind.is_linear and self.variant.low_rank_sum
