"""MLP half of a fused decoder layer, forward and backward as plain functions, in tiles of tokens.

    x -> norm -> up (or [gate up]) -> activation -> down

If the output of `up`, the largest activation of a layer, is not saved, only one tile of it exists at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratune.fused.link import OperandFormat
from loratune.fused.policy import tiles
from loratune.fused.saved import SavedActivations
from loratune.fused.structure import LayerStructure, MlpHalf, SavePolicy, output_gradient_format
from loratune.ops.low_rank import GradientOperands, gradients_of

Gradients = GradientOperands | list[Tensor]
"""Gradients of a projection's adapters, or the operands to compute them from."""


def mlp_forward(
    operand: list[Tensor],
    stream: Tensor,
    attention_out: Tensor | None,
    structure: LayerStructure,
    policy: SavePolicy,
    saved: SavedActivations,
) -> Tensor:
    """The layer's output, (T, d); fills in the MLP's part of `saved`.

    Args:
        operand: list with the input of `up`, (T, d + pad); emptied after it has been read.
        stream: residual stream that the MLP's output joins, (T, d).
        attention_out: attention's output in a parallel layer, (T, d), added to the MLP's.
    """
    mlp, level = structure.mlp, policy.level
    parts = tiles(stream.shape[0], stream.shape[0] if level.keeps_gate_up else policy.tile)
    ys: list[Tensor] = []
    outs: list[Tensor] = []
    low_ranks: list[Tensor] = []
    for part in parts:
        half = mlp.at(part)
        up_out, low_rank_up = half.up.forward(operand[0][part])
        if part is parts[-1]:
            operand.clear()
        if level.keeps_gate_up:
            saved.up = up_out, low_rank_up
        y, low_rank_down = half.down.forward(half.activation.forward(up_out, low_rank_up))
        del up_out
        if low_rank_down is not None:
            low_ranks.append(low_rank_down)
        if mlp.branch.reads_output and level.keeps_attended:
            ys.append(y)
        if attention_out is not None:
            y.add_(attention_out[part])
        outs.append(y if len(parts) == 1 else mlp.branch.join(stream[part], y))
    saved.low_rank_down, saved.mlp_out = _joined(low_ranks), _joined(ys)
    return structure.above.join(stream, outs.pop(), mlp.branch) if len(parts) == 1 else torch.cat(outs)


def mlp_backward(
    dy: Tensor,
    x: Tensor,
    operand: list[Tensor],
    mlp: MlpHalf,
    policy: SavePolicy,
    saved: SavedActivations,
    target: OperandFormat,
) -> tuple[Tensor, list[Gradients]]:
    """Gradient of the MLP's input, through the MLP and along the residual stream, and of the MLP's adapters.

    Args:
        dy: (T, d), with padding or without, gradient of the layer's output.
        x: (T, d), the MLP's input before its norm.
        operand: list with the input of `up`, emptied here; an empty list recomputes it.
        saved: saved activations of the layer. The MLP's part is freed.
        target: format of the first result.
    Returns: (T, d + pad), and the gradients of the adapters of `up` and `down`.
    """
    parts = tiles(x.shape[0], x.shape[0] if saved.up is not None else policy.tile)
    d_stream: Tensor | None = None
    sums: list[Tensor] = []
    for part in parts:
        half = mlp.at(part)
        up = [saved.up if saved.up is not None else _recompute_up(x[part], operand, part, half)]
        saved.up = None
        if part is parts[-1]:
            operand.clear()
        low_rank_down = None if saved.low_rank_down is None else saved.low_rank_down[part]
        mlp_out = None if saved.mlp_out is None else saved.mlp_out[part]
        d_part, gradients = _tile_backward(dy[part], x[part], up, mlp_out, low_rank_down, half, target)
        if len(parts) == 1:
            saved.mlp_out = None
            return d_part, gradients
        found = evaluated(gradients)
        d_stream = x.new_empty(x.shape[0], d_part.shape[1]) if d_stream is None else d_stream
        d_stream[part] = d_part
        if sums:
            torch._foreach_add_(sums, found)
        else:
            sums = found
        del d_part, gradients, found  # freed before the next tile allocates its own
    assert d_stream is not None
    saved.mlp_out = None
    return d_stream, [sums]


def evaluated(gradients: Sequence[Gradients]) -> list[Tensor]:
    """Gradients of the adapters of several projections. All that are given as operands are computed in one launch."""
    made = iter(gradients_of([part for part in gradients if isinstance(part, GradientOperands)]))
    return [tensor for part in gradients for tensor in (next(made) if isinstance(part, GradientOperands) else part)]


def _recompute_up(x: Tensor, operand: list[Tensor], part: slice, half: MlpHalf) -> tuple[Tensor, Tensor | None]:
    return half.up.forward(operand[0][part] if operand else half.reader.read(x))


def _tile_backward(
    dy: Tensor,
    x: Tensor,
    up: list[tuple[Tensor, Tensor | None]],
    mlp_out: Tensor | None,
    low_rank_down: Tensor | None,
    half: MlpHalf,
    target: OperandFormat,
) -> tuple[Tensor, list[Gradients]]:
    """`mlp_backward` of one tile of tokens; empties `up`."""
    up_out, low_rank_up = up.pop()
    if half.branch.reads_output and mlp_out is None:
        mlp_out, low_rank_down = half.down.forward(half.activation.forward(up_out, low_rank_up))
    through_down = half.down.backward(
        half.branch.backward(dy, mlp_out, x.shape[1], output_gradient_format(half.down))
    )
    del mlp_out
    d_active = through_down.d_input()
    d_up, active = half.activation.backward(up_out, low_rank_up, d_active, through_down)
    del up_out, d_active
    of_down = through_down.d_adapters(active, low_rank_down)
    del active
    through_up = half.up.backward(d_up)
    del d_up
    d_x, operand = half.reader.backward(through_up.d_input(), dy, x, target)
    return d_x, [through_up.d_adapters(operand, low_rank_up), of_down]


def _joined(parts: list[Tensor]) -> Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)
