"""The elementwise half of a decoder layer as pure functions: norms, rotation, gated activation, and their gradients.

Between its matrix products a decoder layer reads and writes whole activations many times for next to no arithmetic.
Each function here is one pass over them, forward or backward, written in plain PyTorch: that is the reference, and
what a CPU runs. On a GPU in half precision its Triton twin in `ops.layer_kernels` runs instead. Sums are taken in
float32 (float64 for float64), outputs have the inputs' dtype.

What goes on into a projection can be written with `pad`: so many columns more than it has, whose values mean
nothing yet and which `precision.projection` fills. The pass has to write its rows anyhow, and so they need no copy.
For a projection in 8 bits it leaves a `measure` of each row there (`ops.measure`).

Source of the formulas: RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467; rotary positions in halves as in
GPT-NeoX, Su et al. 2021, arXiv:2104.09864; SwiGLU, Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from loratune.ops.measure import Measure, leave

P = ParamSpec("P")
R = TypeVar("R")


def with_kernel(
    usable: Callable[..., bool], module: str = "ops.layer_kernels"
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a reference that has a Triton twin of the same name in `loratune.<module>`.

    Args:
        usable: whether the twin can take these arguments.
    """

    def mark(reference: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if usable(*args, **kwargs):
                # Imported here because Triton is installed with PyTorch for CUDA only.
                kernels = importlib.import_module(f"loratune.{module}")
                twin: Callable[P, R] = getattr(kernels, reference.__name__)
                return twin(*args, **kwargs)
            return reference(*args, **kwargs)

        return call

    return mark


def half_on_gpu(x: Tensor, *_: object, **__: object) -> bool:
    """Whether a pass over rows like these has a Triton twin."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] <= 1 << 16


def _whole_heads(x: Tensor, *_: object, **__: object) -> bool:
    half = x.shape[-1] // 2
    return half_on_gpu(x) and half & (half - 1) == 0


def wide(x: Tensor) -> Tensor:
    """x in the precision in which sums are taken."""
    return x if x.dtype == torch.float64 else x.float()


@with_kernel(half_on_gpu)
def rms_norm(x: Tensor, weight: Tensor, eps: float, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; (N, d) -> (N, d + pad)."""
    x32 = wide(x)
    unit = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _padded(weight * unit, pad, measure)


@with_kernel(half_on_gpu)
def add_rms_norm(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """x + y, (N, d), and its norm, (N, d + pad)."""
    total = x + y
    x32 = wide(total)
    unit = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return total, _padded(weight * unit, pad, measure)


@with_kernel(half_on_gpu)
def rms_norm_backward(
    d_out: Tensor,
    d_residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    pad: int = 0,
    measure: Measure | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of x through its norm and past it, and the norm once more (cheaper than to keep it).

    Args:
        d_out: (N, d), gradient of `rms_norm(x)`.
        d_residual: (N, d), gradient of x itself, along the residual stream.
    Returns: gradient of x, (N, d + pad), and rms_norm(x), (N, d).
    """
    x32 = wide(x)
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    unit = x32 * inverse
    d_unit = wide(d_out) * wide(weight)
    d_x = inverse * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    return _padded((d_x + wide(d_residual)).to(x.dtype), pad, measure), weight * unit.to(x.dtype)


@with_kernel(half_on_gpu)
def swiglu(gate_up: Tensor, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """silu(gate) * up; (N, 2 m) with the gate first -> (N, m + pad)."""
    gate, up = gate_up.chunk(2, -1)
    return _padded(torch.nn.functional.silu(wide(gate)).to(gate.dtype) * up, pad, measure)


@with_kernel(half_on_gpu)
def swiglu_backward(
    gate_up: Tensor, d_out: Tensor, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `gate_up`, (N, 2 m + pad), and `swiglu(gate_up)` once more, (N, m)."""
    gate, up = gate_up.chunk(2, -1)
    gate32, up32, d32 = wide(gate), wide(up), wide(d_out)
    sigmoid = torch.sigmoid(gate32)
    silu = gate32 * sigmoid
    d_gate = d32 * up32 * (sigmoid + silu * (1 - sigmoid))
    d_gate_up = torch.cat([d_gate, d32 * silu], -1).to(gate.dtype)
    return _padded(d_gate_up, pad, measure), silu.to(gate.dtype) * up


@with_kernel(_whole_heads)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotated: int, weight: Tensor | None, eps: float) -> Tensor:
    """Turns the first `rotated` heads by their positions; the others, the values, stay as they are.

    Args:
        x: (T, heads, head_dim).
        cos, sin: (T, head_dim).
        weight: (rotated, head_dim) of a norm over each head before it is turned, or None for no norm.
    Returns: (T, heads, head_dim); without a norm it may take the place of x.
    """
    head = wide(x[:, :rotated])
    if weight is not None:
        head = head * torch.rsqrt(head.square().mean(-1, keepdim=True) + eps)
        head = wide(weight * head.to(x.dtype))
    turned = head * wide(cos)[:, None] + _quarter_turn(head) * wide(sin)[:, None]
    return torch.cat([turned.to(x.dtype), x[:, rotated:]], 1)


@with_kernel(_whole_heads)
def rotate_backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    eps: float,
    pad: int = 0,
    measure: Measure | None = None,
) -> Tensor:
    """Gradient of the argument of `rotate` from those of its three parts.

    Args:
        d_query, d_key, d_value: (T, heads of each, head_dim).
        x: (T, heads, head_dim), the argument, needed only where there is a norm.
    Returns: (T, heads * head_dim + pad).
    """
    d_turned = wide(torch.cat([d_query, d_key], 1))
    d_head = d_turned * wide(cos)[:, None] - _quarter_turn(d_turned * wide(sin)[:, None])
    if weight is not None:
        assert x is not None
        x32 = wide(x[:, : d_head.shape[1]])
        inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        unit, d_unit = x32 * inverse, d_head * wide(weight)
        d_head = inverse * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
    return _padded(torch.cat([d_head.to(d_value.dtype), d_value], 1).flatten(1), pad, measure)


def _quarter_turn(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the two halves of each head; its transpose is its negative."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _padded(x: Tensor, pad: int, measure: Measure | None) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, pad)) if pad else x
    if measure is not None:
        leave(padded, x.shape[1], measure)
    return padded
