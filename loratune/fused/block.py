"""A decoder layer with LoRA as one autograd node that keeps as much for its backward as it is told to.

    x -> norm -> [q k v] -> (norm of each head) -> rotation -> attention
    x + o(attention) = h,   h + down(swiglu([gate up](norm(h))))

Written as modules, one such layer is about a hundred autograd nodes. What is gained here: projections that read the
same input are one product, W, A and B of all of them side by side; the gradient of that input gathers in one buffer;
norms and activations are recomputed in the pass that computes their gradient instead of being kept; there is almost
nothing left for the host to do; and what else is kept is a choice (`fused.policy`): at most the residual stream, q
k v,
attention's output, its sum with the residual stream, and gate and up; at least the layer's input. What is dropped is
computed again by the very calls of the forward, so that the gradients are the same to the bit.

The gradients are written by hand, and the modules that they stand in for are their reference
(tests/fused/test_layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.fused.policy import TILE, Level, tiles
from loratune.ops import layer
from loratune.ops.attention.recorded import Attend, RecordedAttention
from loratune.ops.host import HostOffload
from loratune.ops.low_rank import GradientOperands, gradients_of
from loratune.ops.measure import Measure
from loratune.ops.projection import LinkedActivation, Projection


@dataclass(frozen=True)
class Heads:
    """How the stacked output of the first projections divides into heads, and what happens to them."""

    query: int
    key_value: int
    dim: int
    norm: Tensor | None
    """(query + key_value, head_dim), weights of the norms of query and key heads, or None."""
    norm_eps: float


@dataclass
class Passage:
    """Between a layer and the one above it, what autograd has no place for.

    Down goes the gradient of the residual stream, with room for what the lower layer adds: autograd hands a gradient
    on in the shape of its tensor, so the buffer around it takes this way beside it. Up goes the stream as the upper
    layer's first norm makes it, for the pass that ends the lower layer has it in hand.
    """

    pad_columns: int
    """Columns that the lower layer's down projection wants, see `precision.projection`."""
    measure: Measure | None = None
    """What it wants to know of each row, see `ops.measure`."""
    above: Above | None = None
    _buffer: Tensor | None = None
    _ahead: tuple[Tensor, int, Tensor] | None = None
    """The stream, its version, and its norm."""

    def enter(self, gradient: Tensor) -> Tensor:
        """(T, d + pad_columns) -> its first d columns, to be returned to autograd."""
        self._buffer = gradient
        return gradient[:, : gradient.shape[1] - self.pad_columns]

    def leave(self, gradient: Tensor) -> Tensor:
        """What autograd handed over, (T, d), with its room if it is what entered."""
        buffer, self._buffer = self._buffer, None
        if buffer is None or buffer.data_ptr() != gradient.data_ptr() or buffer.stride() != gradient.stride():
            return gradient
        return buffer

    def sum(self, h: Tensor, y: Tensor) -> Tensor:
        """h + y, (T, d), the stream that leaves the lower layer; y may be written to."""
        if self.above is None:
            return y.add_(h)
        stream, normed = layer.add_rms_norm(h, y, *self.above)
        self._ahead = stream, stream._version, normed
        return stream

    def normed(self, stream: Tensor) -> Tensor | None:
        """The norm of the stream that reached the upper layer, if it is what left the lower one. Given once."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        left, version, normed = ahead
        same = left.data_ptr() == stream.data_ptr() and left.shape == stream.shape and version == stream._version
        return normed if same else None


class Above(NamedTuple):
    """The first norm of the upper layer, and how what reads its result wants it written."""

    norm: Tensor
    eps: float
    pad_columns: int
    measure: Measure | None


@dataclass(frozen=True)
class Before:
    """What is fixed about the part before attention."""

    projection: Projection
    norm: Tensor
    eps: float
    heads: Heads
    down: Passage
    """To the layer below."""

    @property
    def above(self) -> Above:
        """What the layer below is to know."""
        return Above(self.norm, self.eps, *_padding(self.projection))

    def dropping(self, row: Tensor) -> Before:
        """The same with dropout, see `precision.projection`."""
        return replace(self, projection=self.projection.with_dropout(row))


@dataclass(frozen=True)
class Behind:
    """What is fixed about the part behind attention."""

    output: Projection
    gate_up: Projection
    activation: LinkedActivation
    down: Projection
    norm: Tensor
    eps: float
    up: Passage
    """From the layer above."""

    def dropping(self, row: Tensor) -> Behind:
        """The same with dropout, see `precision.projection`."""
        output, gate_up, down = (p.with_dropout(row) for p in (self.output, self.gate_up, self.down))
        return replace(self, output=output, gate_up=gate_up, down=down)

    def at(self, part: slice) -> Behind:
        """The same for the MLP of some of the row's tokens."""
        return replace(self, gate_up=self.gate_up.from_token(part.start), down=self.down.from_token(part.start))


