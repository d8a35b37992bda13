"""Norms and gated activations in one pass: against PyTorch's own, by differences, and the kernels against both."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from loratune.ops import passes
from tests.ops.twins import compare, needs_triton

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("kind", passes.KINDS)
def test_a_gated_activation_and_its_gradients(kind):
    stacked = torch.randn(2, 5, 14, dtype=torch.float64, requires_grad=True)
    apart = [torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for gate, up in (apart, stacked.chunk(2, -1)):  # rows of chunks lie apart
        torch.testing.assert_close(passes.gated(gate, up, kind), ACTIVATIONS[kind](gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: passes.gated(g, u, kind), apart)
    assert torch.autograd.gradcheck(lambda s: passes.gated(*s.chunk(2, -1), kind), stacked)


@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 5, 3, 4)])
def test_a_norm_and_its_gradient(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64)
    expected = functional.rms_norm(x, shape[-1:], weight, 1e-3)
    torch.testing.assert_close(passes.rms_norm(x, weight, 1e-3), expected)
    torch.testing.assert_close(passes.rms_norm(x.transpose(0, 1), weight, 1e-3), expected.transpose(0, 1))
    assert torch.autograd.gradcheck(lambda x: passes.rms_norm(x, weight, 1e-3), x)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)])
def test_a_norm_leaves_heads_where_they_lie(order):
    """As transformers' operators do: heads that have changed places with tokens come out so, without a copy."""
    made = torch.randn(1, 6, 3, 8, requires_grad=True)
    x = made.permute(order)
    out = passes.rms_norm(x, torch.ones(8), 1e-6)
    assert out.stride() == (x * 2).stride()
    torch.testing.assert_close(out, functional.rms_norm(x, (8,), torch.ones(8), 1e-6))
    incoming = torch.randn(out.shape)
    (got,) = torch.autograd.grad(out, made, incoming)
    (expected,) = torch.autograd.grad(functional.rms_norm(x, (8,), torch.ones(8), 1e-6), made, incoming)
    torch.testing.assert_close(got, expected)


def test_a_weight_s_dtype_says_what_is_rounded():
    x, weight = torch.randn(50, 64).bfloat16(), torch.randn(64).bfloat16()
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    rounded, whole = passes.rms_norm(x, weight, 1e-6), passes.rms_norm(x, weight.float(), 1e-6)
    assert torch.equal(rounded, weight * unit.bfloat16())
    assert torch.equal(whole, (weight.float() * unit).bfloat16())
    assert not torch.equal(rounded, whole)


COMPARE = """
import torch
from loratune.ops import passes, passes_kernels

torch.manual_seed(0)

def half(*shape):
    return torch.randn(*shape).to(torch.float16)

def both(name, *arguments):
    got, reference = (getattr(module, name)(*arguments) for module in (passes_kernels, passes))
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, reference)), strict=True):
        assert a.shape == b.shape, name
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < 1e-3, (name, arguments[-1], error)  # a rounding of float16 is 4.9e-4 at most

for rows, width in ((5, 96), (37, 16), (1, 5000), (300, 40)):  # several rows a program, and parts of one
    for weight in (half(width), torch.randn(width)):
        both("norm", half(rows, width), weight, 1e-6)
        both("norm_backward", half(rows, width), half(rows, width), weight, 1e-6)
for kind in passes.KINDS:
    gate, up = half(5, 2 * 70).chunk(2, -1)
    both("gated_product", gate, up, kind)
    both("gated_backward", half(5, 70), gate, up, kind)
    both("gated_product", half(2, 5000), half(2, 5000), kind)
    both("gated_backward", half(2, 5000), half(2, 5000), half(2, 5000), kind)
"""


@needs_triton
def test_the_kernels_equal_the_formulas():
    compare(COMPARE)
