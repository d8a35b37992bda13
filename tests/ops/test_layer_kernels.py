"""Triton twins of passes against their references, in Triton's interpreter, and compiled for a GPU.

A twin's error against float64 is at most twice that of the reference in the same precision. The interpreter is chosen
when kernels are defined, so each comparison runs in a process of its own.
"""

from __future__ import annotations

import pytest

from tests.ops.twins import compare, needs_triton

START = """
from dataclasses import replace
import torch
from loratune.ops import activation_kernels, cast_kernels, layer, logprobs, logprobs_kernels, norm_kernels
from loratune.ops import rotary_kernels
from loratune.ops.layer import ACTIVATIONS, IDENTITY, HeadSpec, NormSpec

torch.manual_seed(0)
EPS = 1e-5

def half(*shape):
    return torch.randn(*shape).to(torch.float16)

def wide(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, NormSpec):
        return replace(value, weight=wide(value.weight), bias=wide(value.bias))
    return replace(value, norm=wide(value.norm)) if isinstance(value, HeadSpec) else value

def error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())

def both(kernels, name, *arguments, pad=0, module=layer):
    def call(where, arguments):
        found = getattr(where, name)(*arguments)
        return found if isinstance(found, tuple) else (found,)

    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]  # some work in place
    reference = call(module, copies)
    exact = call(module, [wide(a) for a in arguments])
    got = call(kernels, arguments)
    for index, (a, b, c) in enumerate(zip(got, reference, exact, strict=True)):
        assert a.shape == b.shape == c.shape, name
        width = a.shape[-1] - (pad if index == 0 else 0)
        a, b, c = (x[..., :width] for x in (a, b, c))
        assert error(a, c) <= 2 * error(b, c), (name, arguments[-1], error(a, c), error(b, c))
"""

NORMS = """
def specs(d):
    yield NormSpec(half(d), EPS)
    yield NormSpec(half(d), EPS, offset=1.0, round_first=False)
    yield NormSpec(torch.randn(d), EPS, round_first=False)
    yield NormSpec(half(d), EPS, "layer", half(d))
    yield NormSpec(None, EPS, "layer")
    yield IDENTITY

rows, d = 3, 1000  # one row a program
x, y, strided = half(rows, d) + 0.5, 3 * half(rows, d), half(rows, d + 4)[:, :d]
for spec in specs(d):
    both(norm_kernels, "norm", x, spec, 8, pad=8)
    both(norm_kernels, "norm_backward", y, strided, x, spec, 8, pad=8)
    both(norm_kernels, "post_norm_backward", strided, y, spec, 0.22, 8, pad=8)
    both(norm_kernels, "post_norm_add", x, y, spec, 0.22)
    total, out = norm_kernels.post_norm_add_norm(x, y, spec, spec, 8)
    assert error(total, wide(layer.post_norm_add(x, y, spec))) < 1e-3
    assert error(out[:, :d], wide(layer.norm(total, spec))) < 1e-3
for scale in (1.0, 0.22):
    total, out = norm_kernels.add_norm(x, y, NormSpec(half(d), EPS), 8, None, scale)
    assert torch.equal(total, x + y * scale)
assert total is not out
assert norm_kernels.norm(x, IDENTITY) is x
assert norm_kernels.norm_backward(y, strided, strided, IDENTITY)[1] is strided
both(norm_kernels, "post_norm_backward", strided, strided, IDENTITY, 0.22)
total, out = norm_kernels.post_norm_add_norm(x, y, NormSpec(half(d), EPS), IDENTITY)
assert total is out

rows, d = 70, 40  # several rows a program, and a last program with fewer
x, y = half(rows, d) + 0.5, half(rows, d)
for spec in specs(d):
    both(norm_kernels, "norm", x, spec)
    both(norm_kernels, "post_norm_backward", y, x, spec)
"""

