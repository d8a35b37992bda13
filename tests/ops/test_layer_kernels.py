"""Triton twins against their references, in Triton's interpreter, so that it needs no GPU.

The interpreter is chosen when kernels are defined, so the comparison runs in a process of its own.
"""

from __future__ import annotations

from tests.ops.twins import compare, needs_triton

COMPARE = """
import torch
from loratune.ops import layer_kernels as kernels, layer, logprobs

torch.manual_seed(0)

def half(*shape):
    return torch.randn(*shape).to(torch.float16)

def check(name, got, reference):
    got, reference = (x if isinstance(x, tuple) else (x,) for x in (got, reference))
    for a, b in zip(got, reference, strict=True):
        assert a.shape == b.shape, name
        meant = b != 0  # the reference has zeros where a row has room, and what the kernel leaves there means nothing
        error = float((a[meant].double() - b[meant].double()).norm() / b.double().norm())
        assert error < 2e-3, (name, error)  # a few roundings of float16, 4.9e-4 each

def both(name, *arguments, module=layer):
    reference = getattr(module, name)(*arguments)
    check(name, getattr(kernels, name)(*arguments), reference)  # in this order: the kernel may work in place

x, y, weight = half(5, 96), half(5, 96), half(96)
for pad in (0, 8):
    both("rms_norm", x, weight, 1e-6, pad)
    both("add_rms_norm", x, y, weight, 1e-6, pad)
    both("rms_norm_backward", y, half(5, 100)[:, :96], x, weight, 1e-6, pad)
    both("swiglu", half(5, 2 * 70), pad)
    both("swiglu_backward", half(5, 2 * 70), half(5, 70), pad)
heads, cos, sin, table = half(5, 7, 16), half(5, 16), half(5, 16), half(5, 16)
for norm in (None, table):
    both("rotate", heads, cos, sin, 5, norm, 1e-6)
    d_key = half(5, 9, 16)[:, 3:5]  # strided, as a slice is
    for pad in (0, 8):
        both("rotate_backward", half(5, 3, 16), d_key, half(5, 2, 16), cos, sin, heads, norm, 1e-6, pad)
for softcap in (None, 3.0):
    for tokens, vocabulary in ((6, 5003), (2, 40001)):  # within what a program has at once, and beyond
        targets = torch.randint(vocabulary, (tokens,))
        both("logprobs_of", 4 * half(tokens, vocabulary), targets, 0.5, softcap, module=logprobs)

sources = [torch.randn(4, 50), torch.randn(300, 4)]
block = torch.zeros(300, 9, dtype=torch.float16)
targets = [torch.zeros(4, 50, dtype=torch.float16), block[:, 2:6]]
kernels.CastAll(sources, targets, [1.0, 2.0])()
assert torch.equal(targets[0], sources[0].half())
assert torch.equal(block[:, 2:6], (2 * sources[1]).half())
assert not block[:, :2].any() and not block[:, 6:].any()
"""


@needs_triton
def test_every_kernel_equals_its_reference():
    compare(COMPARE)
