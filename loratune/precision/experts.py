"""Expert weights that a model holds in one Parameter of three dimensions, and the experts module around them.

transformers' experts interface (`use_experts_implementation`) states how such a module computes: one projection
`gate_up_proj` or `up_proj`, an activation, and `down_proj`, each (E, d_out, d_in) or transposed, maybe with a bias.
`form_of` reads these statements; class names play no role. `experts_forward` is an implementation for the interface:
grouped products (`ops.experts`) that wait for nothing, so the step can be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from loratune.ops.experts import ExpertPair, mixture
from loratune.ops.frozen import DenseWeight, FrozenWeight

IMPLEMENTATION = "loratune"
"""Name in transformers' experts interface."""
_STATEMENTS = ("has_gate", "has_bias", "is_transposed", "num_experts")
Pairs = tuple[ExpertPair | None, ExpertPair | None]


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """How an experts module holds its weights."""

    up: str
    """Name of the first projection; with a gate, gate and up are one matrix."""
    down: str
    """Name of the second projection."""
    experts: int
    transposed: bool
    """True if weights are (E, d_in, d_out)."""

    @property
    def names(self) -> tuple[str, str]:
        """Both projections in the order of the computation."""
        return self.up, self.down


@dataclass(frozen=True, slots=True)
class ExpertProjection:
    """One projection of all experts; implements `ops.experts.ExpertWeights`."""

    frozen: FrozenWeight
    """(E d_out, d_in); transposed (E d_in, d_out)."""
    experts: int
    transposed: bool
    bias: Tensor | None

    def dense(self) -> Tensor:
        """(E, d_in, d_out) in the compute dtype."""
        stacked = self.frozen.dense().view(self.experts, -1, self.frozen.shape[1])
        return stacked if self.transposed else stacked.transpose(1, 2)


def form_of(module: nn.Module) -> ExpertForm | str:
    """The form of an experts module, or the reason why it has none that is supported."""
    kind = type(module).__name__
    if not all(hasattr(module, name) for name in _STATEMENTS):
        return f"{kind} does not use transformers' experts interface"
    if getattr(module, "has_post_expert_norm", False):
        return f"{kind} has a norm behind each expert"
    if getattr(module, "_is_expert_parallel", False):
        return f"the experts of this {kind} are distributed over processes"
    if "forward" in vars(module):
        return f"the forward of this {kind} was replaced on the instance"
    form = ExpertForm(
        "gate_up_proj" if module.has_gate else "up_proj",
        "down_proj",
        cast(int, module.num_experts),
        bool(module.is_transposed),
    )
    for name in form.names:
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3 or weight.shape[0] != form.experts:
            return f"{kind} has no Parameter {name} with three dimensions, one matrix for each expert"
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            return f"{name} of this {kind} is quantised, sharded or parametrised"
    return form


def parameter_names(module: nn.Module, form: ExpertForm) -> list[str]:
    """Names of both projections in the order in which the module holds them, which PEFT's files follow."""
    return sorted(form.names, key=list(module._parameters).index)


def features(module: nn.Module, form: ExpertForm, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a projection."""
    first, second = cast(Tensor, getattr(module, name)).shape[1:]
    return (first, second) if form.transposed else (second, first)


def projection(module: nn.Module, form: ExpertForm, name: str) -> ExpertProjection:
    """A projection of an experts module."""
    weight = cast(Tensor, getattr(module, name)).detach()
    bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
    return ExpertProjection(DenseWeight(weight.flatten(0, 1)), form.experts, form.transposed, bias)


def activation_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function between both projections, row by row."""
    chosen = module._apply_gate if module.has_gate else module.act_fn
    return cast(Callable[[Tensor], Tensor], chosen)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, pairs: Pairs = (None, None)
) -> Tensor:
    """The output of an experts module, (T, d), as one autograd node.

    Args:
        hidden_states: (T, d).
        top_k_index, top_k_weights: (T, k), the experts of each token and their factors.
        pairs: adapters of both projections.

    A module without a supported form runs transformers' own grouped products.
    """
    form = form_of(module)
    if isinstance(form, str):
        theirs: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return theirs
    up, down = (projection(module, form, name) for name in form.names)
    with torch.autocast(hidden_states.device.type, enabled=False):
        rows = hidden_states.to(up.frozen.dtype)
        out = mixture(rows, top_k_index, top_k_weights, up, down, activation_of(module), pairs)
    return out.to(hidden_states.dtype)


def register() -> None:
    """Adds `experts_forward` to transformers' experts interface."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
