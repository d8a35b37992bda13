"""A decoder layer with LoRA as one autograd node that saves only the activations a policy selects.

Written as modules, a layer is about a hundred autograd nodes. As one node (`fused.structure` gives the formula):

    - Projections that read the same input are one product of W, A and B of all of them.
    - The gradient of that input is summed in one buffer.
    - Norms and activations are not saved. The pass that computes their gradient computes them again.
    - The host has almost no work.

A policy (`fused.policy`) selects the saved activations. The most generous saves the residual streams, query, key and
value, attention's output, and the output of `up`; the most frugal saves the layer's input. Missing activations are
recomputed by the same calls as in the forward, so gradients have the same bits.

Gradients are written by hand. The modules are their reference (tests/fused/test_layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.fused import attention_half
from loratune.fused.link import UNPADDED
from loratune.fused.mlp_half import evaluated, mlp_backward, mlp_forward
from loratune.fused.policy import Level
from loratune.fused.saved import HeadActivations, SavedActivations
from loratune.fused.structure import LayerStructure, Rotation, SavePolicy, output_gradient_format
from loratune.ops.attention.recorded import Attend, RecordedAttention


def decoder_layer(
    x: Tensor,
    rotation: Rotation | None,
    structure: LayerStructure,
    attend: Attend,
    policy: SavePolicy,
    adapters: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> Tensor:
    """The residual stream after one decoder layer.

    Args:
        x: (T, d).
        rotation: rotary positions of the tokens; None if heads are not rotated.
        attend: attention by document, see `ops.attention.recorded`.
        policy: activations to save for the backward; ignored if gradients are disabled.
        adapters: masters of query, key and value, and of all later projections; A and B of each member in order.
            They receive the gradients.
    Returns: (T, d).
    """
    structure = structure.rotated_by(rotation)
    if not torch.is_grad_enabled():
        return _forward(x, rotation, structure, attend, SavePolicy(Level.FULL, policy.tile))[0]
    fixed = structure, attend, policy, len(adapters[0])
    cos, sin = rotation or (None, None)
    out: Tensor = _FusedLayerFunction.apply(x, cos, sin, *fixed, *adapters[0], *adapters[1])  # type: ignore[no-untyped-call]
    return out


class _FusedLayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        structure: LayerStructure,
        attend: Attend,
        policy: SavePolicy,
        head_adapters: int,
        *adapters: Tensor,
    ) -> Tensor:
        rotation = None if cos is None or sin is None else Rotation(cos, sin)
        out, saved = _forward(x, rotation, structure, attend, policy)
        saved.x = x
        if policy.level.on_host:
            saved.offload(policy)
        elif policy.host is not None:
            policy.host.layer_done(policy.index)
        ctx.save_for_backward(cos, sin)
        ctx.activations, ctx.fixed = saved, (structure, attend, policy)
        ctx.needs_heads = ctx.needs_input_grad[0] or head_adapters > 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved, ctx.activations = ctx.activations, None
        assert saved is not None, "a fused layer runs its backward once"
        (cos, sin), (structure, attend, policy) = ctx.saved_tensors, ctx.fixed
        rotation = None if cos is None else Rotation(cos, sin)
        _restore(saved, rotation, structure, policy)
        needs = ctx.needs_heads, ctx.needs_input_grad[0]
        d_out = [structure.above.receive_gradient(dy)]
        del dy
        below, gradients = _backward(d_out, rotation, saved, structure, attend, policy, needs)
        return below, *(None,) * 6, *gradients


def _forward(
    x: Tensor, rotation: Rotation | None, structure: LayerStructure, attend: Attend, policy: SavePolicy
) -> tuple[Tensor, SavedActivations]:
    """The layer's output, and the activations that `policy` saves, except for the input."""
    level, attention = policy.level, structure.attention
    heads: HeadActivations | None = attention_half.project_heads(x, rotation, structure)
    assert heads is not None
    attended = RecordedAttention(attend, heads.attention_input, attention.heads.split)
    if not level.keeps_heads or level.on_host:
        attended.free_heads()
    if not level.keeps_heads:
        heads = None
    y, low_rank = attention.output.forward(attended.out)
    saved = SavedActivations()
    if level.keeps_attended or structure.parallel:  # a parallel layer's backward needs no more
        saved.low_rank_output = low_rank
    if level.keeps_attended:
        saved.heads, saved.attended = heads, attended
        saved.attention_out = y if attention.branch.reads_output else None
    del heads, attended
    if structure.parallel:
        operand = [structure.mlp.reader.read(x)]
        return mlp_forward(operand, x, y, structure, policy, saved), saved
    h, first = attention.branch.join_and_read(x, y, structure.mlp.reader)
    del y
    operand = [first]
    del first
    if level.keeps_attended:
        saved.stream = h
    return mlp_forward(operand, h, None, structure, policy, saved), saved


