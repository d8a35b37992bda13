"""Attention on PyTorch's meta device: it allocates like the kernels that run, and computes nothing.

Written out on that device, attention would allocate a square of scores that no kernel has. In half precision it
allocates like the kernels of a GPU, in higher precision like PyTorch's kernel for a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PADDING = 128
"""Tokens that FlashAttention's backward adds to each document, where documents differ in length."""


def attend(query: Tensor, key: Tensor, value: Tensor, documents: int) -> Tensor:
    """The output of attention without values, (1, T, heads, value head_dim).

    Args:
        query, key: (1, heads, T, head_dim) and (1, kv_heads, T, head_dim).
        value: (1, kv_heads, T, value head_dim).
        documents: documents of different lengths; 0 if all documents of the row have the same length.
    Memory: saves query, key, value and the output; on a GPU also the float32 logsumexp of each position and head.
    """
    kernel: type[torch.autograd.Function] = _OnGpu
    if query.dtype.itemsize > 2:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        kernel = _OnCpu
    out: Tensor = kernel.apply(query, key, value, documents)
    return out


class _OnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: int) -> Tensor:
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, value.shape[-1])
        logsumexp = query.new_empty(heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.documents = documents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the queries is summed in float32.

        Keys and values that several query heads share get gradients summed in float32, or one gradient for each
        query head. Kernels differ, and the larger of both is counted.
        """
        query, key, value, *_ = ctx.saved_tensors
        _, heads, tokens, dim = query.shape
        padded = tokens + _PADDING * ctx.documents
        gradients = [tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2) for tensor in (query, key, value)]
        sums = [query.new_empty(padded, heads, dim, dtype=torch.float32)]
        sums.append(query.new_empty(2, padded, heads, dtype=torch.float32))  # two numbers per query
        if key.shape[1] != heads:
            columns = dim + value.shape[-1]
            in_float32, of_each_head = 4 * padded * key.shape[1] * columns, 2 * tokens * heads * columns
            sums.append(query.new_empty(max(in_float32, of_each_head), dtype=torch.uint8))
        return *gradients, None


class _OnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, _: int) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
