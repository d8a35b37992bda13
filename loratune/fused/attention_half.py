"""Attention half of a fused decoder layer, forward and backward as plain functions.

x -> norm -> [q k v] -> (norm of each head) -> rotation -> attention -> output projection
"""

from __future__ import annotations

from torch import Tensor

from loratune.fused.saved import HeadActivations
from loratune.fused.structure import LayerStructure, Rotation, output_gradient_format
from loratune.ops import layer
from loratune.ops.layer import HeadSpec
from loratune.ops.low_rank import GradientOperands


def project_heads(x: Tensor, rotation: Rotation | None, structure: LayerStructure) -> HeadActivations:
    """Residual stream, (T, d), to query, key and value as attention reads them."""
    half = structure.attention
    operand = structure.below.take_operand(x)  # the layer below may have made it
    y, low_rank = half.projection.forward(half.reader.read(x) if operand is None else operand)
    del operand
    return rotate(y, rotation, low_rank, half.heads)


def rotate(y: Tensor, rotation: Rotation | None, low_rank: Tensor | None, heads: HeadSpec) -> HeadActivations:
    """Norm and rotation of the projection's output, (T, columns of all heads) or (T, heads, head_dim)."""
    y = y.view(y.shape[0], -1, heads.dim)
    if heads.norm is None and heads.rotary_dim == 0:
        return HeadActivations(y, None, low_rank)
    cos, sin = rotation or (None, None)
    rotated = layer.rotate_heads(y, cos, sin, heads)
    return HeadActivations(rotated, None if heads.norm is None else y, low_rank)


def heads_backward(
    d_stream: Tensor,
    d_heads: list[Tensor],
    x: Tensor,
    rotation: Rotation | None,
    heads: HeadActivations,
    structure: LayerStructure,
    needs_input_grad: bool,
) -> tuple[Tensor | None, GradientOperands | list[Tensor]]:
    """Gradient of the layer's input (None if it is not needed), and of the adapters of query, key and value.

    Args:
        d_stream: (T, at least d), gradient of the input along the residual connection.
        d_heads: gradients of query, key and value, (T, heads of each, head_dim). The list is emptied to free them.
    """
    half, (cos, sin) = structure.attention, rotation or (None, None)
    d_query, d_key, d_value = d_heads
    d_heads.clear()
    target = output_gradient_format(half.projection)
    dy = layer.rotate_heads_backward(d_query, d_key, d_value, cos, sin, heads.unrotated, half.heads, *target)
    heads.unrotated = None
    del d_query, d_key, d_value
    backward = half.projection.backward(dy)
    if not needs_input_grad:
        return None, backward.d_adapters(layer.norm(x, half.norm), heads.low_rank)
    d_x, operand = half.reader.backward(backward.d_input(), d_stream, x, structure.below.gradient_format)
    below = structure.below.send_gradient(d_x, x.shape[1])
    return below, backward.d_adapters(operand, heads.low_rank)
