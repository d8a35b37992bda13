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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_CAPABILITY = 9
"""Of the GPUs that it was tried on. It has kernels for later ones too."""
_HEADS = (64, 96, 128, 256)
"""Sizes of heads that it was tried with (tests/gpu/test_flash_gpu.py). Version 4.0.0b36 takes 40 and is wrong."""
_AGREES = 0.03
"""Relative difference of two kernels in half precision that counts as the same; ten times what it is."""
_REFUSED: list[str] = []
"""Why it was not taken where it could have been."""

Attention = Callable[[Tensor, Tensor, Tensor, float, int | None, Tensor, int], Tensor]
"""With the signature of `attend`."""


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


def fits(device: torch.device, head_dim: int) -> bool:
    """Whether it is installed, for such a GPU and heads of this size."""
    return head_dim in _HEADS and _is_hopper(device) and _found()[0] is not None


def usable(query: Tensor, key: Tensor, plain: Attention) -> bool:
    """Whether it is to be had for heads like these, of 2 bytes an element on a GPU, and to be trusted with them.

    Args:
        query, key: as in `attend`.
        plain: what it stands in for, and must agree with.
    """
    device, heads, dim = query.device, query.shape[1], query.shape[-1]
    return fits(device, dim) and _agrees(plain, device, query.dtype, heads, key.shape[1], dim)


def why_not(device: torch.device) -> list[str]:
    """Lines for a person who has installed it for this GPU in vain."""
    broken = _found()[1] if _is_hopper(device) else None
    return [*([] if broken is None else [broken]), *_REFUSED]


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == _CAPABILITY


@functools.cache
def _agrees(plain: Attention, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> bool:
    """Whether it gives what `plain` gives on a row of three documents; if not it is refused, and says so.

    It is young, compiled for each kind of heads on the machine itself, and was seen to be wrong without a word.
    """
    found: list[list[Tensor]] = []
    why = None
    try:
        # Whoever asks for attention first may be in any mode, and have hooks (`ops.attention.recorded`).
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_same, _same):
            generator = torch.Generator(device).manual_seed(0)
            like: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
            ends = torch.tensor([0, 5, 135, 140], dtype=torch.int32, device=device)
            stacked = torch.randn(140, heads + 2 * kv_heads, dim, **like)
            incoming = torch.randn(1, 140, heads, dim, **like)
            for run in (attend, plain):
                qkv = [t.transpose(0, 1)[None].detach() for t in stacked.split([heads, kv_heads, kv_heads], 1)]
                query, key, value = (tensor.requires_grad_() for tensor in qkv)
                out = run(query, key, value, dim**-0.5, None, ends, 130)
                found.append([out, *torch.autograd.grad(out, (query, key, value), incoming)])
    except Exception as error:  # noqa: BLE001 (compilers and native code fail in as many ways as there are)
        why = f"{error!r:.200}"
    else:
        off = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*found, strict=True))
        if not off < _AGREES:
            why = f"it is {off:.1g} from what PyTorch's kernel gives"
    if why is not None:
        kind = f"with {heads} and {kv_heads} heads of {dim}"
        _REFUSED.append(f"flash-attn-4 is installed but is not used, so slower attention runs: {kind}, {why}")
    return why is None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, cu_seqlens: Tensor, longest: int
) -> Tensor:
    """Causal attention inside each document of a row.

    Args:
        query, key, value: (1, heads of each, T, head_dim).
        window: tokens that a position sees, itself included; None for all before it.
        cu_seqlens: (documents + 1,) int32 starts of the documents and, last, T.
        longest: a bound of the documents' lengths; `longest * documents` = T says that all are of that length.

    Returns: (1, T, heads, head_dim).
    """
    package, _ = _found()
    assert package is not None
    asked: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": True,
        "window_size": (None, None) if window is None or window >= longest else (window - 1, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    heads = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    if longest * (cu_seqlens.shape[0] - 1) == query.shape[2]:
        attended, _ = package.flash_attn_func(*(tensor.unflatten(0, (-1, longest)) for tensor in heads), **asked)
        return cast(Tensor, attended.flatten(0, 1)[None])
    asked |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    asked |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    attended, _ = package.flash_attn_varlen_func(*heads, **asked)
    return cast(Tensor, attended[None])
