"""A mixture of experts with frozen weights and one low-rank pair per expert, as one autograd node.

    out[t] = sum over j of p[t, j] · ( act( x[t] W1 + b1 ) W2 + b2 )      W1, W2, b1, b2 of expert index[t, j]
    W = W_frozen + scaling · (B A)ᵀ                                       for each expert

Rows are sorted by expert, and each product is one grouped product: the rows of an expert meet the weights of that
expert. No update B A is ever formed, nothing waits for the device, and all shapes are fixed, so a step can be a CUDA
graph. W is frozen, so the backward has the products with Wᵀ and, for each expert, the small products of A and B.
Biases are added by the passes that read the products anyway: the activation, and the sum over choices.

Beyond x, routing and result, the forward saves the first product and the low-rank activations. The
gradient of the router's weights needs no output of the second projection, because

    <d_out, act W2>  =  <d_out W2ᵀ, act>

and the right side is a step of the backward anyway.

Layout of A and B: those of PEFT's files. A is (E r, d_in), row e r + j; B is (d_out, r E), column j E + e.
Source: Hu et al. 2021, arXiv:2106.09685; grouped products as in Gale et al. 2022, arXiv:2211.15841.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.ops.dispatch import at_least_float32, on_gpu, with_kernel
from loratune.ops.gates import ExpertGate

_HOPPER = 9
_ALIGNMENT = 16
_FEW_ROWS = 64
"""Rows of an average expert, below which PyTorch's grouped product is not used."""


@dataclass(frozen=True)
class Routing:
    """Pairs of token and expert, sorted by expert. Pair t k + j is choice j of token t."""

    order: Tensor
    """(S,) int64: the pair at each sorted place"""
    places: Tensor
    """(S,) int64: the sorted place of each pair"""
    tokens: Tensor
    """(S,) int64: the token at each sorted place"""
    experts: Tensor
    """(S,) int64: the expert at each sorted place, ascending"""
    ends: Tensor
    """(E,) int32: end of each expert's places"""


class ExpertWeights(Protocol):
    """Frozen weights of one projection of all experts, in any form in memory."""

    @property
    def experts(self) -> int:
        """E"""

    @property
    def bias(self) -> Tensor | None:
        """(E, d_out) or None."""

    def dense(self) -> Tensor:
        """(E, d_in, d_out) in the compute dtype, of any strides: the tensor held, or one made now."""


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """The adapter of one projection."""

    lora_A: Tensor
    """(E r, d_in)"""
    lora_B: Tensor
    """(d_out, r E)"""
    scaling: float


@dataclass(frozen=True, slots=True)
class _Copies:
    """Working copies of one adapter."""

    A: Tensor
    """(E, r, d_in)"""
    B: Tensor
    """(E, d_out, r), times the scaling"""


def _has_route_kernel(index: Tensor, experts: int) -> bool:
    return on_gpu(index)


