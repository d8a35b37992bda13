"""Several adapters in one packed row: each token meets its own adapter and no other.

    y += scaling_s · drop(x) A_sᵀ B_sᵀ        for the tokens of slot s

A row is divided into segments, each of one slot. The whole row shares the frozen product; low-rank parts run segment
by segment. No number of one slot is multiplied with a number of another slot, not even with zero. So a slot with NaN
or infinite numbers does not change a bit of the others.

Three products do all the work, in plain PyTorch here and, on a GPU, in Triton (`ops.bank.kernels`):

    down        (T, width) x (r, width) -> (T, r)         x Aᵀ, dy B
    up          (T, r) x (r, width) -> (T, width)         added to y or dx by the frozen product
    gradients   (T, r), (T, width) -> += (r, width)       of A and of B transposed

The low-rank part is computed first, and the frozen product is added onto it (`ops.frozen`). So y is written once
less. If the product sums in float32, as on a CPU, it also preserves small updates, which adding to a rounded y would
lose.

The gradient of one slot is summed in the order of its own tokens, without atomics: the same bits in every run.

Source: Hu et al. 2021, arXiv:2106.09685; segments with grouped products follow Punica (Chen et al. 2023,
arXiv:2310.18547), which serves adapters; here they train.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.ops import dispatch
from loratune.ops.bank.pool import BankLayer, BankPool, Segment, SlotWeights
from loratune.ops.dropout import keep_mask, row_key
from loratune.ops.frozen import FrozenWeight
from loratune.ops.projection import Activation, LinkedActivation, PaddedActivation, ProjectionBackward
from loratune.ops.shape import own_shape
from loratune.ops.state import ForwardState


@dataclass(frozen=True)
class BankProjection:
    """Stacked frozen weights with the low-rank updates of all slots; implements `ops.projection.Projection`.

    Gradients of the adapters are added to the pool.
    """

    frozen: FrozenWeight
    """(D, d_in)"""
    bias: Tensor | None
    """(D,)"""
    pool: BankPool
    layers: Sequence[BankLayer]
    """Members that have an entry in the pool."""
    rows: Sequence[slice]
    """Rows of the weight that belong to each member."""
    defers_output: bool = False
    """The output lacks the low-rank part, which `BankActivation` adds."""
    defers_d_input: bool = False
    """The gradient of the input lacks the low-rank part, which `BankActivation` adds."""
    pad_columns: int = 0
    measure_x: None = None
    measure_dy: None = None
    state: ForwardState = field(default_factory=ForwardState)
    """State of the forward that runs this projection."""

    def with_dropout(self, row: Tensor) -> BankProjection:
        """Returns itself: the segments hold each slot's dropout."""
        return self

    def from_token(self, first: int) -> BankProjection:
        """Returns itself: rows of a bank are not cut into tiles (`fused.layer`)."""
        assert first == 0
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, d_in) -> output (N, D), and drop(x) Aᵀ, (N, members * max_rank)."""
        if not self.pool.segments:
            return self.frozen.forward(x, self.bias, mm=self.state.products.mm), None
        low_rank = down_forward(self, x)
        onto = None if self.defers_output else up_forward(self, low_rank)
        return self.frozen.forward(x, self.bias, onto, self.state.products.mm), low_rank

    def backward(self, dy: Tensor) -> BankBackward:
        """Starts the backward for dy, (N, D)."""
        return BankBackward(self, dy, down_backward(self, dy) if self.pool.segments else None)


@dataclass(frozen=True)
class BankBackward:
    """Backward of a `BankProjection`; implements `ops.projection.ProjectionBackward`."""

    projection: BankProjection
    dy: Tensor
    """(N, D)"""
    d_low_rank: Tensor | None
    """(N, members * max_rank)"""

    def d_input(self) -> Tensor:
        """(N, d_in)"""
        p = self.projection
        if self.d_low_rank is None or p.defers_d_input:
            return p.frozen.d_input(self.dy, mm=p.state.products.mm)
        return p.frozen.d_input(self.dy, up_backward(p, self.d_low_rank), p.state.products.mm)

    def d_adapters(self, x: Tensor, low_rank: Tensor | None) -> list[Tensor]:
        """Adds the gradients to the pool. Returns the gradient of `BankPool.entry`, which has no elements."""
        if self.d_low_rank is not None and low_rank is not None:
            add_gradients(self.projection, self.dy, self.d_low_rank, x, low_rank)
        return [self.projection.pool.entry.detach()]


@dataclass(frozen=True)
class BankActivation:
    """SwiGLU that adds the low-rank parts of both projections around it; implements `LinkedActivation`.

    Adding a low-rank part to a wide tensor reads and writes the tensor once more. On a GPU the activation's kernel
    adds it instead (`ops.bank.swiglu_kernels`). So the first projection defers the low-rank part of its output, and
    the second one that of its input gradient.
    """

    first: BankProjection
    second: BankProjection
    activation: Activation

    def forward(self, y: Tensor, low_rank: Tensor | None) -> Tensor:
        """(N, 2 m) -> (N, m)."""
        if low_rank is None:
            return self.activation.forward(y, 0, None)
        return swiglu(self.first, y, low_rank, self.activation)

    def backward(
        self, y: Tensor, low_rank: Tensor | None, d_out: Tensor, following: ProjectionBackward
    ) -> tuple[Tensor, Tensor]:
        """Gradient of y, (N, 2 m), and the activation, (N, m)."""
        if low_rank is None or following.d_low_rank is None:
            return self.activation.backward(y, d_out, 0, None)
        d_low_rank = following.d_low_rank
        return swiglu_backward(self.first, y, low_rank, d_out, self.second, d_low_rank, self.activation)


def linked(
    first: BankProjection, activation: Activation, second: BankProjection
) -> tuple[BankProjection, LinkedActivation, BankProjection]:
    """Both projections of an MLP and the activation between them. On a GPU, SwiGLU adds their low-rank parts."""
    if first.pool.tables is None or not activation.gated or activation.kind != "silu":
        return first, PaddedActivation(activation, first, second), second
    first, second = replace(first, defers_output=True), replace(second, defers_d_input=True)
    return first, BankActivation(first, second, activation), second


def down_forward(p: BankProjection, x: Tensor) -> Tensor:
    """drop(x) Aᵀ; (N, d_in) -> (N, members * max_rank). Only the columns of each token's own rank are written."""
    if p.pool.tables is not None:
        return p.pool.tables.down_forward(p, x)  # type: ignore[no-any-return]
    low_rank = x.new_empty(x.shape[0], len(p.layers) * p.pool.max_rank)
    for segment, member, part, at in _pieces(p):
        x_s = x[segment.start : segment.stop]
        torch.mm(_dropped(p.pool, segment, p.layers[member], x_s), part.A.to(x.dtype).T, out=low_rank[at])
    return low_rank


