"""Norms and gated activations as autograd functions: values, gradients by differences, and memory layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from loratune.ops import passes
from loratune.ops.layer import ACTIVATIONS, NormSpec

FUNCTIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_gated_activation_and_its_gradients(kind):
    stacked = torch.randn(2, 5, 14, dtype=torch.float64, requires_grad=True)
    separate = [torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for gate, up in (separate, stacked.chunk(2, -1)):  # rows of chunks are strided
        torch.testing.assert_close(passes.gated(gate, up, kind), FUNCTIONS[kind](gate) * up)
    assert torch.autograd.gradcheck(lambda g, u: passes.gated(g, u, kind), separate)
    assert torch.autograd.gradcheck(lambda s: passes.gated(*s.chunk(2, -1), kind), stacked)


@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 5, 3, 4)])
def test_a_norm_and_its_gradient(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    spec = NormSpec(torch.randn(shape[-1], dtype=torch.float64), 1e-3)
    expected = functional.rms_norm(x, shape[-1:], spec.weight, 1e-3)
    torch.testing.assert_close(passes.norm(x, spec), expected)
    torch.testing.assert_close(passes.norm(x.transpose(0, 1), spec), expected.transpose(0, 1))
    assert torch.autograd.gradcheck(lambda x: passes.norm(x, spec), x)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)])
def test_a_norm_keeps_the_memory_layout(order):
    """As in transformers: heads that swapped places with tokens stay so, without a copy."""
    made = torch.randn(1, 6, 3, 8, requires_grad=True)
    x = made.permute(order)
    out = passes.norm(x, NormSpec(torch.ones(8), 1e-6))
    strides = [zip(t.shape, t.stride(), strict=True) for t in (out, x * 2)]
    of_out, expected = ([stride for size, stride in pairs if size > 1] for pairs in strides)
    assert of_out == expected
    torch.testing.assert_close(out, functional.rms_norm(x, (8,), torch.ones(8), 1e-6))
    incoming = torch.randn(out.shape)
    (got,) = torch.autograd.grad(out, made, incoming)
    (expected,) = torch.autograd.grad(functional.rms_norm(x, (8,), torch.ones(8), 1e-6), made, incoming)
    torch.testing.assert_close(got, expected)


def test_nothing_but_the_arguments_is_saved():
    x, spec = torch.randn(4, 8, requires_grad=True), NormSpec(torch.ones(8), 1e-6)
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in "gu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        passes.norm(x, spec)
        passes.gated(gate, up, "silu")
    assert saved == [x.data_ptr(), gate.data_ptr(), up.data_ptr()]
