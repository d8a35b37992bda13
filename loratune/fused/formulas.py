"""Formula of a norm or an activation, found by running a copy of the module on a few numbers.

transformers has dozens of classes for RMS norms that differ in two details: whether 1 is added to the weight, and
where values are rounded. Class names do not show either. So a copy of the module gets new parameters, and its result
is compared with each formula of `ops.layer`. A module whose result equals none of them has no formula.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from loratune.ops import layer
from loratune.ops.layer import ACTIVATIONS, ActivationKind, NormSpec

_EPS = ("variance_epsilon", "eps", "epsilon")
_SAME_FORMULA = 1e-5
"""Relative error in float32 between two ways to compute one formula."""
LARGE = 1e4
"""Factor for a second comparison on large numbers, which finds clamps."""
# Errors of modules that cannot run on a few numbers.
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class NormForm:
    """A norm's formula, without its weights."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    round_first: bool = True

    def spec(self, weight: Tensor, bias: Tensor | None = None) -> NormSpec:
        """The formula with weights, (d,) each."""
        return NormSpec(weight, self.eps, self.kind, bias, self.offset, self.round_first)


def is_hooked(module: nn.Module) -> bool:
    """True if the module has a hook, or a `forward` of its own instead of its class's."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(bool, hooks)) or "forward" in vars(module)


@torch.no_grad()
def norm_form(module: nn.Module) -> NormForm | None:
    """The formula of a norm with frozen weights; None if the module computes anything else."""
    given = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
    weight = given.get("weight")
    if weight is None or weight.dim() != 1 or not set(given) <= {"weight", "bias"}:
        return None
    if module._modules or module._buffers or any(tensor.requires_grad for tensor in given.values()):
        return None
    eps = next((float(vars(module)[n]) for n in _EPS if isinstance(vars(module).get(n), float)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    trial = {name: torch.randn(len(weight), generator=generator) for name in sorted(given, reverse=True)}
    x = torch.randn(3, len(weight), generator=generator) * eps**0.5  # so small that eps counts
    found = next((form for form in _forms(eps, given) if _is_norm(module, form, trial, x)), None)
    if found is None or found.kind == "layer" or found.offset:
        return found
    half, x = trial["weight"].bfloat16(), x.bfloat16()
    got = result_of_copy(module, {"weight": half}, {}, x)
    if got is None or got.dtype != x.dtype:
        return None
    forms = [found, replace(found, round_first=True)]
    return min(forms, key=lambda form: relative_error(got, layer.norm(x, form.spec(half))))


@torch.no_grad()
def activation_kind(module: nn.Module) -> ActivationKind | None:
    """The activation that `module` computes; None if it is none of `ACTIVATIONS`."""
    if is_hooked(module):
        return None
    at = torch.linspace(-6, 6, 97)
    at = torch.cat([at, *(sign * at[-1:] * 10**k for k in range(1, 5) for sign in (-1, 1))])
    got = result_of_copy(module, {}, {}, at)
    if got is None:
        return None
    # Far below zero, 1 + tanh(x) loses its digits to cancellation, so an absolute error is allowed.
    return next((kind for kind in ACTIVATIONS if torch.allclose(got, layer.activation(at, kind), atol=1e-6)), None)


def result_of_copy(
    module: nn.Module, parameters: Mapping[str, Tensor], children: Mapping[str, nn.Module], x: Tensor
) -> Tensor | None:
    """Result of a copy of the module with these parameters and children; None if it fails or has another shape."""
    trial = copy.copy(module)
    frozen = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()}
    missing = {name: None for name, tensor in module._parameters.items() if tensor is None}
    vars(trial)["_parameters"] = frozen | missing
    vars(trial)["_modules"] = dict(children)
    try:
        out = trial(x)
    except _REFUSALS:
        return None
    return out if isinstance(out, Tensor) and out.shape == x.shape else None


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, in float32."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def is_same(got: Tensor | None, expected: Tensor | None) -> bool:
    """True if both results exist and agree within the error of one formula in float32."""
    return got is not None and expected is not None and relative_error(got, expected) <= _SAME_FORMULA


def _forms(eps: float, given: Mapping[str, Tensor]) -> list[NormForm]:
    """Candidate formulas, without their rounding: a comparison in float32 does not show where a norm rounds."""
    layer_norm = NormForm(eps, "layer")
    if "bias" in given:
        return [layer_norm]
    return [NormForm(eps, round_first=False), NormForm(eps, offset=1.0, round_first=False), layer_norm]


def _is_norm(module: nn.Module, form: NormForm, trial: Mapping[str, Tensor], x: Tensor) -> bool:
    spec = form.spec(trial["weight"], trial.get("bias"))
    return all(is_same(result_of_copy(module, trial, {}, rows), layer.norm(rows, spec)) for rows in (x, LARGE * x))
