"""The function between both projections of experts: a gated activation in one pass, or any function of rows.

    active = act(a min(g, c)) / a · (clamp(u, -c, c) + s)        g, u: halves of hidden + bias of the expert

SwiGLU has a = 1, s = 0 and no limit c; gpt-oss has a = 1.702, s = 1 and c = 7, with g and u in turn. The backward
pass also takes the factors of the rows and returns the gradient of each factor, so the gradient is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loratune.ops import layer
from loratune.ops.dispatch import at_least_float32, half_on_gpu, with_kernel
from loratune.ops.layer import ACTIVATIONS, ActivationKind

_LONGEST = 1 << 15
"""Largest width of hidden rows for one program of the twins."""
_SAME_FORMULA = 1e-5
"""Relative error in float32 between two ways to compute one formula."""


class GateGradients(NamedTuple):
    """Results of the backward pass."""

    d_hidden: Tensor
    """(S, m'), with the factors"""
    d_factors: Tensor
    """(S,), float32 at least: <d_active, active>"""
    active: Tensor | None
    """(S, m), the result of the forward again, if it was asked for"""


class ExpertGate(Protocol):
    """A function of sorted rows, (S, m') -> (S, m)."""

    def forward(self, hidden: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
        """Rows of hidden plus bias[experts]; bias: (E, m') or None, experts: (S,) int64."""

    def backward(
        self,
        hidden: Tensor,
        bias: Tensor | None,
        experts: Tensor,
        d_active: Tensor,
        factors: Tensor,
        needs_active: bool,
    ) -> GateGradients:
        """d_active: (S, m), the gradient of the result, without factors; factors: (S,). May overwrite d_active."""


@dataclass(frozen=True)
class GateFormula:
    """The formula of this file; implements `ExpertGate`."""

    kind: ActivationKind
    interleaved: bool = False
    """True if g and u are even and odd columns; otherwise they are the left and the right half."""
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def forward(self, hidden: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
        """See `ExpertGate.forward`."""
        return gated_rows(hidden, self, bias, experts)

    def backward(
        self,
        hidden: Tensor,
        bias: Tensor | None,
        experts: Tensor,
        d_active: Tensor,
        factors: Tensor,
        needs_active: bool,
    ) -> GateGradients:
        """See `ExpertGate.backward`."""
        active = torch.empty_like(d_active) if needs_active else None
        d_hidden, d_factors = gated_rows_backward(hidden, self, bias, experts, d_active, factors, active)
        return GateGradients(d_hidden, d_factors, active)


@dataclass(frozen=True, slots=True)
class AnyGate:
    """A function whose formula is not known; implements `ExpertGate` by autograd."""

    function: Callable[[Tensor], Tensor]

    def forward(self, hidden: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
        """See `ExpertGate.forward`."""
        with torch.no_grad():
            return self.function(_with_bias(hidden, bias, experts))

    def backward(
        self,
        hidden: Tensor,
        bias: Tensor | None,
        experts: Tensor,
        d_active: Tensor,
        factors: Tensor,
        needs_active: bool,
    ) -> GateGradients:
        """See `ExpertGate.backward`."""
        with torch.enable_grad():
            leaf = _with_bias(hidden, bias, experts).detach().requires_grad_()
            active = self.function(leaf)
        d_factors = (d_active * active.detach()).sum(-1, dtype=at_least_float32(d_active[:0]).dtype)
        (d_hidden,) = torch.autograd.grad(active, leaf, d_active.mul_(factors[:, None].to(d_active.dtype)))
        return GateGradients(d_hidden.contiguous(), d_factors, active.detach() if needs_active else None)


def _usable(hidden: Tensor, *_: object, **__: object) -> bool:
    return half_on_gpu(hidden) and hidden.shape[1] <= _LONGEST


@with_kernel(_usable, "ops.gates_kernels")
def gated_rows(hidden: Tensor, formula: GateFormula, bias: Tensor | None, experts: Tensor) -> Tensor:
    """The formula of each row, (S, 2 m) -> (S, m), rounded once; arguments as for `ExpertGate.forward`."""
    gate, up = _halves(_with_bias(at_least_float32(hidden), bias, experts), formula.interleaved)
    gate, up = _limited(gate, up, formula)
    return (layer.activation(formula.alpha * gate, formula.kind) / formula.alpha * up).to(hidden.dtype)


@with_kernel(_usable, "ops.gates_kernels")
def gated_rows_backward(
    hidden: Tensor,
    formula: GateFormula,
    bias: Tensor | None,
    experts: Tensor,
    d_active: Tensor,
    factors: Tensor,
    active: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden, with the factors, and of the factors. Fills `active`, if given, with the result again."""
    wide = _with_bias(at_least_float32(hidden), bias, experts)
    gate, up = _halves(wide, formula.interleaved)
    limited, factor = _limited(gate, up, formula)
    d = d_active.to(wide.dtype)
    d_gate, found = layer.activation_backward(formula.alpha * limited, d * factor, formula.kind)
    found = found / formula.alpha
    out = (found * factor).to(hidden.dtype)
    if active is not None:
        active.copy_(out)
    d_up = d * found
    if formula.limit is not None:
        d_gate = d_gate.masked_fill(gate > formula.limit, 0.0)
        d_up = d_up.masked_fill(up.abs() > formula.limit, 0.0)
    joined = torch.stack([d_gate, d_up], -1).flatten(1) if formula.interleaved else torch.cat([d_gate, d_up], -1)
    return (joined * factors[:, None].to(wide.dtype)).to(hidden.dtype), (d * out).sum(-1, dtype=wide.dtype)


@torch.no_grad()
def recognised(function: Callable[[Tensor], Tensor], numbers: Iterable[float]) -> ExpertGate:
    """The formula that a function of rows computes, found by running it on a few numbers; else `AnyGate`.

    Args:
        function: (S, 2 m) -> (S, m) for any m, on any device.
        numbers: candidates of alpha and limit, from the module's attributes.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 96, generator=generator) * torch.tensor([[0.5], [3.0], [30.0], [1e4]])
    try:
        expected = function(rows)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return AnyGate(function)
    return next(
        (form for form in _candidates(sorted(set(numbers))) if _is_same(form, rows, expected)), AnyGate(function)
    )


def _candidates(numbers: list[float]) -> Iterator[GateFormula]:
    positive = [number for number in numbers if number > 0]
    alphas = [1.0, *(number for number in positive if number != 1.0)]
    for limit, alpha, shift, interleaved, kind in product(
        [None, *positive], alphas, (0.0, 1.0), (False, True), ACTIVATIONS
    ):
        yield GateFormula(kind, interleaved, alpha, limit, shift)


def _is_same(formula: GateFormula, rows: Tensor, expected: Tensor) -> bool:
    got = formula.forward(rows, None, torch.zeros(0, dtype=torch.int64))
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    error, size = (got - expected).norm(dim=1), expected.norm(dim=1)
    return bool((error <= _SAME_FORMULA * size).all())


def _with_bias(hidden: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    return hidden if bias is None else hidden + bias.to(hidden.dtype)[experts]


def _halves(hidden: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return hidden[:, ::2], hidden[:, 1::2]
    gate, up = hidden.chunk(2, -1)
    return gate, up


def _limited(gate: Tensor, up: Tensor, formula: GateFormula) -> tuple[Tensor, Tensor]:
    """The gate below its limit, and the factor of the activation."""
    if formula.limit is not None:
        gate, up = gate.clamp(max=formula.limit), up.clamp(-formula.limit, formula.limit)
    return gate, up + formula.shift if formula.shift else up
