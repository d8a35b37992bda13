"""The low-rank update of a frozen linear map, as one autograd node in plain PyTorch.

    y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ

Written as modules, this takes three products, a scaling and a sum, each with an output-sized tensor and an entry in
the autograd graph. Here the low-rank part is computed first and the frozen product is added onto it inside its own
sums, and dx likewise. Beyond y, dx and the gradients there are only (rows, r) intermediates.

The order matters. In the first steps the update is smaller than half a unit in the last place of y, so adding it to a
y that is already rounded to half precision would lose most of it.

Tensors that the backward does not need are not saved: x only if A has a gradient, W never. The low-rank products have
kernels on a GPU (`ops.low_rank`).

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, arXiv:2106.09685.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.errors import AdapterError
from loratune.ops.dropout import drop
from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.low_rank import AdapterSlices, down_project, gradients
from loratune.ops.shape import own_shape
from loratune.ops.state import ForwardState


def lora_linear(
    x: Tensor,
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    salt: int = 0,
    state: ForwardState | None = None,
) -> Tensor:
    """Frozen linear map plus low-rank update: x Wᵀ + b + scaling · (drop(x) Aᵀ) Bᵀ.

    Args:
        x: (..., d_in), any float dtype; under autocast it is cast to autocast's dtype first.
        weight: frozen W (d_out, d_in), dtype of x, any strides; never receives a gradient. For other forms than a
            matrix (`ops.frozen`), x is cast to the weight's dtype and autocast is ignored.
        bias: (d_out,) or None; receives a gradient if it requires one.
        lora_A, lora_B: (r, d_in) and (d_out, r), any float dtype (masters are float32). Products run in x's dtype,
            gradients have the masters' dtype.
        scaling: dimensionless; lora_alpha / r, or lora_alpha / √r with rsLoRA.
        dropout: probability in [0, 1) of zeroing an element of the adapter's input; 0 outside of training. Follows
            the row key in `state`, or torch's global generator if there is none.
        salt: number of this layer, hashed together with the row key (`ops.dropout.layer_salt`).
        state: state of the current forward; None makes one for this call, which costs additional launches on a GPU.

    Returns: (..., d_out), dtype of x.
    Raises: AdapterError: A and B disagree on r, or do not fit W.
    Memory: saves x, x Aᵀ and, with dropout, a byte per element of x; never forms B A (d_out, d_in).
        Differentiable once.
    Source: Hu et al. 2021, section 4.1, arXiv:2106.09685.
    """
    d_out, d_in = weight.shape
    if lora_A.shape[1] != d_in or lora_B.shape[0] != d_out or lora_A.shape[0] != lora_B.shape[1]:
        raise AdapterError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit a weight of shape "
            f"{(d_out, d_in)}; they must be (r, {d_in}) and ({d_out}, r)"
        )
    if not isinstance(weight, Tensor):
        x = x.to(weight.dtype)
        bias = None if bias is None else bias.to(weight.dtype)
    elif not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    state = state or ForwardState()
    if torch.is_grad_enabled():
        out: Tensor = _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout, salt, state)  # type: ignore[no-untyped-call]
        return out
    rows = x.reshape(-1, d_in)
    return _forward(rows, weight, bias, lora_A, lora_B, scaling, dropout, salt, state)[0].view(*x.shape[:-1], d_out)


def _forward(
    rows: Tensor,  # (N, d_in)
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    salt: int,
    state: ForwardState,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y (N, d_out), the low-rank activation drop(x) Aᵀ (N, r), and the mask of kept elements (N, d_in)."""
    kept, mask = drop(rows, dropout, salt, state.dropout_row) if dropout > 0.0 else (rows, None)
    low_rank = down_project(kept, lora_A.to(rows.dtype).T, buffers=state.buffers)
    frozen = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    update = rows.new_empty(rows.shape[0], lora_B.shape[0])
    update.addmm_(low_rank, lora_B.to(rows.dtype).T, beta=0, alpha=scaling)
    return frozen.forward(rows, bias, update), low_rank, mask


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | FrozenWeight,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
        salt: int,
        state: ForwardState,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, low_rank, mask = _forward(rows, weight, bias, lora_A, lora_B, scaling, dropout, salt, state)
        needs_x, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            rows if needs_A else None,
            low_rank if needs_B else None,
            weight if needs_x and isinstance(weight, Tensor) else None,  # autograd then detects a change in place
            lora_A if needs_x else None,
            lora_B if needs_x or needs_A else None,
            mask,
        )
        ctx.frozen, ctx.buffers = None if isinstance(weight, Tensor) else weight, state.buffers
        ctx.scaling, ctx.keep_scale, ctx.x_shape = scaling, 1.0 / (1.0 - dropout), x.shape
        ctx.master_dtypes = lora_A.dtype, lora_B.dtype
        return own_shape(out, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, low_rank, weight, lora_A, lora_B, mask = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        dtype_A, dtype_B = ctx.master_dtypes
        dy = dy.reshape(-1, dy.shape[-1])
        dx = d_bias = dA = dB = None
        if needs_x or needs_A:
            d_low_rank = down_project(dy, lora_B.to(dy.dtype), buffers=ctx.buffers).mul_(ctx.scaling)  # (N, r)
        if needs_A:
            kept = rows if mask is None else (rows * mask).mul_(ctx.keep_scale)
        if needs_A and needs_B:
            layout = AdapterSlices([slice(0, dy.shape[1])], [slice(0, low_rank.shape[1])], [ctx.scaling])
            dA, dB = gradients(kept, d_low_rank, dy, low_rank, layout, buffers=ctx.buffers)
        elif needs_A:
            dA = d_low_rank.T @ kept
        elif needs_B:
            dB = (dy.T @ low_rank).to(dtype_B).mul_(ctx.scaling)
        if needs_x:
            frozen = DenseWeight(weight) if ctx.frozen is None else ctx.frozen
            d_update = (d_low_rank if mask is None else d_low_rank * ctx.keep_scale) @ lora_A.to(dy.dtype)
            dx = frozen.d_input(dy, d_update if mask is None else d_update.mul_(mask)).view(ctx.x_shape)
        if needs_bias:
            d_bias = dy.sum(0)
        dA, dB = None if dA is None else dA.to(dtype_A), None if dB is None else dB.to(dtype_B)
        return dx, None, d_bias, dA, dB, None, None, None, None
