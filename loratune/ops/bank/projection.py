"""Several adapters in one packed row: each token meets its own adapter and no other.

    y += scaling_s · drop(x) A_sᵀ B_sᵀ        for the tokens of slot s

A row is divided into segments, each of one slot. The frozen product is shared by the whole row, the low-rank parts
run segment by segment: nothing of one slot is multiplied with a token or a gradient of another, not even by zero, so
a slot whose numbers are NaN or infinite leaves the others as they are, to the bit.

All numbers of all slots lie in three flat tensors (`Pool`): float32 masters, their gradients, and on a GPU working
copies in the compute dtype; B is held transposed, so that both factors are (r, width) matrices of contiguous rows.
A slot's weights are one slice of the pool, so that clipping, updating, saving and clearing a slot are each one call.

Three products do all the work, in plain PyTorch here and, on a GPU, in Triton (`ops.bank.kernels`):

    thin    (T, width) x (r, width) -> (T, r)         x Aᵀ, dy B
    wide    (T, r) x (r, width) -> (T, width)         what the frozen product then adds y or dx to
    outer   (T, r), (T, width) -> += (r, width)       gradients of A and of B transposed

The low-rank part comes first and the frozen product is added onto it (`ops.frozen`): y is written once less, and
where the product sums in float32, as on a CPU, small updates arrive that adding to a rounded y would lose.

The gradient of one slot is summed in the order of its own tokens, without atomics: the same bits in every run.

Source: Hu et al. 2021, arXiv:2106.09685; the idea of segments with grouped products follows Punica (Chen et al.
2023, arXiv:2310.18547), which serves adapters; here they train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.ops import layer
from loratune.ops.dispatch import wide
from loratune.ops.dropout import keep_mask, row_key
from loratune.ops.frozen import FrozenWeight
from loratune.ops.projection import Activation, LinkedActivation, PaddedActivation, ProjectionBackward
from loratune.ops.state import ForwardState


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of a row, which belong to one slot."""

    slot: int
    start: int
    stop: int
    key: int | None = None
    """`ops.dropout.dropout_key` of the slot's seed and step; None for no dropout."""
    position: int = 0
    """Number of the first token within the slot's own step; what dropout is keyed by."""


@dataclass(frozen=True)
class Part:
    """One slot's low-rank weights at one layer: views of the pool."""

    A: Tensor
    """(r, d_in)"""
    B: Tensor
    """(r, d_out), the transpose of lora_B."""
    dA: Tensor
    dB: Tensor
    scaling: float


@dataclass
class Lane:
    """One linear layer's place in the pool."""

    index: int
    """Its row in the pool's tables."""
    salt: int
    """`ops.dropout.layer_salt`"""
    d_in: int
    d_out: int
    parts: dict[int, Part] = field(default_factory=dict)
    """Slot -> its weights here; slots that do not adapt this layer are missing."""


class Pool:
    """The numbers of all slots, and the segments of the row that is running."""

    def __init__(
        self, starts: Sequence[int], lanes: int, max_rank: int, dtype: torch.dtype, like: FrozenWeight
    ) -> None:
        """Args:
        starts: (slots + 1,) where each slot's slice of the flat tensors begins, and their length.
        lanes: how many layers have a place.
        max_rank: of any slot at any layer.
        dtype: of the masters.
        like: a frozen weight on the device and in the compute dtype of the layers.
        """
        self.starts, self.max_rank, self.device = list(starts), max_rank, like.device
        self.master = torch.zeros(starts[-1], dtype=dtype, device=like.device)
        self.gradient = torch.zeros_like(self.master)
        self.dropout = [0.0] * (len(starts) - 1)
        self.segments: tuple[Segment, ...] = ()
        self.entry = torch.empty(0, device=like.device, requires_grad=True)
        """Brings the backward to the first layer, whose input needs no gradient; it has no elements."""
        self.tables: Any = None
        if like.device.type == "cuda" and like.dtype in (torch.bfloat16, torch.float16):
            from loratune.ops.bank.kernels import Tables  # imports Triton

            self.tables = Tables(self, lanes, like.dtype)

    def slot(self, flat: Tensor, slot: int) -> Tensor:
        """The slice of a flat tensor that belongs to `slot`."""
        return flat[self.starts[slot] : self.starts[slot + 1]]

    def refresh(self) -> None:
        """Brings the working copies up to the masters, where there are any: one launch."""
        if self.tables is not None:
            self.tables.work.copy_(self.master)


