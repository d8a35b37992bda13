# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, import-not-found, import-untyped"
"""Triton twin of `ops.dropout`, and its hash for kernels that mask an operand while they read it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loratune.ops.dropout import GOLDEN, LEVELS, threshold


@triton.jit
def _finalise(x):
    """MurmurHash3's 32-bit finaliser, as in `ops.dropout`."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def hashed(position, low, high):
    """(tokens,) hashes of int32 positions and a key whose high half is combined with the layer's salt."""
    low, high = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    return _finalise(_finalise(position.to(tl.uint32, bitcast=True) ^ low) ^ high)


@triton.jit
def hashed_in_row(row_ptr, token, salt):
    """`hashed` with a `row_key` in memory; `token`, (tokens,), is the number in the row."""
    position, salt = tl.load(row_ptr) + token.to(tl.int32), salt.to(tl.int32)
    return hashed(position, tl.load(row_ptr + 1), tl.load(row_ptr + 2) ^ salt)


@triton.jit
def keeps(tokens, feature, dropped, GOLDEN: tl.constexpr, LEVELS: tl.constexpr):
    """(tokens, features) mask of kept elements. `tokens` is `hashed`; `dropped` is `ops.dropout.threshold`."""
    columns = (feature.to(tl.int32) * GOLDEN).to(tl.uint32, bitcast=True)
    elements = _finalise(tokens[:, None] ^ columns[None, :])
    return ((elements >> 8) & (LEVELS - 1)).to(tl.int32) >= dropped


@triton.jit(do_not_specialize=["salt", "first"])
def _keep_mask(
    row_ptr, out_ptr, salt, first, dropped, tokens, features, GOLDEN: tl.constexpr, LEVELS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One program for a tile of the mask; it writes one byte for each element."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    kept = keeps(hashed_in_row(row_ptr, first + token, salt), feature, dropped, GOLDEN, LEVELS)
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    tl.store(out_ptr + token.to(tl.int64)[:, None] * features + feature[None, :], kept, mask=inside)


def keep_mask(row: Tensor, salt: int, shape: tuple[int, int], probability: float, first: int = 0) -> Tensor:
    """Twin of `ops.dropout.keep_mask`, bound by writing the mask."""
    (tokens, features), (height, width) = shape, (16, 256)
    out = torch.empty(shape, dtype=torch.bool, device=row.device)
    _keep_mask[triton.cdiv(tokens, height), triton.cdiv(features, width)](
        row, out, salt, first, threshold(probability), tokens, features,
        GOLDEN=GOLDEN, LEVELS=LEVELS, TOKENS=height, FEATURES=width, num_warps=4,
    )  # fmt: skip
    return out