def up_forward(p: BankProjection, low_rank: Tensor) -> Tensor:
    """scaling · low_rank Bᵀ, (N, D); zero where a token has no adapter."""
    if p.pool.tables is not None:
        return p.pool.tables.up_forward(p, low_rank)  # type: ignore[no-any-return]
    y = low_rank.new_zeros(low_rank.shape[0], p.frozen.shape[0])
    for segment, member, part, at in _pieces(p):
        y[segment.start : segment.stop, p.rows[member]].addmm_(low_rank[at], part.B.to(y.dtype), alpha=part.scaling)
    return y


def down_backward(p: BankProjection, dy: Tensor) -> Tensor:
    """scaling · dy B; (N, D) -> (N, members * max_rank)."""
    if p.pool.tables is not None:
        return p.pool.tables.down_backward(p, dy)  # type: ignore[no-any-return]
    d_low_rank = dy.new_empty(dy.shape[0], len(p.layers) * p.pool.max_rank)
    for segment, member, part, at in _pieces(p):
        dy_s = dy[segment.start : segment.stop, p.rows[member]]
        d_low_rank[at] = (dy_s @ part.B.to(dy.dtype).T).mul_(part.scaling)
    return d_low_rank


def up_backward(p: BankProjection, d_low_rank: Tensor) -> Tensor:
    """drop'(d_low_rank A), (N, d_in); zero where a token has no adapter."""
    if p.pool.tables is not None:
        return p.pool.tables.up_backward(p, d_low_rank)  # type: ignore[no-any-return]
    dx = d_low_rank.new_zeros(d_low_rank.shape[0], p.frozen.shape[1])
    for segment, member, part, at in _pieces(p):
        dx_s = dx[segment.start : segment.stop]
        probability = _probability(p.pool, segment)
        if probability == 0.0:
            dx_s.addmm_(d_low_rank[at], part.A.to(dx.dtype))
        else:
            mask = _mask(p.pool, segment, p.layers[member])
            dx_s.add_((d_low_rank[at] @ part.A.to(dx.dtype)).mul_(mask), alpha=1 / (1 - probability))
    return dx