ACTIVATIONS = """
for kind in ACTIVATIONS:
    for rows, width in ((5, 70), (2, 5000)):  # within one program, and beyond
        x, d_out, up = 2 * half(rows, 2 * width), half(rows, width + 3)[:, :width], half(rows, width)
        both(activation_kernels, "gated", x, kind, 8, pad=8)
        both(activation_kernels, "gated_backward", x, d_out, kind, 8, pad=8)
        both(activation_kernels, "activation", x, kind, 8, pad=8)
        both(activation_kernels, "activation_backward", x, half(rows, 2 * width), kind, 8, pad=8)
        both(activation_kernels, "gated_product", x[:, width:], up, kind)
        both(activation_kernels, "gated_product_backward", d_out, x[:, width:], up, kind)
"""

HEADS = """
def angles(tokens, dim):
    half = torch.rand(tokens, dim // 2) * 6
    both = torch.cat([half, half], -1)
    return both.cos().half(), both.sin().half()

def llama(rotated, dim):
    return NormSpec(half(rotated, dim), EPS)

def gemma(rotated, dim):
    return NormSpec(half(rotated, dim), EPS, offset=1.0, round_first=False)

for heads in (  # queries, keys, dim, rotary_dim: halves that are powers of two, and others
    HeadSpec(3, 2, 16, 16),
    HeadSpec(3, 2, 16, 16, norm=llama(5, 16)),
    HeadSpec(3, 2, 24, 24, norm=gemma(5, 24)),
    HeadSpec(3, 2, 24, 16, norm=llama(5, 24)),
    HeadSpec(4, 2, 20, 6, interleaved=True),
    HeadSpec(3, 2, 16, 16, norm=llama(5, 16), whole_width=True),
    HeadSpec(4, 2, 20, 6, True, gemma(6, 20), whole_width=True, grouped=True),
    HeadSpec(3, 3, 24, 8, grouped=True),
    HeadSpec(3, 2, 16, 0),
    HeadSpec(3, 3, 24, 0, norm=llama(6, 24), grouped=True),
):
    tokens = 4
    (cos, sin), x = angles(tokens, heads.rotary_dim), half(tokens, heads.total, heads.dim)
    both(rotary_kernels, "rotate_heads", x.clone(), cos, sin, heads)
    d_query, d_value = half(tokens, heads.query, heads.dim), half(tokens, heads.key_value, heads.dim)
    d_key = half(tokens, heads.key_value + 4, heads.dim)[:, 2:-2]  # strided, as a slice is
    both(rotary_kernels, "rotate_heads_backward", d_query, d_key, d_value, cos, sin, x, heads, 8, pad=8)
heads = HeadSpec(12, 4, 128, 128)  # more than one program for each token
x, (cos, sin) = half(2, 20, 128), angles(2, 128)
both(rotary_kernels, "rotate_heads", x.clone(), cos, sin, heads)
both(rotary_kernels, "rotate_heads_backward", *heads.split(x), cos, sin, None, heads)
"""

LOGPROBS = """
for softcap in (None, 3.0):
    for tokens, vocabulary in ((6, 5003), (2, 40001)):  # within the columns that a program has at once, and beyond
        targets = torch.randint(vocabulary, (tokens,))
        logits = 4 * half(tokens, vocabulary)
        both(logprobs_kernels, "logprobs_of", logits, targets, 0.5, softcap, module=logprobs)

sources = [torch.randn(4, 50), torch.randn(300, 4)]
block = torch.zeros(300, 9, dtype=torch.float16)
targets = [torch.zeros(4, 50, dtype=torch.float16), block[:, 2:6]]
cast_kernels.CastAll(sources, targets, [1.0, 2.0])()
assert torch.equal(targets[0], sources[0].half())
assert torch.equal(block[:, 2:6], (2 * sources[1]).half())
assert not block[:, :2].any() and not block[:, 6:].any()
"""


@needs_triton
@pytest.mark.parametrize(
    "program", [NORMS, ACTIVATIONS, HEADS, LOGPROBS], ids=["norms", "activations", "heads", "logprobs and casts"]
)
def test_every_kernel_equals_its_reference(program):
    compare(START + program)
