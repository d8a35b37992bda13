"""Dropout whose every decision is a hash of seed, step, layer, token and feature.

A random generator returns its numbers in the order of the calls, so the dropout of one adapter would depend on the
other adapters that drew before it. Here the decision about one element is a hash of (seed, step), the layer, the
token's number in the adapter's own step, and the feature. So the mask is the same for every mixture of adapters in
the row, for every place of the token in the row, when a backward computes it again, and on a CPU and a GPU. It never
needs to be stored.

Source: counter-based generators, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixing
functions are the finalisers of splitmix64 (Steele et al. 2014) for the key and of MurmurHash3 for the elements.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from loratune.ops.dispatch import with_kernel

_MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B9 - (1 << 32)
"""2^32 / golden ratio, as int32: spreads neighbouring features over all 32 bits."""
FIRST, SECOND = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32)
"""Multipliers of MurmurHash3's finaliser, as int32."""
LEVELS = 1 << 24
"""Probabilities are multiples of 2^-24."""


def dropout_key(seed: int, step: int) -> int:
    """Key of one optimizer step, 64 bits. Neighbouring seeds and steps have unrelated keys."""
    return _splitmix(_splitmix(seed & _MASK64) ^ (step & _MASK64))


def layer_salt(path: str) -> int:
    """Number that separates one layer's masks from another's, int32: a checksum of its path."""
    return _int32(zlib.crc32(path.encode()))


def halves(key: int) -> tuple[int, int]:
    """The low and high half of a key as int32, the form that tensors and kernels take."""
    return _int32(key), _int32(key >> 32)


def threshold(probability: float) -> int:
    """Number of dropped hash values out of `LEVELS`."""
    return round(probability * LEVELS)


def row_key(key: int, position: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Key of one row, (3,) int32: the number of its first token in the step, and both halves of the step's key.

    It is a tensor because a recorded step reads it from memory that the host rewrites before each replay.
    """
    return torch.tensor([position, *halves(key)], dtype=torch.int32, device=device)


def random_row_key(device: torch.device | str) -> Tensor:
    """A `row_key` drawn from torch's global generator, for rows without a step key."""
    return torch.randint(-(1 << 31), 1 << 31, (3,), dtype=torch.int32, device=device)


def drop(x: Tensor, probability: float, salt: int, row: Tensor | None) -> tuple[Tensor, Tensor]:
    """Dropout of x, (tokens, features), and the mask of kept elements. Without a row key torch's generator draws."""
    if row is None:
        return torch.native_dropout(x, probability, True)
    kept = keep_mask(row, salt, (x.shape[0], x.shape[1]), probability)
    return (x * kept).mul_(1 / (1 - probability)), kept


def _on_gpu(row: Tensor, *_: object, **__: object) -> bool:
    return row.is_cuda


@with_kernel(_on_gpu, "ops.dropout_kernels")
def keep_mask(row: Tensor, salt: int, shape: tuple[int, int], probability: float, first: int = 0) -> Tensor:
    """Mask of kept elements: (tokens, features) bool, each True with probability 1 - `probability`.

    Args:
        row: `row_key`, on the device of the mask.
        salt: `layer_salt` of the layer.
        shape: tokens, features.
        first: number of the first token in the row.
    """
    position, low, high = row.unbind()
    tokens = torch.arange(first, first + shape[0], dtype=torch.int32, device=row.device) + position
    features = torch.arange(shape[1], dtype=torch.int32, device=row.device).mul_(GOLDEN)
    rows = _finalise(_finalise(tokens ^ low) ^ (high ^ salt))
    hashed = _finalise(rows[:, None] ^ features)
    return ((hashed >> 8) & (LEVELS - 1)) >= threshold(probability)


def _finalise(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int32: products wrap, shifts are logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 13) & 0x7FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _int32(x: int) -> int:
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x
