"""The precision "nf4": 4-bit weights of `precision.nf4`, in bitsandbytes' files (`precision.nf4_files`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from loratune.ops.frozen import FrozenWeight
from loratune.precision import nf4, nf4_files
from loratune.precision.contract import CheckpointReader, ProductCost, UnreadWeight, WeightFormat
from loratune.precision.mxfp4_files import Mxfp4Reader
from loratune.precision.nf4 import AugmentedNf4, Nf4Weight
from loratune.precision.projection import AugmentedWeight
from loratune.precision.tensors import StoredTensor


class Nf4Format(WeightFormat):
    """4 bits: weights become dense for the length of one product."""

    name = "nf4"
    label = "4 bits (NF4)"
    cost = ProductCost(unpack=2.5)

    def quantise(self, weight: Tensor) -> FrozenWeight:
        """NF4 with double quantisation, as bitsandbytes does it on a GPU."""
        return nf4.quantise(weight)

    def bytes_held(self, shape: Sequence[int], itemsize: int) -> float:
        """Codes, 8-bit absmax and float32 group scales and offsets."""
        count = 1.0
        for size in shape:
            count *= size
        return (0.5 + 1 / nf4.BLOCK + 8 / (nf4.BLOCK * nf4.GROUP)) * count

    def can_stack(self, weight: FrozenWeight) -> bool:
        """True if the weight ends with a whole block, so that the next one starts with a block of its own."""
        found = cast(Nf4Weight, weight)
        return found.shape[0] * found.shape[1] % found.block == 0

    def join(self, weights: Sequence[FrozenWeight], ranks: int) -> FrozenWeight:
        """All codes as one weight."""
        return nf4.join(cast("Sequence[Nf4Weight]", weights)) if len(weights) > 1 else weights[0]

    def rows(self, joined: FrozenWeight, rows: slice) -> FrozenWeight | None:
        """A member in the memory of the stack."""
        return cast(Nf4Weight, joined).rows(rows)

    def augment(self, weight: FrozenWeight, lora_A: Tensor, lora_B: Tensor) -> AugmentedWeight | None:
        """The augmented weight, made dense in pieces. None if its rows would not be aligned to 16 bytes."""
        found = cast(Nf4Weight, weight)
        return AugmentedNf4(found, lora_A, lora_B) if found.aligned_with(lora_B.shape[1]) else None

    def pack(self, weight: FrozenWeight) -> dict[str, Tensor] | None:
        """bitsandbytes' tensors."""
        return nf4_files.pack(cast(Nf4Weight, weight))

    def quantization_config(self, weights: Sequence[FrozenWeight], dtype: torch.dtype) -> dict[str, Any] | None:
        """bitsandbytes' configuration."""
        nested = any(cast(Nf4Weight, weight).nested is not None for weight in weights)
        return nf4_files.quantization_config(dtype, nested)

    def reader(self, quantization_config: Mapping[str, Any]) -> CheckpointReader | None:
        """Reader of checkpoints that bitsandbytes wrote in 4 bits, or with MXFP4 experts; None for others."""
        how = quantization_config
        if how.get("quant_method") == "mxfp4":
            return Mxfp4Reader()
        method = how.get("quant_method") or ("bitsandbytes" if how.get("load_in_4bit") else None)
        return Nf4Reader() if method == "bitsandbytes" and not how.get("load_in_8bit") else None


@dataclass(frozen=True)
class Nf4Reader:
    """Reads bitsandbytes' 4-bit checkpoints; the weights stay in 4 bits."""

    keeps_precision: bool = True

    def entries(
        self, stored: Mapping[str, StoredTensor], dtype: torch.dtype, wanted: bool
    ) -> dict[str, UnreadWeight]:
        """All tensors by name, one entry for all parts of a 4-bit weight."""
        parts: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            if nf4_files.is_part(name):
                path = name[: name.index(".weight.")]
                parts.setdefault(path, {})[name.removeprefix(path + ".")] = tensor
        entries: dict[str, UnreadWeight] = {}
        for name, tensor in stored.items():
            path = name.removesuffix(".weight")
            if name.endswith(".weight") and path in parts:
                entries[name] = UnreadNf4(path, parts[path] | {"weight": tensor}, dtype)
            elif not nf4_files.is_part(name):
                entries[name] = tensor
        return entries


@dataclass(frozen=True)
class UnreadNf4:
    """A 4-bit weight in its file."""

    path: str
    parts: dict[str, StoredTensor]
    dtype: torch.dtype

    def __getitem__(self, everything: object) -> Nf4Weight:
        """The weight, in CPU memory."""
        return nf4_files.unpack({name: part.read() for name, part in self.parts.items()}, self.dtype, self.path)
