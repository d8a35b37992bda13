"""A precision in one file: whole numbers of 8 bits with a scale for each row, W ≈ diag(s) Q."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.products import MatrixProduct, mm
from loratune.precision.contract import CheckpointReader, UnreadWeight, WeightFormat
from loratune.precision.tensors import StoredTensor


@dataclass(frozen=True)
class Int8Weight:
    """W in 8-bit whole numbers, made dense for the length of one product."""

    precision: ClassVar[str] = "int8"
    values: Tensor
    """(d_out, d_in) int8"""
    scale: Tensor
    """(d_out, 1) float32"""
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        d_out, d_in = self.values.shape
        return d_out, d_in

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def forward(
        self, x: Tensor, bias: Tensor | None = None, onto: Tensor | None = None, mm: MatrixProduct = mm
    ) -> Tensor:
        return DenseWeight(self.dense()).forward(x, bias, onto, mm)

    def d_input(self, dy: Tensor, onto: Tensor | None = None, mm: MatrixProduct = mm) -> Tensor:
        return DenseWeight(self.dense()).d_input(dy, onto, mm)

    def dense(self) -> Tensor:
        return (self.values.float() * self.scale).to(self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Int8Weight:
        return Int8Weight(self.values.to(device), self.scale.to(device), dtype)


@dataclass(frozen=True)
class UnreadInt8:
    """Both tensors of a weight in their file."""

    values: StoredTensor
    scale: StoredTensor
    dtype: torch.dtype

    def __getitem__(self, everything: object) -> Int8Weight:
        return Int8Weight(self.values.read(), self.scale.read(), self.dtype)


@dataclass(frozen=True)
class Int8Reader:
    keeps_precision: bool = True

    def entries(
        self, stored: Mapping[str, StoredTensor], dtype: torch.dtype, wanted: bool
    ) -> dict[str, UnreadWeight]:
        made: dict[str, UnreadWeight] = {}
        for name, tensor in stored.items():
            if f"{name}_scale" in stored:
                made[name] = UnreadInt8(tensor, stored[f"{name}_scale"], dtype)
            elif not name.endswith("weight_scale"):
                made[name] = tensor
        return made


class Int8Format(WeightFormat):
    name = "int8"
    label = "8-bit whole numbers"

    def quantise(self, weight: Tensor) -> FrozenWeight:
        scale = weight.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
        return Int8Weight((weight.float() / scale).round().to(torch.int8), scale, weight.dtype)

    def bytes_held(self, shape: Sequence[int], itemsize: int) -> float:
        return float(shape[0] * shape[1] + 4 * shape[0])

    def pack(self, weight: FrozenWeight) -> dict[str, Tensor]:
        found = cast(Int8Weight, weight)
        return {"weight": found.values.clone(), "weight_scale": found.scale.clone()}

    def quantization_config(self, weights: Sequence[FrozenWeight], dtype: torch.dtype) -> dict[str, Any]:
        return {"quant_method": "toy-int8"}

    def reader(self, quantization_config: Mapping[str, Any]) -> CheckpointReader | None:
        return Int8Reader() if quantization_config.get("quant_method") == "toy-int8" else None
