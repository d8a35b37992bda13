"""MXFP4 experts in a checkpoint, as gpt-oss ships them: kept in 4 bits under `--precision nf4`, else made dense.

    name_blocks    (E, d_out, d_in / 32, 16) uint8, two codes a byte, the first in the low half
    name_scales    (E, d_out, d_in / 32) uint8, the exponent of a power of two, plus 127

A code is one of 16 values, and 32 values share a scale. That is an `Nf4Weight` with another book: the exponent is an
8-bit absmax whose book holds the powers of two. No value is rounded, and the same kernels make it dense.

Source: OCP Microscaling Formats 1.0, section 6 (E2M1 values, E8M0 scales, blocks of 32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.precision.contract import UnreadWeight
from loratune.precision.nf4 import GROUP, NestedScales, Nf4Weight
from loratune.precision.tensors import StoredTensor

BLOCK = 32
_BLOCKS, _SCALES = "_blocks", "_scales"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127


@dataclass(frozen=True)
class Mxfp4Reader:
    """Reads such checkpoints; implements `precision.contract.CheckpointReader`."""

    keeps_precision: bool = False

    def entries(
        self, stored: Mapping[str, StoredTensor], dtype: torch.dtype, wanted: bool
    ) -> dict[str, UnreadWeight]:
        """All tensors by name, blocks and scales as one entry. Raises: ModelError: one of the two is missing."""
        entries: dict[str, UnreadWeight] = {}
        for name, tensor in stored.items():
            stem = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
            if stem == name:
                entries[name] = tensor
                continue
            missing = [stem + end for end in (_BLOCKS, _SCALES) if stem + end not in stored]
            if missing:
                raise ModelError(f"{tensor.file}: {name} needs {missing[0]}, which is missing")
            entries[stem] = UnreadMxfp4(stem, stored[stem + _BLOCKS], stored[stem + _SCALES], dtype, wanted)
        return entries


@dataclass(frozen=True)
class UnreadMxfp4:
    """The weights of all experts of one projection, in their file."""

    name: str
    blocks: StoredTensor
    scales: StoredTensor
    dtype: torch.dtype
    packed: bool
    """True to keep 4 bits; False for a dense tensor (E, d_in, d_out), the shape in the architecture."""

    def __getitem__(self, everything: object) -> Nf4Weight | Tensor:
        """The weights, in CPU memory. Raises: ModelError: blocks and scales do not fit each other."""
        if len(self.blocks.shape) != 4 or self.blocks.shape[:3] != self.scales.shape or self.blocks.shape[3] != 16:
            raise ModelError(
                f"{self.blocks.file}: {self.name} has blocks of shape {self.blocks.shape} and scales of shape "
                f"{self.scales.shape}; MXFP4 has (E, d_out, n, 16) and (E, d_out, n)"
            )
        weight = packed(self.blocks.read(), self.scales.read(), self.dtype)
        if self.packed:
            return weight
        experts, d_out = self.blocks.shape[:2]
        return weight.dense().view(experts, d_out, -1).transpose(1, 2).contiguous()


def packed(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Nf4Weight:
    """The weight (E d_out, d_in) of blocks and scales as in the file; its values are those of MXFP4."""
    experts, d_out, count, _ = blocks.shape
    flat = blocks.reshape(-1)
    codes = (flat << 4) | (flat >> 4)  # the first code of a byte is in the high half here
    exponents = torch.arange(256, dtype=torch.float32, device=blocks.device) - _BIAS
    groups = -(-scales.numel() // GROUP)
    ones = torch.ones(groups, dtype=torch.float32, device=blocks.device)
    nested = NestedScales(ones, torch.zeros_like(ones), exponents.exp2())
    values = torch.tensor(_MAGNITUDES, dtype=torch.float32, device=blocks.device)
    book = torch.cat([values, -values])
    return Nf4Weight(codes, scales.reshape(-1), nested, book, (experts * d_out, count * BLOCK), dtype, BLOCK)
