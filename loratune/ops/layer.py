"""The elementwise half of a decoder layer as pure functions: norms, activations, rotation, and their gradients.

Between its matrix products a decoder layer reads and writes whole activations many times for little arithmetic. Each
function here is one pass over them, forward or backward, in plain PyTorch. It is the reference, and it runs on a CPU.
On a GPU in half precision its Triton twin runs instead (`ops.norm_kernels`, `ops.activation_kernels`,
`ops.rotary_kernels`). Sums are in float32 (float64 for float64). Outputs have the dtype of the inputs and are rounded
where the modules of transformers round. Rotation is the exception: it rounds once, and the modules round three times.

Shapes: N tokens of width d. Two arguments prepare an output for the projection that reads it:

    pad        columns appended to each row; their values are undefined until `precision.projection` fills them. The
               pass writes the rows anyway, so the projection needs no copy.
    measure    for a projection in 8 bits: the row's maximum and sum of squares go into these columns (`ops.measure`)

Sources: RMSNorm, Zhang and Sennrich 2019, arXiv:1910.07467; LayerNorm, Ba et al. 2016, arXiv:1607.06450; rotary
positions, Su et al. 2021, arXiv:2104.09864; gated activations, Shazeer 2020, arXiv:2002.05202; GELU, Hendrycks and
Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from loratune.ops.dispatch import at_least_float32, half_on_gpu, with_kernel
from loratune.ops.measure import Measure, store_statistics

ActivationKind = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[ActivationKind, ...] = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class NormSpec:
    """A norm with frozen weights, and where its module rounds."""

    weight: Tensor | None
    """(d,), or (heads, head_dim) in a `HeadSpec`; None for no scale."""
    eps: float
    kind: Literal["rms", "layer", "none"] = "rms"
    """"none" is the identity, for layers that read the residual stream itself (OLMo 2)."""
    bias: Tensor | None = None
    """(d,); LayerNorm only."""
    offset: float = 0.0
    """Added to the weight: 1 in Gemma."""
    round_first: bool = True
    """RMS only: the unit vector is rounded to x's dtype before it is multiplied by the weight, as in Llama. False
    multiplies in float32 and rounds once, as in Gemma and OLMo 2."""

    def is_identity(self, pad: int, measure: Measure | None) -> bool:
        """True if the result is the argument itself, without a copy."""
        return self.kind == "none" and pad == 0 and measure is None


IDENTITY = NormSpec(None, 0.0, "none")
MAX_HEADS = 1 << 15
"""Largest row of heads, in elements, that one program of a twin can normalise over its whole width."""


@dataclass(frozen=True)
class HeadSpec:
    """Division of a row of stacked queries, keys and values into heads; norm and rotation of the heads."""

    query: int
    """Query heads."""
    key_value: int
    """Key heads, and as many value heads."""
    dim: int
    """Elements of a head."""
    rotary_dim: int
    """Leading elements of query and key heads that are rotated; 0 for none."""
    interleaved: bool = False
    """Pairs are neighbours (0, 1), (2, 3) as in GLM-4, not the two halves."""
    norm: NormSpec | None = None
    """RMS norm of query and key heads before the rotation; weight (query + key_value, dim)."""
    whole_width: bool = False
    """The norm runs over all query columns and over all key columns (OLMo 2), not over each head."""
    grouped: bool = False
    """Each key head is followed by its value head and preceded by its query heads, as in GPT-NeoX. False: all
    queries, then all keys, then all values."""

    @property
    def rotated(self) -> int:
        """Number of query and key heads."""
        return self.query + self.key_value

    @property
    def total(self) -> int:
        """Number of heads in a row."""
        return self.query + 2 * self.key_value

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, total, dim) -> queries, keys and values, (T, heads of each, dim); views unless heads share keys."""
        if not self.grouped:
            query, key, value = x.split([self.query, self.key_value, self.key_value], 1)
            return query, key, value
        each = self.query // self.key_value
        group = x.unflatten(1, (self.key_value, each + 2))
        return group[:, :, :each].flatten(1, 2), group[:, :, each], group[:, :, each + 1]

    def join(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The inverse of `split`, in new memory."""
        if not self.grouped:
            return torch.cat([query, key, value], 1)
        parts = (query.unflatten(1, (self.key_value, -1)), key[:, :, None], value[:, :, None])
        return torch.cat(parts, 2).flatten(1, 2)


@with_kernel(half_on_gpu, "ops.norm_kernels")
def norm(x: Tensor, spec: NormSpec, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """The norm of x, (N, d) -> (N, d + pad). An identity that adds nothing to the rows returns x itself."""
    return x if spec.is_identity(pad, measure) else _padded(_normalised(x, spec), pad, measure)


@with_kernel(half_on_gpu, "ops.norm_kernels")
def add_norm(
    x: Tensor, y: Tensor, spec: NormSpec, pad: int = 0, measure: Measure | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x + scale * y, (N, d), and its norm, (N, d + pad)."""
    total = _sum(x, y, scale)
    return total, norm(total, spec, pad, measure)


@with_kernel(half_on_gpu, "ops.norm_kernels")
def post_norm_add(x: Tensor, y: Tensor, post: NormSpec, scale: float = 1.0) -> Tensor:
    """x + scale * norm(y), (N, d): a branch whose output is normalised before it joins the residual stream."""
    return _sum(x, _normalised(y, post), scale)


@with_kernel(half_on_gpu, "ops.norm_kernels")
def post_norm_add_norm(
    x: Tensor,
    y: Tensor,
    post: NormSpec,
    spec: NormSpec,
    pad: int = 0,
    measure: Measure | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """h = x + scale * norm(y; post), (N, d), and norm(h; spec), (N, d + pad)."""
    total = _sum(x, _normalised(y, post), scale)
    return total, norm(total, spec, pad, measure)


@with_kernel(half_on_gpu, "ops.norm_kernels")
def norm_backward(
    d_out: Tensor, d_residual: Tensor, x: Tensor, spec: NormSpec, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of x, through its norm and along the residual stream, and the recomputed norm.

    Recomputing the norm costs less than saving it, because the pass reads x anyway.

    Args:
        d_out: (N, d), gradient of `norm(x)`; rows may be strided.
        d_residual: (N, d), gradient of x along the residual stream; rows may be strided.
    Returns: gradient of x, (N, d + pad), and norm(x), (N, d).
    """
    d_x = _through_norm(at_least_float32(d_out), x, spec) + at_least_float32(d_residual)
    return _padded(d_x.to(x.dtype), pad, measure), norm(x, spec)


@with_kernel(half_on_gpu, "ops.norm_kernels")
def post_norm_backward(
    d_h: Tensor, y: Tensor, post: NormSpec, scale: float = 1.0, pad: int = 0, measure: Measure | None = None
) -> Tensor:
    """Gradient of y in h = x + scale * norm(y; post), (N, d + pad).

    Args:
        d_h: (N, d), gradient of h; rows may be strided.
        y: (N, d); not read if `post` is the identity.
    """
    d_normed = at_least_float32(d_h) if scale == 1.0 else at_least_float32(d_h) * scale
    return _padded(_through_norm(d_normed, y, post).to(d_h.dtype), pad, measure)


@with_kernel(half_on_gpu, "ops.activation_kernels")
def gated(gate_up: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """activation(gate) * up, (N, m + pad), for `gate_up` (N, 2 m) with the gate first."""
    gate, up = gate_up.chunk(2, -1)
    return _padded(gated_product(gate, up, kind), pad, measure)


@with_kernel(half_on_gpu, "ops.activation_kernels")
def gated_backward(
    gate_up: Tensor, d_out: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `gate_up`, (N, 2 m + pad), and `gated(gate_up)` again, (N, m)."""
    gate, up = gate_up.chunk(2, -1)
    d_gate_up = torch.cat(gated_product_backward(d_out, gate, up, kind), -1)
    return _padded(d_gate_up, pad, measure), gated_product(gate, up, kind)


@with_kernel(half_on_gpu, "ops.activation_kernels")
def gated_product(gate: Tensor, up: Tensor, kind: ActivationKind) -> Tensor:
    """activation(gate) * up, (N, m), for gate and up in separate tensors; rows may be strided."""
    return _active(at_least_float32(gate), kind).to(gate.dtype) * up


@with_kernel(half_on_gpu, "ops.activation_kernels")
def gated_product_backward(d_out: Tensor, gate: Tensor, up: Tensor, kind: ActivationKind) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (N, m) each."""
    x, d = at_least_float32(gate), at_least_float32(d_out)
    active = _active(x, kind)
    return (d * at_least_float32(up) * _slope(x, active, kind)).to(gate.dtype), (d * active).to(up.dtype)


@with_kernel(half_on_gpu, "ops.activation_kernels")
def activation(x: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None) -> Tensor:
    """activation(x), (N, m) -> (N, m + pad), for MLPs without a gate."""
    return _padded(_active(at_least_float32(x), kind).to(x.dtype), pad, measure)


@with_kernel(half_on_gpu, "ops.activation_kernels")
def activation_backward(
    x: Tensor, d_out: Tensor, kind: ActivationKind, pad: int = 0, measure: Measure | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of x, (N, m + pad), and `activation(x)` again, (N, m)."""
    x32 = at_least_float32(x)
    active = _active(x32, kind)
    d_x = at_least_float32(d_out) * _slope(x32, active, kind)
    return _padded(d_x.to(x.dtype), pad, measure), active.to(x.dtype)


def rotatable(x: Tensor, cos: Tensor | None, sin: Tensor | None, heads: HeadSpec) -> bool:
    """True if `rotate_heads` has a twin for these heads."""
    return half_on_gpu(x) and heads.dim % 2 == 0 and not (heads.whole_width and heads.total * heads.dim > MAX_HEADS)


@with_kernel(rotatable, "ops.rotary_kernels")
def rotate_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, heads: HeadSpec) -> Tensor:
    """Normalises and rotates the query and key heads of each token; value heads stay.

    Args:
        x: (T, heads.total, dim).
        cos, sin: (T, rotary_dim), as the model's rotary module makes them; None if `rotary_dim` is 0. With
            interleaved pairs only the first half of the columns is read.
    Returns: (T, heads.total, dim); x itself, overwritten, if there is no norm.
    """
    query, key, value = heads.split(x)
    if heads.norm is not None:
        query, key = _normalised_heads(query, key, heads, heads.norm)
    rotated = _rotated(at_least_float32(torch.cat([query, key], 1)), cos, sin, heads, transposed=False).to(x.dtype)
    query, key = rotated.split([heads.query, heads.key_value], 1)
    out = heads.join(query, key, value)
    return x.copy_(out) if heads.norm is None else out


@with_kernel(
    lambda d_query, d_key, d_value, cos, sin, x, heads, *_, **__: rotatable(d_query, cos, sin, heads),
    "ops.rotary_kernels",
)
def rotate_heads_backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    x: Tensor | None,
    heads: HeadSpec,
    pad: int = 0,
    measure: Measure | None = None,
) -> Tensor:
    """Gradient of the argument of `rotate_heads`, (T, heads.total * dim + pad).

    Args:
        d_query, d_key, d_value: (T, heads of each, dim); tokens and heads may be strided.
        x: (T, heads.total, dim), the argument of `rotate_heads`; read only if there is a norm.
    """
    d_heads = _rotated(at_least_float32(torch.cat([d_query, d_key], 1)), cos, sin, heads, transposed=True)
    if heads.norm is not None:
        assert x is not None
        query, key, _ = heads.split(x)
        d_heads = _through_head_norm(d_heads, torch.cat([query, key], 1), heads, heads.norm)
    d_query, d_key = d_heads.to(d_value.dtype).split([heads.query, heads.key_value], 1)
    return _padded(heads.join(d_query, d_key, d_value).flatten(1), pad, measure)


def _normalised(x: Tensor, spec: NormSpec) -> Tensor:
    """The norm over the last dimension, with the module's rounding."""
    if spec.kind == "none":
        return x
    if spec.kind == "layer":
        return functional.layer_norm(x, x.shape[-1:], spec.weight, spec.bias, spec.eps)
    x32 = at_least_float32(x)
    unit = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + spec.eps)
    if spec.weight is None:
        return unit.to(x.dtype)
    if spec.round_first:
        weight = spec.weight + spec.offset if spec.offset else spec.weight
        return (weight * unit.to(x.dtype)).to(x.dtype)
    return (unit * _norm_weight(spec.weight, spec)).to(x.dtype)


