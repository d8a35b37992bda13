"""Expert weights that a model holds in one Parameter of three dimensions, and the experts module around them.

transformers' experts interface (`use_experts_implementation`) states how such a module computes: one projection
`gate_up_proj` or `up_proj`, an activation, and `down_proj`, each (E, d_out, d_in) or transposed, maybe with a bias.
`form_of` reads these statements; class names play no role. `experts_forward` is an implementation for the interface:
grouped products (`ops.experts`) that wait for nothing, so the step can be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from loratune.ops.experts import ExpertPair, mixture
from loratune.ops.frozen import DenseWeight, FrozenWeight
from loratune.ops.gates import AnyGate, ExpertGate, recognised

IMPLEMENTATION = "loratune"
"""Name in transformers' experts interface."""
_GATE = "_loratune_gate"
"""Attribute of an experts module: settings of its activation, and the formula found for them."""
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


@dataclass(frozen=True, slots=True)
class HeldExperts:
    """One projection in a form of `precision.contract`."""

    frozen: FrozenWeight
    """(E d_out, d_in); transposed (E d_in, d_out)."""
    transposed: bool
    as_in_module: bool
    """True if the architecture's Parameter is transposed in the same way."""
    shape: tuple[int, int, int]
    """Shape of that Parameter."""


class QuantisedExperts(nn.Module):
    """An experts module whose projections are quantised. Each is made dense for the length of one product.

    Its state_dict holds the projections dense, as the architecture does.
    """

    held: dict[str, HeldExperts]
    """Name of a projection -> its weight. Shared with the module that replaces this one to hold adapters."""
    _original: tuple[nn.Module]
    """The replaced module, for its activation. In a tuple, so that `nn.Module` does not register it as a child."""

    @classmethod
    def in_place_of(cls, module: nn.Module) -> QuantisedExperts:
        """A replacement with all Parameters of an experts module, of which none is quantised yet."""
        replacement = cls.__new__(cls)
        replacement.__dict__.update(module.__dict__)
        replacement._parameters = dict(module._parameters)
        replacement.held, replacement._original = {}, (module,)
        return replacement

    def replace_parameter(self, name: str, frozen: FrozenWeight, *, transposed: bool) -> None:
        """Replaces the Parameter `name` by its quantised form."""
        weight = self._parameters[name]
        assert weight is not None
        experts, first, second = weight.shape
        same = transposed == bool(self.is_transposed)
        self.held[name] = HeldExperts(frozen, transposed, same, (experts, first, second))
        del self._parameters[name]
        self._original[0]._parameters[name] = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, d) tokens, (T, k) experts and (T, k) factors -> (T, d)."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def __getattr__(self, name: str) -> Any:
        """A projection, made dense now: right but slow, for code that reads a weight of the module."""
        held = self.__dict__.get("held", {}).get(name)
        return super().__getattr__(name) if held is None else dense_of(held)

    def _apply_gate(self, rows: Tensor) -> Tensor:
        return cast(Callable[[Tensor], Tensor], self._original[0]._apply_gate)(rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedExperts:
        """`to`, `cuda` and so on: moves the weights and sets their compute dtype; codes keep their dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, held in self.held.items():
            wanted = fn(torch.empty(0, dtype=held.frozen.dtype, device=held.frozen.device))
            if (wanted.device, wanted.dtype) != (held.frozen.device, held.frozen.dtype):
                self.held[name] = replace(held, frozen=held.frozen.to(wanted.device, wanted.dtype))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: dense_of(held) for name, held in self.held.items()})


def dense_of(held: HeldExperts) -> Tensor:
    """The projection in the shape of the architecture's Parameter, made now."""
    experts, first, second = held.shape
    dense = held.frozen.dense()
    return dense.view(held.shape) if held.as_in_module else dense.view(experts, second, first).transpose(1, 2)


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
        if isinstance(module, QuantisedExperts) and name in module.held:
            continue
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3 or weight.shape[0] != form.experts:
            return f"{kind} has no Parameter {name} with three dimensions, one matrix for each expert"
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            return f"{name} of this {kind} is quantised, sharded or parametrised"
    return form


def parameter_names(module: nn.Module, form: ExpertForm) -> list[str]:
    """Names of both projections in the order in which the module holds them, which PEFT's files follow."""
    original = module._original[0] if isinstance(module, QuantisedExperts) else module
    return sorted(form.names, key=list(original._parameters).index)


def features(module: nn.Module, form: ExpertForm, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a projection."""
    held = module.held.get(name) if isinstance(module, QuantisedExperts) else None
    shape = cast(Tensor, module._parameters[name]).shape if held is None else held.shape
    first, second = shape[1:]
    return (first, second) if form.transposed else (second, first)


def projection(module: nn.Module, form: ExpertForm, name: str) -> ExpertProjection:
    """A projection of an experts module."""
    held = module.held.get(name) if isinstance(module, QuantisedExperts) else None
    bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
    if held is not None:
        return ExpertProjection(held.frozen, form.experts, held.transposed, bias)
    weight = cast(Tensor, module._parameters[name]).detach()
    return ExpertProjection(DenseWeight(weight.flatten(0, 1)), form.experts, form.transposed, bias)


def gate_of(module: nn.Module) -> ExpertGate:
    """The function between both projections, row by row; its formula is found once for a module's settings."""
    original = module._original[0] if isinstance(module, QuantisedExperts) else module
    act_fn = getattr(original, "act_fn", None)
    chosen = cast(Callable[[Tensor], Tensor], original._apply_gate if original.has_gate else act_fn)
    if not original.has_gate or (isinstance(act_fn, nn.Module) and _is_more_than_a_formula(act_fn)):
        return AnyGate(chosen)
    numbers = tuple(value for value in vars(original).values() if isinstance(value, float))
    settings = (act_fn, getattr(chosen, "__func__", chosen), numbers)
    found = vars(original).get(_GATE)
    if found is None or found[0] != settings:
        found = settings, recognised(chosen, numbers)
        vars(original)[_GATE] = found
    gate: ExpertGate = found[1]
    return gate


def _is_more_than_a_formula(activation: nn.Module) -> bool:
    hooks = (
        activation._forward_hooks, activation._forward_pre_hooks, activation._backward_hooks,
        activation._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in vars(activation) or next(activation.parameters(), None) is not None


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
    device = hidden_states.device.type
    with nullcontext() if hidden_states.is_meta else torch.autocast(device, enabled=False):
        rows = hidden_states.to(up.frozen.dtype)
        out = mixture(rows, top_k_index, top_k_weights, up, down, gate_of(module), pairs)
    return out.to(hidden_states.dtype)


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """Runs experts by `experts_forward`, and by the model's own implementation again on exit."""
    before = model.get_experts_implementation()
    if not any(before.values()):
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