@dataclass(frozen=True)
class BankProjection:
    """Stacked frozen weights with the low-rank updates of all slots; implements `ops.projection.Projection`.

    Gradients of the adapters are added to the pool.
    """

    frozen: FrozenWeight
    """(D, d_in)"""
    bias: Tensor | None
    """(D,)"""
    pool: Pool
    lanes: Sequence[Lane]
    """Members that have an entry in the pool."""
    rows: Sequence[slice]
    """Rows of the weight that belong to each of them."""
    defers_output: bool = False
    """The output lacks the low-rank part, which `BankActivation` adds."""
    defers_d_input: bool = False
    """The gradient of the input lacks the low-rank part, which `BankActivation` adds."""
    pad_columns: int = 0
    measure_x: None = None
    measure_dy: None = None
    state: ForwardState = field(default_factory=ForwardState)
    """Of the forward that this projection is part of."""

    def with_dropout(self, row: Tensor) -> BankProjection:
        """Unchanged: the segments hold each slot's dropout."""
        return self

    def from_token(self, first: int) -> BankProjection:
        """Unchanged: rows of a bank are not cut into tiles (`fused.layer`)."""
        assert first == 0
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, d_in) -> output (N, D), and drop(x) Aᵀ, (N, members * max_rank)."""
        if not self.pool.segments:
            return self.frozen.forward(x, self.bias, mm=self.state.products.mm), None
        low_rank = thin_forward(self, x)
        onto = None if self.defers_output else wide_forward(self, low_rank)
        return self.frozen.forward(x, self.bias, onto, self.state.products.mm), low_rank

    def backward(self, dy: Tensor) -> BankBackward:
        """Starts the backward for dy, (N, D)."""
        return BankBackward(self, dy, thin_backward(self, dy) if self.pool.segments else None)


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
        return p.frozen.d_input(self.dy, wide_backward(p, self.d_low_rank), p.state.products.mm)

    def d_adapters(self, x: Tensor, low_rank: Tensor | None) -> list[Tensor]:
        """Adds the gradients to the pool. Returns the gradient of `Pool.entry`, which has no elements."""
        if self.d_low_rank is not None and low_rank is not None:
            outer(self.projection, self.dy, self.d_low_rank, x, low_rank)
        return [self.projection.pool.entry.detach()]


@dataclass(frozen=True)
class BankActivation:
    """SwiGLU that adds the low-rank parts of both projections around it; implements `LinkedActivation`.

    Adding a low-rank part to a wide tensor reads and writes the tensor once more. On a GPU the activation's kernel
    adds it instead (`ops.bank.swiglu_kernels`), so the first projection defers its output's low-rank part and the
    second one that of its input gradient.
    """

    first: BankProjection
    second: BankProjection
    activation: Activation

    def forward(self, y: Tensor, low_rank: Tensor | None) -> Tensor:
        """(N, 2 m) -> (N, m)."""
        if low_rank is None:
            return self.activation.forward(y, 0, None)
        return swiglu(self.first, y, low_rank)

    def backward(
        self, y: Tensor, low_rank: Tensor | None, d_out: Tensor, following: ProjectionBackward
    ) -> tuple[Tensor, Tensor]:
        """Gradient of y, (N, 2 m), and the activation, (N, m)."""
        if low_rank is None or following.d_low_rank is None:
            return self.activation.backward(y, d_out, 0, None)
        return swiglu_backward(self.first, y, low_rank, d_out, self.second, following.d_low_rank)


def linked(
    first: BankProjection, activation: Activation, second: BankProjection
) -> tuple[BankProjection, LinkedActivation, BankProjection]:
    """Both projections of an MLP and the activation between them, with low-rank parts deferred where that pays."""
    if first.pool.tables is None or not activation.gated or activation.kind != "silu":
        return first, PaddedActivation(activation, first, second), second
    first, second = replace(first, defers_output=True), replace(second, defers_d_input=True)
    return first, BankActivation(first, second, activation), second


def thin_forward(p: BankProjection, x: Tensor) -> Tensor:
    """drop(x) Aᵀ; (N, d_in) -> (N, members * max_rank), only the columns of each token's own rank written."""
    if p.pool.tables is not None:
        return p.pool.tables.thin_forward(p, x)  # type: ignore[no-any-return]
    inner = x.new_empty(x.shape[0], len(p.lanes) * p.pool.max_rank)
    for segment, member, part, at in _pieces(p):
        x_s = x[segment.start : segment.stop]
        torch.mm(_dropped(p.pool, segment, p.lanes[member], x_s), part.A.to(x.dtype).T, out=inner[at])
    return inner


def wide_forward(p: BankProjection, inner: Tensor) -> Tensor:
    """scaling · inner Bᵀ, (N, D); zero where a token has no adapter."""
    if p.pool.tables is not None:
        return p.pool.tables.wide_forward(p, inner)  # type: ignore[no-any-return]
    y = inner.new_zeros(inner.shape[0], p.frozen.shape[0])
    for segment, member, part, at in _pieces(p):
        y[segment.start : segment.stop, p.rows[member]].addmm_(inner[at], part.B.to(y.dtype), alpha=part.scaling)
    return y


def thin_backward(p: BankProjection, dy: Tensor) -> Tensor:
    """scaling · dy B; (N, D) -> (N, members * max_rank)."""
    if p.pool.tables is not None:
        return p.pool.tables.thin_backward(p, dy)  # type: ignore[no-any-return]
    d_inner = dy.new_empty(dy.shape[0], len(p.lanes) * p.pool.max_rank)
    for segment, member, part, at in _pieces(p):
        dy_s = dy[segment.start : segment.stop, p.rows[member]]
        d_inner[at] = (dy_s @ part.B.to(dy.dtype).T).mul_(part.scaling)
    return d_inner