def add_gradients(p: BankProjection, dy: Tensor, d_low_rank: Tensor, x: Tensor, low_rank: Tensor) -> None:
    """dA += d_low_rankᵀ drop(x) and dB += scaling · low_rankᵀ dy, each slot's over its own tokens."""
    if p.pool.tables is not None:
        p.pool.tables.add_gradients(p, dy, d_low_rank, x, low_rank)
        return
    for segment, member, part, at in _pieces(p):
        tokens = slice(segment.start, segment.stop)
        dropped = _dropped(p.pool, segment, p.layers[member], x[tokens])
        part.dA.addmm_(dispatch.at_least_float32(d_low_rank[at]).T, dispatch.at_least_float32(dropped))
        dy_s = dispatch.at_least_float32(dy[tokens, p.rows[member]])
        part.dB.addmm_(dispatch.at_least_float32(low_rank[at]).T, dy_s, alpha=part.scaling)


def swiglu(p: BankProjection, gate_up: Tensor, low_rank: Tensor, activation: Activation) -> Tensor:
    """activation(gate_up + the low-rank part); (N, 2 m) from a `p` that defers its output -> (N, m)."""
    if p.pool.tables is not None:
        made: Tensor = _swiglu_kernels().swiglu(p, gate_up, low_rank)
        return made
    return activation.forward(gate_up + up_forward(p, low_rank), 0, None)


def swiglu_backward(
    p: BankProjection,
    gate_up: Tensor,
    low_rank: Tensor,
    d_active: Tensor,
    following: BankProjection,
    d_low_rank: Tensor,
    activation: Activation,
) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up, (N, 2 m), and the activation, (N, m); both neighbours deferred their low-rank part.

    Args:
        gate_up, low_rank: results of `p`, as in `swiglu`.
        d_active, d_low_rank: gradients of the activation, (N, m), and of the low-rank activation of `following`.
    """
    if p.pool.tables is not None:
        kernels = _swiglu_kernels()
        made: tuple[Tensor, Tensor] = kernels.swiglu_backward(p, gate_up, low_rank, d_active, following, d_low_rank)
        return made
    whole, d_whole = gate_up + up_forward(p, low_rank), d_active + up_backward(following, d_low_rank)
    return activation.backward(whole, d_whole, 0, None)


def _swiglu_kernels() -> ModuleType:
    return importlib.import_module("loratune.ops.bank.swiglu_kernels")  # imports Triton


def _pieces(p: BankProjection) -> Iterator[tuple[Segment, int, SlotWeights, tuple[slice, slice]]]:
    """Segment, member, weights and place in the low-rank activation, for each piece of work."""
    for segment in p.pool.segments:
        for member, layer in enumerate(p.layers):
            part = layer.parts.get(segment.slot)
            if part is not None:
                first = member * p.pool.max_rank
                columns = slice(first, first + part.A.shape[0])
                yield segment, member, part, (slice(segment.start, segment.stop), columns)


def _probability(pool: BankPool, segment: Segment) -> float:
    return 0.0 if segment.key is None else pool.dropout[segment.slot]


def _mask(pool: BankPool, segment: Segment, layer: BankLayer) -> Tensor:
    assert segment.key is not None
    row = row_key(segment.key, segment.position, pool.device)
    return keep_mask(row, layer.salt, (segment.stop - segment.start, layer.d_in), pool.dropout[segment.slot])


def _dropped(pool: BankPool, segment: Segment, layer: BankLayer, x: Tensor) -> Tensor:
    """The segment's input after dropout."""
    probability = _probability(pool, segment)
    return x if probability == 0.0 else (x * _mask(pool, segment, layer)).mul_(1 / (1 - probability))


def bank_linear(x: Tensor, projection: BankProjection) -> Tensor:
    """A linear layer with the updates of all slots, as one autograd node; (..., d_in) -> (..., D).

    The backward adds the adapters' gradients to the pool, for the segments that are set when it runs.
    """
    x = x.to(projection.frozen.dtype)
    if torch.is_grad_enabled():
        out: Tensor = _BankLinear.apply(x, projection.pool.entry, projection)  # type: ignore[no-untyped-call]
        return out
    return projection.forward(x.reshape(-1, x.shape[-1]))[0].view(*x.shape[:-1], -1)


class _BankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, entry: Tensor, projection: BankProjection) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, low_rank = projection.forward(rows)
        ctx.save_for_backward(rows if low_rank is not None else None, low_rank)
        ctx.projection, ctx.x_shape = projection, x.shape
        return own_shape(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, low_rank = ctx.saved_tensors
        backward = ctx.projection.backward(dy.reshape(-1, dy.shape[-1]))
        (d_entry,) = backward.d_adapters(rows, low_rank)
        dx = backward.d_input().view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return dx, d_entry, None