def _through_norm(d_out: Tensor, x: Tensor, spec: NormSpec) -> Tensor:
    """Gradient of x from the gradient of its norm, both in the precision of sums."""
    if spec.kind == "none":
        return d_out
    x32 = at_least_float32(x)
    d_unit = d_out if spec.weight is None else d_out * _norm_weight(spec.weight, spec)
    if spec.kind == "layer":
        x32 = x32 - x32.mean(-1, keepdim=True)
        d_unit = d_unit - d_unit.mean(-1, keepdim=True)
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + spec.eps)
    unit = x32 * inverse
    return inverse * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))


def _norm_weight(weight: Tensor, spec: NormSpec) -> Tensor:
    return at_least_float32(weight) + spec.offset if spec.offset else at_least_float32(weight)


def _sum(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """x + scale * y; the product is rounded as in a module that multiplies and then adds."""
    return x + y if scale == 1.0 else x + y * scale


def _normalised_heads(query: Tensor, key: Tensor, heads: HeadSpec, spec: NormSpec) -> tuple[Tensor, Tensor]:
    assert spec.weight is not None
    parts = zip((query, key), spec.weight.split([heads.query, heads.key_value]), strict=True)
    if heads.whole_width:
        whole = (_normalised(x.flatten(1), replace(spec, weight=w.flatten())).view(x.shape) for x, w in parts)
        query, key = whole
    else:
        query, key = (_normalised(x, replace(spec, weight=w)) for x, w in parts)
    return query, key


def _through_head_norm(d_heads: Tensor, x: Tensor, heads: HeadSpec, spec: NormSpec) -> Tensor:
    """Gradient of query and key heads before their norm, (T, query + key_value, dim)."""
    if not heads.whole_width:
        return _through_norm(d_heads, x, spec)
    assert spec.weight is not None
    sizes = [heads.query, heads.key_value]
    parts = zip(d_heads.split(sizes, 1), x.split(sizes, 1), spec.weight.split(sizes), strict=True)
    through = [_through_norm(d.flatten(1), x.flatten(1), replace(spec, weight=w.flatten())) for d, x, w in parts]
    return torch.cat(through, 1).view(d_heads.shape)


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, heads: HeadSpec, *, transposed: bool) -> Tensor:
    """x, (T, heads, dim), times the rotation matrix of each token, or its transpose; in the precision of sums."""
    if cos is None or sin is None or heads.rotary_dim == 0:
        return x
    pairs, rest = x[..., : heads.rotary_dim], x[..., heads.rotary_dim :]
    cosine, sine = (at_least_float32(table)[:, None] for table in (cos, sin))
    if heads.interleaved:
        cosine, sine = (t[..., : heads.rotary_dim // 2].repeat_interleave(2, -1) for t in (cosine, sine))
    if transposed:
        rotated = pairs * cosine - _quarter_turn(pairs * sine, heads.interleaved)
    else:
        rotated = pairs * cosine + _quarter_turn(pairs, heads.interleaved) * sine
    return torch.cat([rotated, rest], -1)


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    """(a, b) -> (-b, a) for each pair of a head; the transpose of this map is its negative."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _active(x: Tensor, kind: ActivationKind) -> Tensor:
    if kind == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _slope(x: Tensor, active: Tensor, kind: ActivationKind) -> Tensor:
    """Derivative of the activation at x."""
    if kind == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid + active * (1 - sigmoid)
    if kind == "gelu":
        below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    factor = math.sqrt(2 / math.pi)
    tanh = torch.tanh(factor * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * factor * (1 + 3 * 0.044715 * x * x)


def _padded(x: Tensor, pad: int, measure: Measure | None) -> Tensor:
    padded = functional.pad(x, (0, pad)) if pad else x
    if measure is not None:
        store_statistics(padded, x.shape[1], measure)
    return padded
