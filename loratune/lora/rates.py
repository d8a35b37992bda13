"""Which tensors of an adapter learn at a rate of their own."""

from __future__ import annotations

from torch import nn

from loratune.lora.state import require


def output_factors(model: nn.Module) -> list[nn.Parameter]:
    """B of every layer of the active adapter, whose rate LoRA+ raises.

    Not of embeddings: there A starts at zero and B is random, and nothing is summed over the width of an input.
    """
    state = require(model)
    held = [weights for name in state.active for weights in state.get(name).layers.values()]
    layers = [weights for weights in held if not weights.kind.is_lookup]
    return [p for weights in layers for name, p in weights.tensors.items() if name.endswith("lora_B")]
