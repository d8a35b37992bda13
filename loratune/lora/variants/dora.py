"""DoRA: the direction of each row of the weight is adapted by LoRA, and its length is learned.

    W' = g ⊙ (W + scaling · B A),    g = m / n,    n = ‖W + scaling · B A‖ of each row

m, the magnitude, is one number for each output and starts at the value of n, so that the first forward is the base's.
n counts as a constant in the backward (section 4.3 of the paper), so gradients of A and B are those of LoRA times g.

The sum W + scaling · B A is never formed, since

    n² = ‖w‖² + 2 scaling · b·(A wᵀ) + scaling² · b (A Aᵀ) bᵀ    for the rows w of W and b of B

takes one product of A with W, as much work as r more tokens, and one reading of W. Nothing is cached, so a changed
weight can never meet an old norm.

Cost: the time above, one product with g and one saved output for each layer. It runs as modules, not fused.
Advice: it helps most at small ranks. A trained adapter that is only used should be merged.

The layer's input is dropped for the low-rank part only, as in the paper. PEFT 0.21 also computes (g - 1) W from the
dropped input. Without dropout, and in evaluation mode, both are equal.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loratune.config import LoraConfig
from loratune.lora.layer import LoraLayer, LoraVariant, TensorSpec
from loratune.precision.linear import frozen_of

_MAGNITUDE = "lora_magnitude_vector"


class Dora(LoraVariant):
    """y = g ⊙ (x Wᵀ + scaling · drop(x) Aᵀ Bᵀ) + b, for linear layers, embeddings and convolutions."""

    def refusal(self, kind: type[LoraLayer], base: nn.Module) -> str | None:
        """Layers of which no output has a row of the weight to itself, or whose weight is read by another module."""
        if kind.parts or kind.is_part:
            return "DoRA is not for MultiheadAttention, which reads its weights; PEFT refuses it too"
        why = kind.merge_refusal(base)
        return None if why is None else f"DoRA scales the rows of the updated weight, but {why}"

    def tensors(self, kind: type[LoraLayer], d_in: int, d_out: int, r: int) -> dict[str, TensorSpec]:
        """A, B and the magnitude, (d_out,)."""
        return super().tensors(kind, d_in, d_out, r) | {_MAGNITUDE: TensorSpec(_MAGNITUDE, (d_out,))}

    def initialise(
        self,
        tensors: Mapping[str, Tensor],
        base: nn.Module,
        kind: type[LoraLayer],
        config: LoraConfig,
        scaling: float,
        generator: torch.Generator,
    ) -> None:
        """A and B as in LoRA; the magnitude is the length of each row."""
        super().initialise(tensors, base, kind, config, scaling, generator)
        weight = matrix_of(base, kind)
        A, B = (tensors[name].to(weight.device) for name in ("lora_A", "lora_B"))
        tensors[_MAGNITUDE].copy_(row_norms(weight, A, B, scaling))

    def forward(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """Output of LoRA plus (g - 1) times its part without bias, so that g itself is never rounded to bfloat16."""
        out = layer.lora_forward(x)
        axis = -1 if layer.is_linear or layer.transposed else -1 - len(layer.own_weight.shape[2:])
        bias = layer._parameters.get("bias")
        shape = [-1] + [1] * (-1 - axis)
        less_one = (_scale(layer) - 1.0).view(shape)
        scaled: Tensor = _Scaled.apply(out, None if bias is None else bias.view(shape), less_one)  # type: ignore[no-untyped-call]
        return scaled

    def delta(self, layer: LoraLayer) -> Tensor:
        """g ⊙ (W + scaling · B A) - W, (d_out, d_in)."""
        weight = matrix_of(layer, type(layer)).to(layer.get_parameter("lora_A").dtype)
        scale = _scale(layer)[:, None]
        return scale * layer.low_rank_delta() + (scale - 1.0) * weight


DORA = Dora()


def matrix_of(module: nn.Module, kind: type[LoraLayer]) -> Tensor:
    """The weight of a layer of this kind, bare or adapted, as (d_out, d_in); made dense if it is quantised."""
    if not kind.weight_is_parameter:
        return frozen_of(module).dense()
    weight = module._parameters[kind.weight_name]
    assert weight is not None
    return weight.detach().T if kind.transposed else weight.detach().flatten(1)


@torch.no_grad()
def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖w + scaling · b A‖ for every row w of `weight` and b of `lora_B`.

    Args:
        weight: (d_out, d_in), any float dtype; its product with A runs in this dtype.
        lora_A, lora_B: (r, d_in) and (d_out, r).
        scaling: dimensionless.

    Returns: (d_out,), dtype of `lora_A`.
    """
    dtype = lora_A.dtype
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    with torch.autocast(weight.device.type, enabled=False):
        cross = (weight @ lora_A.to(weight.dtype).T).to(dtype)  # (d_out, r)
        across = cross.mul_(2.0).add_(lora_B @ (lora_A @ lora_A.T), alpha=scaling)
    lengths: Tensor = norms.square_().add_(across.mul_(lora_B).sum(1), alpha=scaling).clamp_(min=0.0).sqrt_()
    return lengths


def _scale(layer: LoraLayer) -> Tensor:
    """g, (d_out,), in the dtype of the masters; differentiable in m."""
    A, B = layer.get_parameter("lora_A"), layer.get_parameter("lora_B")
    norms = row_norms(matrix_of(layer, type(layer)), A, B, layer.scaling)
    scale: Tensor = layer.get_parameter(_MAGNITUDE) / norms
    return scale


class _Scaled(torch.autograd.Function):
    """out + (g - 1) (out - bias), rounded once; g - 1 and bias broadcast over all other axes."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor | None, less_one: Tensor) -> Tensor:
        ctx.save_for_backward(out, bias, less_one)
        plain = out if bias is None else out - bias.to(out.dtype)
        return torch.addcmul(out, plain, less_one.to(out.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        out, bias, less_one = ctx.saved_tensors
        small = less_one.to(dy.dtype)
        axes = [axis for axis in range(dy.dim()) if axis != dy.dim() - less_one.dim()]
        d_out = torch.addcmul(dy, dy, small) if ctx.needs_input_grad[0] else None
        d_bias = d_less_one = None
        if ctx.needs_input_grad[1]:
            d_bias = -(dy * small).sum(axes, dtype=bias.dtype).view(bias.shape)
        if ctx.needs_input_grad[2]:
            plain = out if bias is None else out - bias.to(out.dtype)
            d_less_one = (dy * plain).sum(axes, dtype=less_one.dtype).view(less_one.shape)
        return d_out, d_bias, d_less_one
