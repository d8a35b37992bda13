"""The same adapter in the form that every reader computes alike.

vLLM scales every layer by lora_alpha / r of the configuration, whatever its patterns say, and converters for
llama.cpp know neither patterns nor rsLoRA. So the scaling of each layer is multiplied into its B, each pair is padded
with zeros to the largest rank, and lora_alpha becomes r. Then the factor is 1 for every reader, with no pattern.

B · scaling is rounded once to float32, so outputs agree within one unit in the last place of B.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from loratune.errors import AdapterError
from loratune.lora.state import Adapter, LayerWeights


def portable(name: str, adapter: Adapter) -> Adapter:
    """A copy of `adapter` with one rank, no patterns, and a scaling of 1.

    Raises: AdapterError: it is not a low-rank sum, or a convolution with groups has a smaller rank than others.
    """
    refusal = next((w for w in adapter.layers.values() if not w.variant.low_rank_sum), None)
    if refusal is not None:
        raise AdapterError(
            f'adapter "{name}" uses {type(refusal.variant).__name__}, which some readers refuse: merge it instead'
        )
    r = max(weights.r for weights in adapter.layers.values())
    layers = {path: _folded(name, path, weights, r) for path, weights in adapter.layers.items()}
    plain = replace(adapter.config, r=r, lora_alpha=r, use_rslora=False, rank_pattern={}, alpha_pattern={})
    return Adapter(plain, layers, adapter.modules, adapter.biases)


def _folded(name: str, path: str, weights: LayerWeights, r: int) -> LayerWeights:
    lora_A, lora_B = weights.lora_A.detach(), weights.lora_B.detach()
    more, factor = r - weights.r, weights.scaling / weights.kind.scaling_factor
    if more and lora_B.shape[1] != weights.r:
        raise AdapterError(
            f'adapter "{name}": "{path}" is a convolution with groups of rank {weights.r}, which cannot be padded to '
            f"rank {r}; train it with one rank for all layers"
        )
    padded_A = torch.cat([lora_A, lora_A.new_zeros(more, lora_A.shape[1])])
    padded_B = torch.cat([lora_B * factor, lora_B.new_zeros(lora_B.shape[0], more)], dim=1)
    shapes = weights.shapes_in_files
    if "lora_A" in shapes:
        groups = weights.r // lora_B.shape[1]
        shapes = {"lora_A": (r, *shapes["lora_A"][1:]), "lora_B": (len(lora_B), r // groups, *shapes["lora_B"][2:])}
    tensors = {"lora_A": nn.Parameter(padded_A, False), "lora_B": nn.Parameter(padded_B, False)}
    return LayerWeights(weights.kind, weights.variant, tensors, weights.kind.scaling_factor, shapes)
