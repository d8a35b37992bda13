"""The low-rank update of a frozen linear map, as one autograd node in plain PyTorch.

    y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ

Written as modules, this would be three products, a scaling and a sum, each with an output-sized tensor of its own
and an entry in the autograd graph. Here the low-rank part comes first and the frozen product is added onto it in its
own sums, and dx likewise, so that beyond y, dx and the gradients there are only (rows, r) intermediates. The order
matters: of an update smaller than half a unit of y, as those of the first steps are, most would be lost if it were
added to a y that has been rounded to half precision. What a backward does not need is not saved: without a gradient
for A the input is let go of, and W never gets a gradient. The thin products have kernels on a GPU (`ops.low_rank`).

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
        weight: frozen W (d_out, d_in), dtype of x; never receives a gradient. A transposed view is fine. In another
            form than a matrix (`ops.frozen`), x is cast to its dtype, whatever autocast says.
        bias: (d_out,) or None; receives a gradient if it requires one.
        lora_A, lora_B: (r, d_in) and (d_out, r), any float dtype (masters are float32). Products run in x's dtype,
            gradients come back in the masters' own.
        scaling: dimensionless; lora_alpha / r, or lora_alpha / √r with rsLoRA.
        dropout: probability in [0, 1) of zeroing an element of the adapter's input; the caller passes 0 outside of
            training. Drawn from torch's global generator, as `torch.nn.functional.dropout` does, unless `state`
            has a row key.
        salt: number of this layer, hashed together with the row key (`ops.dropout.layer_salt`).
        state: state of the forward that this layer is part of; None outside of a packed forward.

    Returns: (..., d_out), dtype of x.
    Raises: AdapterError: A and B disagree on r, or do not fit W.
    Memory: keeps x, x Aᵀ and, with dropout, a byte per element of x for the backward; never forms B A (d_out, d_in).
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
    row = None if state is None else state.dropout_row
    if torch.is_grad_enabled():
        out: Tensor = _LoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout, salt, row)  # type: ignore[no-untyped-call]
        return out
    rows = x.reshape(-1, d_in)
    return _forward(rows, weight, bias, lora_A, lora_B, scaling, dropout, salt, row)[0].view(*x.shape[:-1], d_out)


def _forward(
    rows: Tensor,  # (N, d_in)
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    salt: int,
    row: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y (N, d_out), the inner activation drop(x) Aᵀ (N, r), and the kept elements (N, d_in) bool."""
    kept, mask = drop(rows, dropout, salt, row) if dropout > 0.0 else (rows, None)
    inner = down_project(kept, lora_A.to(rows.dtype).T)
    frozen = DenseWeight(weight) if isinstance(weight, Tensor) else weight
    low = rows.new_empty(rows.shape[0], lora_B.shape[0])
    low.addmm_(inner, lora_B.to(rows.dtype).T, beta=0, alpha=scaling)
    return frozen.forward(rows, bias, low), inner, mask


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
        row: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, inner, mask = _forward(rows, weight, bias, lora_A, lora_B, scaling, dropout, salt, row)
        needs_x, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            rows if needs_A else None,
            inner if needs_B else None,
            weight if needs_x and isinstance(weight, Tensor) else None,  # so that a change in place is noticed
            lora_A if needs_x else None,
            lora_B if needs_x or needs_A else None,
            mask,
        )
        ctx.frozen = None if isinstance(weight, Tensor) else weight
        ctx.scaling, ctx.keep_scale, ctx.x_shape = scaling, 1.0 / (1.0 - dropout), x.shape
        ctx.master_dtypes = lora_A.dtype, lora_B.dtype
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, lora_A, lora_B, mask = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        dtype_A, dtype_B = ctx.master_dtypes
        dy = dy.reshape(-1, dy.shape[-1])
        dx = d_bias = dA = dB = None
        if needs_x or needs_A:
            d_inner = down_project(dy, lora_B.to(dy.dtype)).mul_(ctx.scaling)  # (N, r)
        if needs_A:
            kept = rows if mask is None else (rows * mask).mul_(ctx.keep_scale)
        if needs_A and needs_B:
            whole = AdapterSlices([slice(0, dy.shape[1])], [slice(0, inner.shape[1])], [ctx.scaling])
            dA, dB = gradients(kept, d_inner, dy, inner, whole)
        elif needs_A:
            dA = d_inner.T @ kept
        elif needs_B:
            dB = (dy.T @ inner).to(dtype_B).mul_(ctx.scaling)
        if needs_x:
            frozen = DenseWeight(weight) if ctx.frozen is None else ctx.frozen
            low = (d_inner if mask is None else d_inner * ctx.keep_scale) @ lora_A.to(dy.dtype)
            dx = frozen.d_input(dy, low if mask is None else low.mul_(mask)).view(ctx.x_shape)
        if needs_bias:
            d_bias = dy.sum(0)
        dA, dB = None if dA is None else dA.to(dtype_A), None if dB is None else dB.to(dtype_B)
        return dx, None, d_bias, dA, dB, None, None, None, None
