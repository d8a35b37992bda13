"""FlashAttention 4, if it is installed: attention written for Hopper GPUs, on documents of any length.

PyTorch's variable-length kernel is FlashAttention 2, written for the generation before, and cuDNN's takes documents
of one length only. `pip install 'loratune[flash]'` installs the package flash-attn-4 (Dao-AILab/flash-attention,
`flash_attn.cute`). It takes half the time of FlashAttention 2 and 5 to 15 % less than cuDNN (docs/lab). Each kernel
is compiled at its first use, which takes three seconds.

The package is young and compiles on the user's machine, and some of its kernels were seen to be wrong without an
error. So each kind of heads has a trial against PyTorch's kernel before it is used (`FlashTrials`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_CAPABILITY = 9
"""Compute capability of the GPUs on which it was tested; the package has kernels for later ones too."""
_HEADS = (64, 96, 128, 256)
"""Head sizes tested in tests/gpu/test_flash_gpu.py. Version 4.0.0b36 accepts 40 and is wrong."""
_AGREES = 0.03
"""Relative difference below which two kernels in half precision agree; ten times the usual difference."""

Attention = Callable[[Tensor, Tensor, Tensor, float, int | None, Tensor, int], Tensor]
"""A function with the signature of `attend`."""


@functools.cache
def _package() -> tuple[ModuleType | None, str | None]:
    """The package, or None and the reason if it is installed but cannot be imported."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None, None
    try:
        return importlib.import_module("flash_attn.cute"), None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # native code, or other versions of it
        return None, f"flash-attn-4 is installed but cannot be imported, so slower attention runs: {error!r:.200}"


def fits(device: torch.device, head_dim: int) -> bool:
    """True if the package is installed, and tested on such a GPU with heads of this size."""
    return head_dim in _HEADS and _is_hopper(device) and _package()[0] is not None


def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == _CAPABILITY


class FlashTrials:
    """Kinds of heads that FlashAttention 4 was tried on, with the outcome. One instance for each forward."""

    def __init__(self) -> None:
        self._refusals: dict[tuple[object, ...], str | None] = {}
        """(device, dtype, heads, kv_heads, head_dim) -> None, or the reason not to use it."""

    def usable(self, query: Tensor, key: Tensor, plain: Attention) -> bool:
        """True if it can run on heads like these and agrees with `plain`; the first call for a kind runs the trial.

        Args:
            query, key: as in `attend`, 2 bytes an element, on a GPU.
            plain: the kernel that it replaces.
        """
        device, heads, kv_heads, dim = query.device, query.shape[1], key.shape[1], query.shape[-1]
        if not fits(device, dim):
            return False
        kind = device, query.dtype, heads, kv_heads, dim
        if kind not in self._refusals:
            self._refusals[kind] = disagreement(plain, device, query.dtype, heads, kv_heads, dim)
        return self._refusals[kind] is None

    def why_not(self, device: torch.device) -> list[str]:
        """Reasons why an installed flash-attn-4 is not used on this GPU, one line each."""
        broken = _package()[1] if _is_hopper(device) else None
        refusals = [
            f"flash-attn-4 is installed but is not used, so slower attention runs: {why}"
            for why in self._refusals.values()
            if why is not None
        ]
        return refusals if broken is None else [broken, *refusals]


def disagreement(
    plain: Attention, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> str | None:
    """Compares `attend` with `plain` on a row of three documents: None if they agree, else the reason."""
    found: list[list[Tensor]] = []
    try:
        # The first caller may be in inference mode or have hooks of its own (`ops.attention.recorded`).
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
    except Exception as error:  # noqa: BLE001 (compilers and native code raise errors of any class)
        why = f"{error!r:.200}"
    else:
        off = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*found, strict=True))
        if off < _AGREES:
            return None
        why = f"its results differ from those of PyTorch's kernel by {off:.1g}"
    return f"with {heads} and {kv_heads} heads of {dim}, {why}"


def _same(tensor: Tensor) -> Tensor:
    return tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, cu_seqlens: Tensor, longest: int
) -> Tensor:
    """Causal attention inside each document of a packed row.

    Args:
        query, key, value: (1, heads of each, T, head_dim).
        scaling: factor on the scores.
        window: tokens visible to a position, itself included; None for all before it.
        cu_seqlens: (documents + 1,) int32 boundaries of the documents, on the device.
        longest: upper bound of the documents' lengths. If `longest * documents` is T, all have that length.

    Returns: (1, T, heads, head_dim).
    """
    package, _ = _package()
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