@with_kernel(_has_route_kernel, "ops.experts_kernels")
def route(index: Tensor, experts: int) -> Routing:
    """Sorts pairs by expert; index: (T, k) int64, the experts of each token, below `experts`. The sort is stable."""
    sorted_experts, order = index.reshape(-1).sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0], device=order.device)
    numbers = torch.arange(experts, device=index.device, dtype=index.dtype)
    ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
    return Routing(order, places, order // index.shape[1], sorted_experts, ends)


def mixture(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    gate: ExpertGate,
    pairs: tuple[ExpertPair | None, ExpertPair | None] = (None, None),
) -> Tensor:
    """Output of all experts, (T, d), dtype of x. Differentiable once: in x, weights, and A and B of `pairs`.

    Args:
        x: (T, d), the tokens.
        index: (T, k) int64, the experts of each token. E or more means no expert: that choice adds nothing.
        weights: (T, k), the factors of the experts' outputs; any float dtype.
        up, down: first and second projection, d -> m' and m -> d.
        gate: (S, m') -> (S, m), row by row; without parameters that train.
        pairs: adapters of `up` and `down`, masters of any float dtype.
    """
    nothing = index >= up.experts
    index, weights = index.clamp(max=up.experts - 1), weights.masked_fill(nothing, 0.0)
    tensors = [t for pair in pairs for t in ((None, None) if pair is None else (pair.lora_A, pair.lora_B))]
    scalings = tuple(0.0 if pair is None else pair.scaling for pair in pairs)
    out: Tensor = _Mixture.apply(x, index, weights, up, down, gate, scalings, *tensors)  # type: ignore[no-untyped-call]
    return out


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        up: ExpertWeights,
        down: ExpertWeights,
        gate: ExpertGate,
        scalings: tuple[float, float],
        *masters: Tensor | None,
    ) -> Tensor:
        routing = route(index, up.experts)
        up_copies = _working_copies(masters[:2], scalings[0], up.experts, x.dtype)
        down_copies = _working_copies(masters[2:], scalings[1], up.experts, x.dtype)
        hidden, up_low = _project(x, up, up_copies, routing, routing.tokens)
        active = gate.forward(hidden, up.bias, routing.experts)
        rows, down_low = _project(active, down, down_copies, routing, None)
        ctx.save_for_backward(x, weights, hidden, up_low, down_low, *masters)
        ctx.routing, ctx.up, ctx.down, ctx.gate, ctx.scalings = routing, up, down, gate, scalings
        return combine(rows, routing.places.view_as(index), weights, down.bias, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, hidden, up_low, down_low, *masters = ctx.saved_tensors
        routing, up, down, scalings = ctx.routing, ctx.up, ctx.down, ctx.scalings
        d_out = d_out.contiguous()
        copies = _working_copies(masters[2:], scalings[1], up.experts, x.dtype)
        d_active, d_low = _project_back(d_out, down, copies, routing, routing.tokens)
        factors = weights.reshape(-1)[routing.order]
        d_hidden, d_factors, active = ctx.gate.backward(
            hidden, up.bias, routing.experts, d_active, factors, copies is not None
        )
        del d_active
        d_weights = None
        if ctx.needs_input_grad[2]:
            d_weights = _of_factors(d_factors, d_out, down, routing).to(weights.dtype)
            d_weights = d_weights[routing.places].view_as(weights)
        d_down_A = d_down_B = d_up_A = d_up_B = None
        if copies is not None:
            factor = factors[:, None].to(x.dtype)
            d_down_A, d_down_B = _gradients(
                active, d_low * factor, d_out, down_low * factor, masters[2:], scalings[1], routing, None,
                routing.tokens,
            )  # fmt: skip
        del active
        copies = _working_copies(masters[:2], scalings[0], up.experts, x.dtype)
        need_x = ctx.needs_input_grad[0]
        d_rows, d_low = _project_back(d_hidden, up, copies, routing, None, needed=need_x)
        if copies is not None:
            d_up_A, d_up_B = _gradients(
                x, d_low, d_hidden, up_low, masters[:2], scalings[0], routing, routing.tokens, None
            )
        d_x = combine(d_rows, routing.places.view_as(weights), None) if need_x else None
        return d_x, None, d_weights, None, None, None, None, d_up_A, d_up_B, d_down_A, d_down_B


def _working_copies(
    masters: Sequence[Tensor | None], scaling: float, experts: int, dtype: torch.dtype
) -> _Copies | None:
    lora_A, lora_B = masters
    if lora_A is None or lora_B is None:
        return None
    B = lora_B.view(lora_B.shape[0], -1, experts).permute(2, 0, 1)
    scaled = torch.empty(B.shape, dtype=dtype, device=B.device)
    torch.mul(B, scaling, out=scaled) if B.dtype == dtype else scaled.copy_(B).mul_(scaling)
    return _Copies(lora_A.to(dtype).view(experts, -1, lora_A.shape[1]), scaled)


def _project(
    x: Tensor, weights: ExpertWeights, copies: _Copies | None, routing: Routing, rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The projection of each sorted row without its bias, (S, d_out), and x Aᵀ, (S, r)."""
    if copies is None:
        return plain_product(x, weights.dense(), routing.ends, rows), None
    low = grouped_product(x, copies.A.transpose(1, 2), routing.ends, rows)
    return grouped_product(x, weights.dense(), routing.ends, rows, low, copies.B.transpose(1, 2)), low


def _project_back(
    dy: Tensor,
    weights: ExpertWeights,
    copies: _Copies | None,
    routing: Routing,
    rows: Tensor | None,
    *,
    needed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the projection's input, (S, d_in), and dy B, (S, r)."""
    low = None if copies is None else grouped_product(dy, copies.B, routing.ends, rows)
    if not needed:
        return dy, low
    transposed = weights.dense().transpose(1, 2)
    if copies is None:
        return plain_product(dy, transposed, routing.ends, rows), low
    return grouped_product(dy, transposed, routing.ends, rows, low, copies.A), low


def _of_factors(found: Tensor, d_out: Tensor, down: ExpertWeights, routing: Routing) -> Tensor:
    """Gradient of the factor of each sorted row, (S,), from that without a bias."""
    if down.bias is not None:  # <d_out, b> for each token and expert is one small product
        table = d_out @ down.bias.to(d_out.dtype).T
        found = found + table.view(-1)[routing.tokens * table.shape[1] + routing.experts]
    return found


def _gradients(
    x: Tensor,
    d_low: Tensor | None,
    dy: Tensor,
    low: Tensor | None,
    masters: Sequence[Tensor],
    scaling: float,
    routing: Routing,
    x_rows: Tensor | None,
    dy_rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of A and B in the masters' layout and dtype, from dy B and x Aᵀ, (S, r) each."""
    assert d_low is not None
    assert low is not None
    lora_A, lora_B = masters
    dA = grouped_outer(d_low, x, routing.ends, x_rows)
    dB = grouped_outer(low, dy, routing.ends, dy_rows, expert_last=True, scale=scaling)
    return dA.reshape(lora_A.shape).to(lora_A.dtype), dB.permute(2, 1, 0).reshape(lora_B.shape).to(lora_B.dtype)


def plain_product(x: Tensor, weight: Tensor, ends: Tensor, rows: Tensor | None = None) -> Tensor:
    """`grouped_product` without a second product: by PyTorch where that is faster, else by our kernel.

    On an H200 PyTorch's takes 0.75 to 0.85 of our kernel's time, with the copy of the rows that it needs
    (`benchmarks/experts.py`, `products`). On other GPUs it may wait for the device, so it is used on this kind alone.
    """
    if not torch_product_fits(x, weight, (x if rows is None else rows).shape[0]):
        return grouped_product(x, weight, ends, rows)
    return torch.nn.functional.grouped_mm(x if rows is None else x[rows], weight, offs=ends)


def torch_product_fits(x: Tensor, weight: Tensor, count: int) -> bool:
    """Whether PyTorch's grouped product takes these operands and is used for `count` rows; see `plain_product`."""
    experts, depth, width = weight.shape
    if not (on_gpu(x) and x.dtype == weight.dtype == torch.bfloat16 and count >= _FEW_ROWS * experts):
        return False
    across, down = sorted(weight.stride()[1:])
    sizes = x.stride(0), depth, width, down, weight.stride(0)
    if across != 1 or x.stride(1) != 1 or any(size * x.element_size() % _ALIGNMENT for size in sizes):
        return False
    if x.is_meta:
        return True
    aligned = all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in (x, weight))
    return aligned and torch.cuda.get_device_capability(x.device)[0] == _HOPPER


def _has_product_kernel(x: Tensor, *_: object, **__: object) -> bool:
    return on_gpu(x) and x.dtype != torch.float64


@with_kernel(_has_product_kernel, "ops.experts_kernels")
def grouped_product(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Tensor | None = None,
    low: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Each sorted row times the matrix of its expert: x[rows] W, plus low · added; (S, d_out).

    Args:
        x: (S, d_in), or (T, d_in) with `rows`.
        weight: (E, d_in, d_out), dtype of x, of any strides.
        ends: (E,) int32, end of each expert's rows.
        rows: (S,) int64, the row of x at each sorted place.
        low, added: (S, r) and (E, r, d_out), a second product that is added before the sum is rounded.
    """
    out = x.new_empty((x if rows is None else rows).shape[0], weight.shape[2])
    for expert, part in _groups(ends, x):
        taken = x[part] if rows is None else x[rows[part]]
        if low is None or added is None:
            torch.mm(taken, weight[expert], out=out[part])
        else:
            torch.addmm(low[part] @ added[expert], taken, weight[expert], out=out[part])
    return out


@with_kernel(_has_product_kernel, "ops.experts_kernels")
def grouped_outer(
    low: Tensor,
    x: Tensor,
    ends: Tensor,
    rows: Tensor | None = None,
    expert_last: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """scale · lowᵀ x[rows] over the rows of each expert: (S, r) and (S, d) -> (E, r, d), float32 at least.

    Args:
        rows: as for `grouped_product`.
        expert_last: the result is a view of a tensor (d, r, E), the layout of B in PEFT's files.
    """
    experts, r, d = ends.shape[0], low.shape[1], x.shape[1]
    shape = (d, r, experts) if expert_last else (experts, r, d)
    out = torch.zeros(shape, dtype=at_least_float32(x[:0]).dtype, device=x.device)
    out = out.permute(2, 1, 0) if expert_last else out
    for expert, part in _groups(ends, x):
        taken = x[part] if rows is None else x[rows[part]]
        out[expert] = (low[part].T.to(out.dtype) @ taken.to(out.dtype)) * scale
    return out


@with_kernel(_has_product_kernel, "ops.experts_kernels")
def combine(
    rows: Tensor,
    places: Tensor,
    weights: Tensor | None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Sum over a token's choices of weight times (row plus bias), (T, d), rounded once to the dtype of `rows`.

    Args:
        rows: (S, d), sorted by expert.
        places: (T, k) int64, the sorted place of each choice.
        weights: (T, k) or None for ones.
        bias, index: (E, d) and (T, k) int64, the expert of each choice; or both None.
    """
    taken = at_least_float32(rows[places])
    if bias is not None and index is not None:
        taken = taken + bias.to(taken.dtype)[index]
    if weights is not None:
        taken = taken * weights.to(taken.dtype)[..., None]
    return taken.sum(1).to(rows.dtype)


def _groups(ends: Tensor, x: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts with rows, and their rows. Waits for the device; tensors without data have no groups."""
    begin = 0
    for expert, end in enumerate([] if x.is_meta else ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end
