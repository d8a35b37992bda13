"""FlashAttention 4, where somebody has installed it: attention written for Hopper, on documents of any length.

PyTorch's variable-length kernel is FlashAttention 2, written for the generation before, and cuDNN's takes documents
of one length only. `pip install 'loratune[flash]'` brings the package flash-attn-4 (Dao-AILab/flash-attention,
`flash_attn.cute`): half of the former's time, and 5 to 15 % less than the latter's (benchmarks/NOTES.md). It compiles
a kernel when it is first asked for one, three seconds each, and keeps it on disk.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

_CAPABILITY = 9
"""Of the GPUs that it was tried on. It has kernels for later ones too."""
_HEADS = (64, 96, 128, 256)
"""Sizes of heads that it was tried with (tests/gpu/test_flash_gpu.py). Version 4.0.0b36 takes 40 and is wrong."""


_REFUSED: list[str] = []
"""Why it was not taken where it could have been."""


@functools.cache
def _found() -> tuple[ModuleType | None, str | None]:
    """The package; or None, and if it is installed what keeps it from being used, in one line."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None, None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # both are read when it is imported
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(Path(home) / "loratune" / "flash_attention"))
        warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # its compiler, about each of its kernels
        return importlib.import_module("flash_attn.cute"), None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # native code, and others' versions of it
        return None, f"flash-attn-4 is installed but cannot be imported, so slower attention runs: {error!r:.200}"


def usable(device: torch.device, head_dim: int) -> bool:
    """Whether heads of 2 bytes an element on a GPU can be attended to here."""
    return head_dim in _HEADS and _fits(device) and _found()[0] is not None


def refuse(why: str) -> None:
    """It is not to be used after all."""
    line = f"flash-attn-4 is installed but is not used, so slower attention runs: {why}"
    if line not in _REFUSED:
        _REFUSED.append(line)


def why_not(device: torch.device) -> list[str]:
    """Lines for a person who has installed it for this GPU in vain."""
    broken = _found()[1] if _fits(device) else None
    return [*([] if broken is None else [broken]), *_REFUSED]


def _fits(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == _CAPABILITY


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    longest: int,
) -> Tensor:
    """Causal attention inside each document of a row.

    Args:
        query, key, value: (T, heads of each, head_dim).
        window: tokens that a position sees, itself included; None for all before it.
        cu_seqlens: (documents + 1,) int32 starts of the documents and, last, T; None if all are `longest` long.
        longest: a bound of the documents' lengths.

    Returns: (T, heads, head_dim).
    """
    package, _ = _found()
    assert package is not None
    asked: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": True,
        "window_size": (None, None) if window is None else (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    heads = query, key, value
    if cu_seqlens is None:
        attended, _ = package.flash_attn_func(*(tensor.unflatten(0, (-1, longest)) for tensor in heads), **asked)
        return cast(Tensor, attended.flatten(0, 1))
    asked |= {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    attended, _ = package.flash_attn_varlen_func(*heads, **asked)
    return cast(Tensor, attended)
