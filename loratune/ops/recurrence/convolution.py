"""Causal depthwise convolution over a packed row: a token sees the last K tokens of its document.

    y[t] = bias + sum over j < K of weight[:, K-1-j] x[t-j],   j <= position of t

Saves its arguments. The backward is the same sum in the other direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.ops.recurrence.chunks import working_dtype


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
    """Convolves each channel along the tokens of its document.

    Args:
        x: (batch, channels, T), any float dtype and memory layout.
        weight: (channels, K). bias: (channels,) or None.
        positions: (T,) position of each token in its document.

    Returns: as x. The sum is made in float32 at least.
    """
    out: Tensor = _CausalConvolution.apply(x, weight, bias, positions)  # type: ignore[no-untyped-call]
    return out


def _taps(K: int, tokens: int, positions: Tensor) -> list[tuple[int, Tensor]]:
    """Offsets j from 1 that occur, and for tokens from j on whether token t - j is in the document of t."""
    return [(j, positions[j:] >= j) for j in range(1, min(K, tokens))]


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, positions)
        ctx.bias_dtype = None if bias is None else bias.dtype
        dtype, K, tokens = working_dtype(x), weight.shape[1], x.shape[2]
        taps = weight.to(dtype)[:, :, None]
        out = x * taps[:, K - 1]
        if bias is not None:
            out += bias.to(dtype)[:, None]
        for j, inside in _taps(K, tokens, positions):
            out[..., j:].addcmul_(x[..., : tokens - j] * inside, taps[:, K - 1 - j])
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, positions = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        dtype, K, tokens = working_dtype(x), weight.shape[1], x.shape[2]
        dx = d_weight = None
        if need_x:
            taps = weight.to(dtype)[:, :, None]
            total = dy * taps[:, K - 1]
            for j, inside in _taps(K, tokens, positions):
                total[..., : tokens - j].addcmul_(dy[..., j:] * inside, taps[:, K - 1 - j])
            dx = total.to(x.dtype)
        if need_weight:
            d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            d_weight[:, K - 1] = (dy.to(dtype) * x).sum((0, 2))
            for j, inside in _taps(K, tokens, positions):
                d_weight[:, K - 1 - j] = (dy[..., j:].to(dtype) * (x[..., : tokens - j] * inside)).sum((0, 2))
            d_weight = d_weight.to(weight.dtype)
        d_bias = dy.to(dtype).sum((0, 2)).to(ctx.bias_dtype) if need_bias else None
        return dx, d_weight, d_bias, None
