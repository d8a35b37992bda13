"""bitsandbytes' form of a 4-bit weight in a checkpoint, read and written without bitsandbytes.

For a layer `proj` the file holds, each under `proj.`:

    weight                                     (elements / 2, 1) uint8, two codes a byte, the first in the high half
    weight.absmax                              (blocks,) uint8 if the absmax are quantised too, else float32
    weight.quant_map                           (16,) float32, the code book
    weight.nested_absmax, .nested_quant_map    (groups,) and (256,) float32, if the absmax are quantised
    weight.quant_state.bitsandbytes__nf4       JSON as bytes: shape, dtype, blocksize, and nested_offset and so on

config.json has a `quantization_config` with `load_in_4bit`. These are the tensors in the state_dict of
bitsandbytes' Params4bit, which transformers saves (0.50 and 5.23; `QuantState.as_dict(packed=True)`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loratune.errors import ModelError
from loratune.precision.nf4 import NestedScales, Nf4Weight

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")  # both are a table of 16 values, which the file contains


def pack(weight: Nf4Weight) -> dict[str, Tensor]:
    """The tensors of one weight by name, without the layer's path; copies, since files cannot share memory."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        "weight": weight.codes.clone()[:, None],
        "weight.absmax": weight.absmax.clone(),
        "weight.quant_map": weight.book.clone(),
    }
    nested = weight.nested
    if nested is not None:
        state |= {
            "nested_blocksize": nested.group,
            "nested_dtype": "float32",
            "nested_offset": float(nested.offset[0]),
        }
        tensors |= {"weight.nested_absmax": nested.scale.clone(), "weight.nested_quant_map": nested.book.clone()}
    tensors[_STATE + state["quant_type"]] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def unpack(tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str) -> Nf4Weight:
    """One weight from its tensors, named as by `pack`.

    Args:
        dtype: compute dtype.
        where: the layer's path, for errors.

    Raises: ModelError: a tensor is missing, or the tensors do not fit each other.
    """
    try:
        state = _state(tensors)
        shape = state["shape"]
        codes, absmax = tensors["weight"].reshape(-1).view(torch.uint8), tensors["weight.absmax"]
        book, block = tensors["weight.quant_map"], int(state["blocksize"])
        nested = None
        if "weight.nested_absmax" in tensors:
            scale = tensors["weight.nested_absmax"]
            offset = torch.full_like(scale, float(state["nested_offset"]))
            nested = NestedScales(scale, offset, tensors["weight.nested_quant_map"], int(state["nested_blocksize"]))
        d_out, d_in = shape
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: not a 4-bit weight as bitsandbytes writes it: {error!r}") from error
    elements = d_out * d_in
    blocks = -(-elements // block)
    groups = blocks if nested is None else -(-blocks // nested.group)
    if codes.numel() != -(-elements // 2) or absmax.numel() != blocks or (nested and nested.scale.numel() != groups):
        raise ModelError(f"{where}: its 4-bit codes and scales do not fit a weight of {d_out} x {d_in}")
    return Nf4Weight(codes, absmax, nested, book, (d_out, d_in), dtype, block)


def is_part(name: str) -> bool:
    """True for tensors of a checkpoint that belong to a 4-bit weight, except its codes."""
    return any(f".weight.{part}" in name for part in ("absmax", "quant_map", "nested_", "quant_state."))


def quantization_config(compute: torch.dtype, nested: bool) -> dict[str, Any]:
    """The `quantization_config` of such a checkpoint's config.json."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    for kind in _KINDS:
        if _STATE + kind in tensors:
            state: dict[str, Any] = json.loads(bytes(tensors[_STATE + kind].tolist()))
            return state
    raise KeyError(_STATE + "nf4")