@dataclass(frozen=True)
class Keep:
    """What one layer keeps, and where."""

    level: Level = Level.NONE
    tile: int = TILE
    """Tokens that run through the MLP at once, where gate and up are not kept."""
    index: int = 0
    """Number of the layer, for the host."""
    host: HostOffload | None = None
    """Where what is kept waits at levels that put it there."""


def decoder_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    before: Before,
    behind: Behind,
    attend: Attend,
    keep: Keep,
    adapters: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> Tensor:
    """One residual stream to the next.

    Args:
        x: (T, d).
        cos, sin: (T, head_dim) of the positions.
        attend: attention by document, see `ops.attention.recorded`.
        keep: what is held for the backward; nothing where gradients are off.
        adapters: the masters before and behind attention, A and B of each member in order; they receive the
            gradients.
    Returns: (T, d).
    """
    if not torch.is_grad_enabled():
        return _forward(x, cos, sin, before, behind, attend, Keep(Level.FULL, keep.tile))[0]
    fixed = before, behind, attend, keep, len(adapters[0])
    out: Tensor = _Layer.apply(x, cos, sin, *fixed, *adapters[0], *adapters[1])  # type: ignore[no-untyped-call]
    return out


@dataclass
class _Kept:
    """What a layer holds from its forward for its backward; None for what will be computed again."""

    inner_down: Tensor | None
    x: Tensor | None = None
    heads: _Turned | None = None
    attended: RecordedAttention | None = None
    stream: tuple[Tensor | None, Tensor | None] | None = None
    """h, (T, d), None while it is on the host, and the inner activation of the output projection."""
    gate_up: tuple[Tensor, Tensor | None] | None = None
    """Gate and up, (T, 2 m), and their inner activation."""


@dataclass
class _Turned:
    """Stacked query, key and value."""

    turned: Tensor | None
    """(T, heads, head_dim), behind the rotation; None once it is not needed any more, or while it is on the host."""
    unturned: Tensor | None
    """As they left the projection, where a norm of each head needs them for its gradient."""
    inner: Tensor | None

    @property
    def whole(self) -> Tensor:
        """What is turned, which must be here."""
        assert self.turned is not None
        return self.turned


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        before: Before,
        behind: Behind,
        attend: Attend,
        keep: Keep,
        adapters_before: int,
        *adapters: Tensor,
    ) -> Tensor:
        out, ctx.kept = _forward(x, cos, sin, before, behind, attend, keep)
        ctx.kept.x = x
        if keep.level.on_host:
            _leave(ctx.kept, keep)
        elif keep.host is not None:
            keep.host.layer_done(keep.index)
        ctx.save_for_backward(cos, sin)
        ctx.fixed = before, behind, attend, keep
        ctx.needs_heads = ctx.needs_input_grad[0] or adapters_before > 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        kept, ctx.kept = ctx.kept, None
        assert kept is not None, "a fused layer runs its backward once"
        cos, sin = ctx.saved_tensors
        before, behind, attend, keep = ctx.fixed
        if keep.level.on_host:
            _return(kept, keep, cos, sin, before.heads)
        elif keep.host is not None:
            keep.host.prefetch_below(keep.index)
        x: Tensor = kept.x
        heads, attended = kept.heads, kept.attended
        if attended is None:
            heads = _turned(x, cos, sin, before)
            attended = RecordedAttention(attend, heads.whole, _split(before.heads))
        kept.heads = kept.attended = None
        d_stream, of_mlp = _mlp_backward(behind.up.leave(dy), attended.out, kept, behind, keep)
        del dy
        (h, inner), kept.stream = kept.stream, None
        del h
        through_output = behind.output.backward(d_stream)
        of_behind = _gradients([through_output.d_adapters(attended.out, inner), *of_mlp])
        of_mlp.clear()  # what it was made of
        below: Tensor | None = None
        of_heads: list[Tensor] = []
        if ctx.needs_heads:
            d_attended = through_output.d_input()
            heads = heads or _turned(x, cos, sin, before)
            d_heads = attended.backward(d_attended, heads.whole)
            heads.turned = None
            del d_attended, attended
            below, of_heads = _heads_backward(d_stream, d_heads, x, cos, sin, heads, before, ctx.needs_input_grad[0])
        return below, None, None, None, None, None, None, None, *of_heads, *of_behind


