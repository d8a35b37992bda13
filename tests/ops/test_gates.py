"""A gated activation equals its formula in float64, in values and gradients, and is found by trial."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from loratune.ops.gates import AnyGate, ExpertGate, GateFormula, recognised

LIMIT, ALPHA = 0.8, 1.702


def _swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return silu(gate) * up


def _limited(rows: Tensor) -> Tensor:
    gate, up = rows[:, ::2].clamp(max=LIMIT), rows[:, 1::2].clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * torch.sigmoid(ALPHA * gate)


def _limited_halves(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return gelu(gate.clamp(max=LIMIT), approximate="tanh") * up.clamp(-LIMIT, LIMIT)


FORMULAS = {
    _swiglu: GateFormula("silu"),
    _limited: GateFormula("silu", True, ALPHA, LIMIT, 1.0),
    _limited_halves: GateFormula("gelu_tanh", limit=LIMIT),
}
UNKNOWN = [
    lambda rows: torch.relu(rows[:, :48]) * rows[:, 48:],
    lambda rows: silu(rows[:, 48:]) * rows[:, :48],
    lambda rows: silu(rows[:, :48]) * rows[:, 48:].clamp(max=LIMIT),
    lambda rows: (silu(rows[:, :48]) * rows[:, 48:]).clamp(max=1e6),
    lambda rows: silu(rows),
]


@pytest.mark.parametrize(("function", "formula"), FORMULAS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_formula_is_found_among_the_numbers_of_a_module(function, formula: GateFormula) -> None:  # type: ignore[no-untyped-def]
    assert recognised(function, (ALPHA, 0.1, LIMIT)) == formula


@pytest.mark.parametrize("function", UNKNOWN)
def test_another_function_has_no_formula(function) -> None:  # type: ignore[no-untyped-def]
    assert recognised(function, (ALPHA, LIMIT)) == AnyGate(function)


@pytest.mark.parametrize("needs_active", [True, False])
@pytest.mark.parametrize("function", FORMULAS, ids=lambda f: f.__name__)
def test_values_and_gradients_equal_autograd(function, needs_active: bool) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    hidden, bias, d = (
        torch.randn(n, m, dtype=torch.float64, generator=generator) for n, m in ((9, 8), (3, 8), (9, 4))
    )
    experts, factors = torch.arange(9) % 3, torch.rand(9, dtype=torch.float64, generator=generator).requires_grad_()
    leaf = hidden.clone().requires_grad_()
    rows = function(leaf + bias[experts])
    d_hidden, d_factors = torch.autograd.grad((rows * factors[:, None]), (leaf, factors), d)
    gates: tuple[ExpertGate, ...] = (FORMULAS[function], AnyGate(function))
    for gate in gates:
        torch.testing.assert_close(gate.forward(hidden, bias, experts), rows)
        got = gate.backward(hidden, bias, experts, d.clone(), factors.detach(), needs_active)
        torch.testing.assert_close(got.d_hidden, d_hidden)
        torch.testing.assert_close(got.d_factors, d_factors)
        assert (got.active is not None) == needs_active
        if got.active is not None:
            torch.testing.assert_close(got.active, rows)
