"""Rows cut into chunks, and functions that are computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


class Chunks(NamedTuple):
    """Documents of a row that is cut into chunks of L tokens, C of them. All masks are boolean."""

    pairs: Tensor
    """(C, L, L): token j is in the document of token i, and not behind it."""
    from_start: Tensor
    """(C, L): the state before the chunk reaches token i."""
    to_end: Tensor
    """(C, L): token j reaches the state after the chunk."""
    through: Tensor
    """(C,): the state before the chunk reaches the state after it."""

    @classmethod
    def of(cls, positions: Tensor, length: int) -> Chunks:
        """The chunks of a row. `positions` has a multiple of `length` elements."""
        starts = (positions == 0).view(-1, length).cumsum(-1)
        causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
        last = starts[:, -1:]
        return cls(
            (starts[:, :, None] == starts[:, None, :]) & causal, starts == 0, starts == last, (last == 0).squeeze(-1)
        )


def padded(x: Tensor, length: int, dim: int) -> Tensor:
    """x with zeros behind its end along `dim`, to a multiple of `length`."""
    missing = -x.shape[dim] % length
    return x if not missing else pad(x, (0, 0) * (x.dim() - 1 - dim % x.dim()) + (0, missing))


def decays(total: Tensor, since: Tensor, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(total - since) where allowed, else 0.

    `total` and `since` are running sums of logarithms in float64. They grow along the row, and the difference of two
    large float32 numbers would have no digits left.
    """
    return (total - since).to(dtype).masked_fill(~allowed, -torch.inf).exp()


def working_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 if x is float64: states sum over thousands of tokens."""
    return torch.promote_types(x.dtype, torch.float32)


def recomputed(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """function(*tensors), which saves only its arguments and is computed again in the backward.

    The function is differentiable, pure and draws no random numbers. Tensors that are not floating point get no
    gradient.
    """
    out: tuple[Tensor, ...] = _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
            outputs = ctx.function(*inputs)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if y.requires_grad]
        found = iter(torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
