"""Clipping and AdamW for all parameters at once, against PyTorch's; the twin in Triton's interpreter.

The interpreter is chosen when kernels are defined, so the comparison runs in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

from loratune.ops.adamw import AdamWSettings, AdamWState, clipped_adamw
from tests.ops.twins import compare, needs_triton

SHAPES = [(16, 300), (300, 16), (7,), (1, 1)]
SETTINGS = AdamWSettings(0.9, 0.99, 1e-8, 0.1)


def state_of(parameters: list[torch.Tensor]) -> AdamWState:
    moments = ([torch.zeros_like(p) for p in parameters] for _ in "mv")
    return AdamWState(parameters, *moments, [torch.zeros(()) for _ in parameters])


@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_equals_the_steps_of_pytorch(max_norm: float) -> None:
    """The third parameter has a gradient in every second step only."""
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    state, theirs = state_of([p.clone() for p in start]), [torch.nn.Parameter(p.clone()) for p in start]
    beta1, beta2, eps, decay = SETTINGS
    optimizer = torch.optim.AdamW(theirs, 1e-2, (beta1, beta2), eps, decay)
    for step in range(6):
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        given = [None if i == 2 and step % 2 else g for i, g in enumerate(gradients)]
        for parameter, gradient in zip(theirs, given, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        norm = float(torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        optimizer.step()
        outcome = torch.tensor([1.0, 0.0, 5.0])
        clipped_adamw(state, given, 1e-2, SETTINGS, max_norm, outcome)
        assert outcome.tolist() == pytest.approx([1.0, norm, 0.0])
    for index, parameter in enumerate(theirs):
        theirs_of = optimizer.state[parameter]
        torch.testing.assert_close(state.parameters[index], parameter.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state.exp_avg[index], theirs_of["exp_avg"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state.exp_avg_sq[index], theirs_of["exp_avg_sq"], rtol=1e-10, atol=1e-12)
        assert float(state.steps[index]) == float(theirs_of["step"])


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    state, outcome = state_of([torch.randn(shape) for shape in SHAPES]), torch.zeros(3)
    gradients = [torch.randn(shape) for shape in SHAPES]
    before = [p.clone() for p in state.parameters]
    if where == "gradient":
        gradients[1][3, 3] = float("inf")
    else:
        outcome[0] = float("nan")
    clipped_adamw(state, gradients, 1e-2, SETTINGS, 1.0, outcome)
    assert outcome[2] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))
    assert not any(t.any() for tensors in state[1:] for t in tensors)


COMPARE = """
import math, torch
from loratune.ops.adamw import AdamWState, AdamWSettings, clipped_adamw
from loratune.ops import adamw_kernels
from loratune.ops.adamw_kernels import ClippedAdamWLaunches

torch.manual_seed(0)
settings, rate = AdamWSettings(0.9, 0.999, 1e-8, 0.1), torch.tensor(1e-2)

def off(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())

def course(shapes, max_norm, steps=8):
    start = [torch.randn(shape) for shape in shapes]
    states = []
    for dtype in (torch.float32, torch.float64):
        p = [t.to(dtype, copy=True) for t in start]
        m, v = ([torch.zeros_like(t) for t in p] for _ in "mv")
        states.append(AdamWState(p, m, v, [torch.zeros(()) for _ in p]))
    ours, exact = states
    updates = ClippedAdamWLaunches(ours, settings)
    for step in range(steps):
        gradients = [torch.randn(shape) * 10.0 ** (step % 3) for shape in shapes]
        loss = 1.0
        if step == 2:
            gradients[0].view(-1)[-1] = float("inf")
        if step == 3:
            gradients[-1].view(-1)[0] = float("nan")
        if step == 4:
            loss = float("nan")
        if step == 5 and len(shapes) > 1:
            gradients[1] = None
        was = [t.clone() for tensors in ours for t in tensors]
        got, true = torch.tensor([loss, -1.0, -1.0]), torch.tensor([loss, -1.0, -1.0])
        updates(gradients, rate, max_norm, got)
        wide = [None if g is None else g.double() for g in gradients]
        clipped_adamw(exact, wide, float(rate), settings, max_norm, true)
        assert got[2] == true[2] == (step in (2, 3, 4))
        if got[2]:
            assert all(torch.equal(a, b) for a, b in zip(was, (t for tensors in ours for t in tensors)))
        if step not in (2, 3):
            assert abs(float(got[1]) / float(true[1]) - 1) < 1e-6
    for a, b in zip(ours, exact):
        for x, y in zip(a, b):
            assert off(x, y) < 2e-6, (shapes, off(x, y))  # 2^-24 for each of a dozen roundings a step, mostly less
    assert [float(s) for s in ours.steps][:2] == [5.0, 4.0][:len(shapes)]

for max_norm in (0.5, math.inf):
    course([(16, 300), (300, 16), (8, 4096), (4, 1)], max_norm)  # whole vectors of four
    course([(3, 1367), (5, 7), (1, 1), (9000,)], max_norm)  # odd sizes
course([(64,)], 0.5)
adamw_kernels._BLOCK = 4
course([(1, 3)] * 5 + [(5, 4096)], 0.5)  # more tensors and sums than the settling program loads at once
"""


@needs_triton
def test_the_kernels_equal_the_reference() -> None:
    compare(COMPARE)