def _leave(kept: _Kept, keep: Keep) -> None:
    """What is kept sets out for the host: the input and, if they are kept, attention's output and the stream."""
    assert keep.host is not None
    assert kept.x is not None
    tensors = [kept.x]
    if kept.attended is not None and kept.stream is not None:
        h, inner = kept.stream
        assert h is not None
        tensors += [kept.attended.out, h]
        kept.attended.free_out()
        kept.stream = None, inner
    if kept.heads is not None:
        tensors.append(kept.heads.whole if kept.heads.unturned is None else kept.heads.unturned)
        kept.heads = _Turned(None, None, kept.heads.inner)
    kept.x = None
    keep.host.offload(keep.index, *tensors)


def _return(kept: _Kept, keep: Keep, cos: Tensor, sin: Tensor, heads: Heads) -> None:
    """What left is back."""
    assert keep.host is not None
    kept.x, *others = keep.host.fetch(keep.index)
    if kept.attended is not None and kept.stream is not None:
        kept.attended.restore_out(others[0])
        kept.stream = others[1], kept.stream[1]
    if kept.heads is not None:
        y = others[2]
        kept.heads = _Turned(y, None, kept.heads.inner)
        if heads.norm is not None:  # the rotation is a pass over what is here anyway
            kept.heads = _rotated(y, cos, sin, kept.heads.inner, heads)


def _forward(
    x: Tensor, cos: Tensor, sin: Tensor, before: Before, behind: Behind, attend: Attend, keep: Keep
) -> tuple[Tensor, _Kept]:
    """The layer's output, and what `keep` says to hold (but for the input)."""
    level = keep.level
    heads: _Turned | None = _turned(x, cos, sin, before)
    assert heads is not None
    attended = RecordedAttention(attend, heads.whole, _split(before.heads))
    if not level.keeps_heads or level.on_host:
        attended.free_heads()
    if not level.keeps_heads:
        heads = None
    y, inner_output = behind.output.forward(attended.out)
    h, normed = layer.add_rms_norm(x, y, behind.norm, behind.eps, *_padding(behind.gate_up))
    del y
    kept = _Kept(None)
    if level.keeps_attended:
        kept.heads, kept.attended, kept.stream = heads, attended, (h, inner_output)
    del heads, attended
    ys, inners = [], []
    parts = tiles(x.shape[0], x.shape[0] if level.keeps_gate_up else keep.tile)
    for part in parts:
        of_part = behind.at(part)
        gate_up, inner_gate_up = of_part.gate_up.forward(normed[part])
        if part is parts[-1]:
            del normed
        y, inner_down = of_part.down.forward(of_part.activation.forward(gate_up, inner_gate_up))
        if level.keeps_gate_up:
            kept.gate_up = gate_up, inner_gate_up
        del gate_up
        ys.append(y if len(parts) == 1 else y.add_(h[part]))
        inners.append(inner_down)
    kept.inner_down = None if inners[0] is None else _joined([inner for inner in inners if inner is not None])
    return behind.up.sum(h, ys.pop()) if len(parts) == 1 else torch.cat(ys), kept


def _padding(projection: Projection) -> tuple[int, Measure | None]:
    """How an x of this projection is to be written."""
    return projection.pad_columns, projection.measure_x


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, before: Before) -> _Turned:
    """Residual stream to stacked query, key and value."""
    heads = before.heads
    y, inner = before.projection.forward(_normed(x, before))
    return _rotated(y.view(x.shape[0], -1, heads.dim), cos, sin, inner, heads)


def _normed(x: Tensor, before: Before) -> Tensor:
    """The first norm of the stream, (T, d + pad_columns), which the layer below may have made."""
    normed = before.down.normed(x)
    return layer.rms_norm(x, *before.above) if normed is None else normed


def _rotated(y: Tensor, cos: Tensor, sin: Tensor, inner: Tensor | None, heads: Heads) -> _Turned:
    turned = layer.rotate(y, cos, sin, heads.query + heads.key_value, heads.norm, heads.norm_eps)
    return _Turned(turned, y if heads.norm is not None else None, inner)


def _split(heads: Heads) -> tuple[int, int, int]:
    return heads.query, heads.key_value, heads.key_value


def _gradients(asked: Sequence[GradientOperands | list[Tensor]]) -> list[Tensor]:
    """Of the masters of several projections, one after the other; what is not made yet is made in one launch."""
    made = iter(gradients_of([part for part in asked if isinstance(part, GradientOperands)]))
    return [gradient for part in asked for gradient in (next(made) if isinstance(part, GradientOperands) else part)]