def wide_backward(p: BankProjection, d_inner: Tensor) -> Tensor:
    """drop'(d_inner A), (N, d_in); zero where a token has no adapter."""
    if p.pool.tables is not None:
        return p.pool.tables.wide_backward(p, d_inner)  # type: ignore[no-any-return]
    dx = d_inner.new_zeros(d_inner.shape[0], p.frozen.shape[1])
    for segment, member, part, at in _pieces(p):
        dx_s = dx[segment.start : segment.stop]
        probability = _probability(p.pool, segment)
        if probability == 0.0:
            dx_s.addmm_(d_inner[at], part.A.to(dx.dtype))
        else:
            kept = _mask(p.pool, segment, p.lanes[member])
            dx_s.add_((d_inner[at] @ part.A.to(dx.dtype)).mul_(kept), alpha=1 / (1 - probability))
    return dx


def outer(p: BankProjection, dy: Tensor, d_inner: Tensor, x: Tensor, inner: Tensor) -> None:
    """dA += d_innerᵀ drop(x) and dB += scaling · innerᵀ dy, each slot's over its own tokens."""
    if p.pool.tables is not None:
        p.pool.tables.outer(p, dy, d_inner, x, inner)
        return
    for segment, member, part, at in _pieces(p):
        tokens = slice(segment.start, segment.stop)
        kept = _dropped(p.pool, segment, p.lanes[member], x[tokens])
        part.dA.addmm_(wide(d_inner[at]).T, wide(kept))
        part.dB.addmm_(wide(inner[at]).T, wide(dy[tokens, p.rows[member]]), alpha=part.scaling)


def swiglu(p: BankProjection, gate_up: Tensor, inner: Tensor) -> Tensor:
    """swiglu(gate_up + the low-rank part); (N, 2 m), as a `p` that leaves its output gave it -> (N, m)."""
    if p.pool.tables is not None:
        return p.pool.tables.swiglu(p, gate_up, inner)  # type: ignore[no-any-return]
    return layer.gated(gate_up + wide_forward(p, inner), "silu")


def swiglu_backward(
    p: BankProjection, gate_up: Tensor, inner: Tensor, d_active: Tensor, after: BankProjection, d_inner: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up, (N, 2 m), and swiglu of them, (N, m); both neighbours leave their part to this.

    Args:
        gate_up, inner: of `p`, as in `swiglu`.
        d_active, d_inner: gradients of the activation, (N, m), and of the inner activation of `after`.
    """
    if p.pool.tables is not None:
        return p.pool.tables.swiglu_backward(p, gate_up, inner, d_active, after, d_inner)  # type: ignore[no-any-return]
    return layer.gated_backward(gate_up + wide_forward(p, inner), d_active + wide_backward(after, d_inner), "silu")


def _pieces(p: BankProjection) -> Iterator[tuple[Segment, int, Part, tuple[slice, slice]]]:
    """Segment, member, weights and place in the inner activation, for each piece of work there is."""
    for segment in p.pool.segments:
        for member, lane in enumerate(p.lanes):
            part = lane.parts.get(segment.slot)
            if part is not None:
                first = member * p.pool.max_rank
                columns = slice(first, first + part.A.shape[0])
                yield segment, member, part, (slice(segment.start, segment.stop), columns)


def _probability(pool: Pool, segment: Segment) -> float:
    return 0.0 if segment.key is None else pool.dropout[segment.slot]


def _mask(pool: Pool, segment: Segment, lane: Lane) -> Tensor:
    assert segment.key is not None
    row = row_key(segment.key, segment.position, pool.device)
    return keep_mask(row, lane.salt, (segment.stop - segment.start, lane.d_in), pool.dropout[segment.slot])


def _dropped(pool: Pool, segment: Segment, lane: Lane, x: Tensor) -> Tensor:
    """The segment's input behind dropout."""
    probability = _probability(pool, segment)
    return x if probability == 0.0 else (x * _mask(pool, segment, lane)).mul_(1 / (1 - probability))


def bank_linear(x: Tensor, projection: BankProjection) -> Tensor:
    """A linear layer with the updates of all slots, as one autograd node; (..., d_in) -> (..., D).

    The backward adds the adapters' gradients to the pool, with the segments that are set then.
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
        y, inner = projection.forward(rows)
        ctx.save_for_backward(rows if inner is not None else None, inner)
        ctx.projection, ctx.x_shape = projection, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner = ctx.saved_tensors
        backward = ctx.projection.backward(dy.reshape(-1, dy.shape[-1]))
        (d_entry,) = backward.d_adapters(rows, inner)
        dx = backward.d_input().view(ctx.x_shape) if ctx.needs_input_grad[0] else None
        return dx, d_entry, None
