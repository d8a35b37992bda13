"""Checkpoints with weights in 8-bit floating point: their forms, and how each is read.

Beside a weight `proj.weight` in e4m3, (d_out, d_in), a file holds the factors of its numbers:

    proj.weight_scale_inv   (d_out / 128, d_in / 128), one per block, as DeepSeek and Qwen write them. Despite the
                            name it is a factor. config.json has quant_method "fp8" and weight_block_size
    proj.weight_scale       (d_out, 1), one per row, or () or (1,) for all, or blocks: compressed-tensors.
                            config.json has config_groups whose weights are of type "float" in 8 bits

`Fp8Weight` has a scale for each row. A weight with one scale per row, or one for all, is therefore used unchanged, to
the bit. Blocks do not fit: they are made dense, one weight at a time, and quantised by rows, which rounds once more.
Each rounding is to 3 bits of mantissa, 2.6 % of a weight's norm. Both together are 3.7 % away from the weight that
the checkpoint was made from. Experts that transformers merges into one tensor are always quantised again.

Source: transformers' FineGrainedFP8Config (5.17 to 5.23); compressed-tensors' `float-quantized` format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.ops.measure import MIN_SCALE
from loratune.precision.fp8 import Fp8Weight, fits
from loratune.precision.fp8_rows import E4M3
from loratune.precision.tensors import StoredTensor, set_frozen_form

_PART = 1024  # rows that are made dense at once: their float32 copies are small
_STRATEGIES = ("tensor", "channel", "block")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "q_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class Scheme:
    """Form of all 8-bit weights of a checkpoint, from its config.json."""

    suffix: str
    """Suffix that the name of a weight gets to form the name of its scale."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale, where scales form a grid."""

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> Scheme | None:
        """Scheme of a `quantization_config`; None if it describes neither of the two forms above."""
        method = how.get("quant_method")
        if method == "fp8" and how.get("expert_dtype", "fp8") == "fp8":
            return cls("_scale_inv", _pair(how.get("weight_block_size")))
        if method != "compressed-tensors" or how.get("transform_config") or _sparse(how):
            return None
        weights = [group.get("weights") or {} for group in (how.get("config_groups") or {}).values()]
        if not weights or not all(map(_in_8_bits, weights)):
            return None
        blocks = {_pair(each.get("block_structure")) for each in weights if each["strategy"] == "block"}
        return cls("_scale", blocks.pop() if blocks else None) if len(blocks) <= 1 else None


@dataclass(frozen=True)
class Unread:
    """One weight in its file; an entry for transformers' loader."""

    values: StoredTensor
    scale: StoredTensor
    block: tuple[int, int] | None
    take_over: bool
    """True if the codes are used unchanged; False if only the dense weight is used."""

    def __getitem__(self, everything: object) -> Scaled8:
        """Values and scales, in CPU memory."""
        return Scaled8(self.values.read(), self.scale.read(), self.block, self.take_over, self.values.name)


@dataclass(frozen=True)
class Scaled8:
    """Values and scales of one weight of a checkpoint."""

    values: Tensor
    """(..., d_out, d_in) e4m3"""
    scale: Tensor
    block: tuple[int, int] | None
    take_over: bool
    name: str

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, made on the device. Its `frozen_form` is set if the codes are used unchanged.

        Raises: ModelError: the scales do not fit the weight.
        """
        values, scale = self.values.to(device), self.scale.float().to(device)
        dense = _dense(values, scale, self.block, dtype or torch.float32, self.name)
        if self.take_over and _by_rows(scale, values.shape) and fits(values.shape):
            each = scale.reshape(-1, 1).expand(values.shape[0], 1).clamp_min(MIN_SCALE).contiguous()
            set_frozen_form(dense, Fp8Weight(values, each, dense.dtype))
        return dense


def entries(stored: Mapping[str, StoredTensor], scheme: Scheme, take_over: bool) -> dict[str, StoredTensor | Unread]:
    """Tensors of a checkpoint by name, an 8-bit weight and its scale as one entry.

    Raises: ModelError: a weight has no scale.
    """
    made: dict[str, StoredTensor | Unread] = {}
    scales = {name + scheme.suffix for name, tensor in stored.items() if tensor.dtype == E4M3}
    for name, tensor in stored.items():
        if tensor.dtype == E4M3:
            scale = stored.get(name + scheme.suffix)
            if scale is None:
                raise ModelError(f"{tensor.file}: {name} is in 8 bits, but {name + scheme.suffix} is missing")
            made[name] = Unread(tensor, scale, scheme.block, take_over)
        elif name not in scales and not name.endswith(_OF_ACTIVATIONS):
            made[name] = tensor
    return made


def _dense(values: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype, name: str) -> Tensor:
    """(..., d_out, d_in) times their scales."""
    if values.ndim > 2:  # experts in one tensor
        each = scale if scale.ndim > 1 else scale.expand(values.shape[0])
        return torch.stack([_dense(v, s, block, dtype, name) for v, s in zip(values, each, strict=True)])
    d_out, d_in = values.shape
    if _by_rows(scale, values.shape):
        grid, height, width = scale.reshape(-1, 1).expand(d_out, 1), 1, d_in
    else:
        grid, height, width = scale, *(block or (1, d_in))
    if grid.shape != (-(-d_out // height), -(-d_in // width)):
        raise ModelError(
            f"{name}: scales of shape {tuple(scale.shape)} do not fit {d_out} x {d_in} numbers in blocks of "
            f"{height} x {width}; is config.json the one that came with these files?"
        )
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    for start in range(0, d_out, _PART):
        rows = torch.arange(start, min(start + _PART, d_out), device=values.device)
        factors = grid[rows // height].repeat_interleave(width, 1)[:, :d_in]
        out[start : start + _PART] = values[start : start + _PART].float() * factors
    return out


def _by_rows(scale: Tensor, shape: Sequence[int]) -> bool:
    """True for one scale for each row of a matrix, or one for all."""
    return len(shape) == 2 and (scale.numel() == 1 or tuple(scale.shape) in ((shape[0],), (shape[0], 1)))


def _pair(block: Any) -> tuple[int, int] | None:
    """Block size from [128, 128] or "128x128"; None for anything else."""
    if block is None:
        return None
    rows, columns = block.split("x") if isinstance(block, str) else block
    return int(rows), int(columns)


def _in_8_bits(weights: Mapping[str, Any]) -> bool:
    known = weights.get("strategy") in _STRATEGIES and weights.get("symmetric") is not False
    return known and weights.get("num_bits") == 8 and weights.get("type") == "float"


def _sparse(how: Mapping[str, Any]) -> bool:
    return bool((how.get("sparsity_config") or {}).get("format", "dense") != "dense")