def _restore(
    saved: SavedActivations, rotation: Rotation | None, structure: LayerStructure, policy: SavePolicy
) -> None:
    """Brings saved activations back from the host, and starts the copies of the layer below."""
    if not policy.level.on_host:
        if policy.host is not None:
            policy.host.prefetch_below(policy.index)
        return
    y, spec = saved.fetch(policy), structure.attention.heads
    if y is None:
        return
    assert saved.heads is not None
    low_rank = saved.heads.low_rank
    if spec.norm is None:
        saved.heads = HeadActivations(y, None, low_rank)
    else:  # the heads are on the device before their rotation, which costs one pass
        saved.heads = attention_half.rotate(y, rotation, low_rank, spec)


def _backward(
    d_out: list[Tensor],
    rotation: Rotation | None,
    saved: SavedActivations,
    structure: LayerStructure,
    attend: Attend,
    policy: SavePolicy,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of the input and of all adapters.

    Args:
        d_out: list with the gradient of the output, (T, d) with or without padding; emptied to free it.
        needs: whether a gradient is needed for the layers below or the adapters of query, key and value; whether one
            is needed for the input.
    """
    x, attention, mlp = saved.x, structure.attention, structure.mlp
    assert x is not None
    heads, attended = saved.heads, saved.attended
    if attended is None:
        heads = attention_half.project_heads(x, rotation, structure)
        attended = RecordedAttention(attend, heads.attention_input, attention.heads.split)
    saved.heads = saved.attended = None
    operand = _recompute_stream(x, attended.out, saved, structure)
    stream = x if structure.parallel else saved.stream
    assert stream is not None
    target = UNPADDED if structure.parallel else attention.gradient_format
    d_stream, of_mlp = mlp_backward(d_out[0], stream, operand, mlp, policy, saved, target)
    d_branch = d_out.pop()[:, : x.shape[1]] if structure.parallel else d_stream
    d_out.clear()
    saved.stream = None
    del stream
    target = output_gradient_format(attention.output)
    through_output = attention.output.backward(
        attention.branch.backward(d_branch, saved.attention_out, x.shape[1], target)
    )
    saved.attention_out = None
    of_output = through_output.d_adapters(attended.out, saved.low_rank_output)
    gradients = evaluated([of_output, *of_mlp])
    of_mlp.clear()  # their operands
    if not needs[0]:
        return None, gradients
    d_attended = through_output.d_input()
    del through_output, d_branch
    heads = heads or attention_half.project_heads(x, rotation, structure)
    d_heads = attended.backward(d_attended, heads.attention_input)
    heads.rotated = None
    del d_attended, attended
    below, of_heads = attention_half.heads_backward(d_stream, d_heads, x, rotation, heads, structure, needs[1])
    return below, evaluated([of_heads]) + gradients


def _recompute_stream(
    x: Tensor, attended: Tensor, saved: SavedActivations, structure: LayerStructure
) -> list[Tensor]:
    """Computes the stream between the halves if it was not saved.

    Returns: a list with the MLP's operand, which the same pass computes; empty if the stream was saved.
    """
    attention = structure.attention
    if structure.parallel or saved.stream is not None:
        return []
    y, saved.low_rank_output = attention.output.forward(attended)
    saved.stream, operand = attention.branch.join_and_read(x, y, structure.mlp.reader)
    saved.attention_out = y if attention.branch.reads_output else None
    return [operand]