def _mlp_backward(
    dy: Tensor, attended: Tensor, kept: _Kept, behind: Behind, keep: Keep
) -> tuple[Tensor, list[GradientOperands | list[Tensor]]]:
    """Gradient of the stream h, and what makes those of the adapters of gate, up and down.

    Fills `kept.stream` if it is not held.
    """
    normed: Tensor | None = None
    if kept.stream is None:
        assert kept.x is not None
        y, inner_output = behind.output.forward(attended)
        total, normed = layer.add_rms_norm(kept.x, y, behind.norm, behind.eps, *_padding(behind.gate_up))
        kept.stream = total, inner_output
        del y, total
    h = kept.stream[0]
    assert h is not None
    parts = tiles(h.shape[0], h.shape[0] if kept.gate_up is not None else keep.tile)
    d_stream: Tensor | None = None
    sums: list[Tensor] = []
    for part in parts:
        of_part = behind.at(part)
        held = [kept.gate_up] if kept.gate_up is not None else [_gate_up(h[part], normed, part, of_part)]
        kept.gate_up = None
        if part.stop == h.shape[0]:
            normed = None
        inner_down = None if kept.inner_down is None else kept.inner_down[part]
        d_part, asked = _tile_backward(dy[part], h[part], held, inner_down, of_part)
        if len(parts) == 1:
            return d_part, asked
        gradients = _gradients(asked)
        d_stream = h.new_empty(h.shape[0], d_part.shape[1]) if d_stream is None else d_stream
        d_stream[part] = d_part
        if sums:
            torch._foreach_add_(sums, gradients)
        else:
            sums = gradients
        del d_part, asked, gradients  # or the next tile would be made beside them
    assert d_stream is not None
    return d_stream, [sums]


def _gate_up(h: Tensor, normed: Tensor | None, part: slice, behind: Behind) -> tuple[Tensor, Tensor | None]:
    """Gate and up of one tile, and their inner activation."""
    rows = layer.rms_norm(h, behind.norm, behind.eps, *_padding(behind.gate_up)) if normed is None else normed[part]
    return behind.gate_up.forward(rows)


def _tile_backward(
    dy: Tensor,
    h: Tensor,
    held: list[tuple[Tensor, Tensor | None]],
    inner_down: Tensor | None,
    behind: Behind,
) -> tuple[Tensor, list[GradientOperands | list[Tensor]]]:
    """Gradient of the stream, and what makes those of the adapters, from one tile of tokens; empties `held`."""
    gate_up, inner_gate_up = held.pop()
    through_down = behind.down.backward(dy)
    d_active = through_down.d_input()
    d_gate_up, active = behind.activation.backward(gate_up, inner_gate_up, d_active, through_down)
    del gate_up, d_active
    of_down = through_down.d_adapters(active, inner_down)
    del active
    through_gate_up = behind.gate_up.backward(d_gate_up)
    d_normed = through_gate_up.d_input()
    d_past = dy[:, : h.shape[1]]
    pad, measure = behind.output.pad_columns, behind.output.measure_dy
    d_h, normed = layer.rms_norm_backward(d_normed, d_past, h, behind.norm, behind.eps, pad, measure)
    of_gate_up = through_gate_up.d_adapters(normed, inner_gate_up)
    return d_h, [of_gate_up, of_down]


def _heads_backward(
    d_stream: Tensor,
    d_heads: list[Tensor],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: _Turned,
    before: Before,
    needs_below: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradient of the layer's input (None if nobody asks), and of the adapters of q, k and v; empties `d_heads`."""
    d_query, d_key, d_value = d_heads
    d_heads.clear()
    norm, eps = before.heads.norm, before.heads.norm_eps
    pad, measure = before.projection.pad_columns, before.projection.measure_dy
    dy = layer.rotate_backward(d_query, d_key, d_value, cos, sin, heads.unturned, norm, eps, pad, measure)
    heads.unturned = None
    del d_query, d_key, d_value
    through_projection = before.projection.backward(dy)
    below: Tensor | None = None
    if needs_below:
        d_normed = through_projection.d_input()
        d_past = d_stream[:, : x.shape[1]]
        down = before.down
        d_x, normed = layer.rms_norm_backward(
            d_normed, d_past, x, before.norm, before.eps, down.pad_columns, down.measure
        )
        below = down.enter(d_x)
    else:
        normed = layer.rms_norm(x, before.norm, before.eps)
    return below, _gradients([through_projection.d_adapters(normed, heads.inner)])
