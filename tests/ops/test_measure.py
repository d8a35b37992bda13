"""Scale of a row from its maximum and norm: never too small, and as accurate as the exact maximum."""

from __future__ import annotations

import pytest
import torch

from loratune.ops import layer
from loratune.ops.layer import IDENTITY, HeadSpec, NormSpec
from loratune.ops.measure import (
    E4M3_MAX,
    MIN_SCALE,
    PAD_COLUMNS,
    PIECES,
    Measure,
    power_of_two_above,
    row_statistics,
    scales,
    statistics_of,
)
from loratune.precision.fp8 import Fp8Weight
from loratune.precision.fp8_rows import E4M3, adapter_factors, quantise_augmented
from tests.ops.twins import compare, needs_triton


def off(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def test_the_next_power_of_two():
    v = torch.tensor([1.0, 1.0000001, 1.5, 2.0, 448.0, 2.0**-40, 3e-9])
    assert torch.equal(power_of_two_above(v), v.double().log2().ceil().exp2().float())


def test_the_largest_element_is_one_that_8_bits_hold():
    x = torch.randn(50, 64) * torch.logspace(-8, 8, 50)[:, None]
    found = row_statistics(x, Measure())
    for bound in (0.0, 0.3, 20.0):
        t = scales(found, bound)
        assert bool((x.norm(dim=1, keepdim=True) * bound <= E4M3_MAX * t * (1 + 1e-6)).all())
        top = (x / t).abs().amax(1).to(E4M3).float()
        assert torch.equal(top, E4M3_MAX / power_of_two_above(E4M3_MAX / top))
    assert torch.equal(scales(row_statistics(torch.zeros(2, 8), Measure()), 5.0), torch.full((2, 1), MIN_SCALE))


@pytest.mark.parametrize("grown", [1.0, 30.0, 1e4])
def test_nothing_saturates_even_where_x_points_along_a_row_of_A(grown):
    """The worst case of Cauchy-Schwarz: x parallel to A_r. The pair of 8-bit columns holds low_rank to 2^-8."""
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(4, 1024) * grown / 32, torch.randn(1024, 4) * grown
    weight = Fp8Weight.quantised(torch.randn(1024, 1024) * 0.02)
    numbers = adapter_factors(lora_A, lora_B, weight.scale)
    ratio = lora_B / weight.scale
    for x, matrix, columns, two in (
        (lora_A * 3, lora_A.T, None, numbers[:2]),
        ((ratio / weight.scale).T.contiguous(), lora_B, weight.scale[:, 0], numbers[2:]),
    ):
        rows, inner = quantise_augmented(x, matrix, columns, two)
        hi, lo = rows.values.float()[:, 1024:1028], rows.values.float()[:, 1028:1032]
        assert bool((rows.values.float().abs() < E4M3_MAX * 1.001).all())
        held = (hi + lo) * rows.scale / two[0]
        torch.testing.assert_close(held.diagonal(), inner.diagonal(), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("size", [0.0, 1e-2, 1.0])
def test_the_bound_costs_the_products_nothing(outlier, size):
    """Within a tenth of the error with the exact maximum of the whole row, adapter columns included.

    B is up to ten times the largest element of W; rows have outliers or none.
    """
    torch.manual_seed(0)
    weight = Fp8Weight.quantised(torch.randn(1024, 4096) * 0.02)
    x = torch.randn(64, 4096)
    x[:, :4] *= outlier
    lora_A, lora_B = (torch.rand(16, 4096) * 2 - 1) / 64, torch.randn(1024, 16) * size
    numbers = adapter_factors(lora_A, lora_B, weight.scale)
    rows, inner = quantise_augmented(x, lora_A.T, None, numbers[:2])
    largest = torch.maximum(x.abs().amax(1), (inner * numbers[0]).abs().amax(1))[:, None] / E4M3_MAX
    exact = x.double() @ weight.dense().double().T
    ours = (rows.values[:, :4096].float() * rows.scale) @ weight.dense().T
    theirs = ((x / largest).to(E4M3).float() * largest) @ weight.dense().T
    assert off(ours, exact) <= 1.1 * off(theirs, exact)


def test_passes_store_the_statistics_of_their_rows():
    torch.manual_seed(0)
    x, y, scale = torch.randn(5, 96), torch.randn(5, 96), 2.0 ** torch.randint(-3, 3, (96,))
    cos, sin, rows = torch.rand(5, 16), torch.rand(5, 16), torch.randn(5, 6, 16)
    spec, heads = NormSpec(torch.rand(96), 1e-6), HeadSpec(2, 2, 16, 16)
    plain, scaled = Measure(), Measure(scale)
    for padded, width, measure in (
        (layer.norm(x, spec, PAD_COLUMNS, plain), 96, plain),
        (layer.norm(x, IDENTITY, PAD_COLUMNS, plain), 96, plain),
        (layer.add_norm(x, y, spec, PAD_COLUMNS, plain)[1], 96, plain),
        (layer.post_norm_add_norm(x, y, spec, spec, PAD_COLUMNS, plain)[1], 96, plain),
        (layer.norm_backward(y, x, x, spec, PAD_COLUMNS, scaled)[0], 96, scaled),
        (layer.post_norm_backward(y, x, spec, 1.0, PAD_COLUMNS, scaled), 96, scaled),
        (layer.gated(x, "silu", PAD_COLUMNS, plain), 48, plain),
        (layer.gated_backward(x, y[:, :48], "silu", PAD_COLUMNS, scaled)[0], 96, scaled),
        (layer.activation(x, "gelu", PAD_COLUMNS, plain), 96, plain),
        (layer.activation_backward(x, y, "gelu", PAD_COLUMNS, scaled)[0], 96, scaled),
        (layer.rotate_heads_backward(*heads.split(rows), cos, sin, None, heads, PAD_COLUMNS, scaled), 96, scaled),
    ):
        assert padded.shape[1] == width + PAD_COLUMNS
        found = statistics_of(padded, width)
        assert found.shape[1] == 2 * PIECES
        assert torch.equal(found, row_statistics(padded[:, :width].contiguous(), measure))


COMPARE = """
import torch
from loratune.ops import activation_kernels, layer, measure, norm_kernels, rotary_kernels
from loratune.ops.layer import IDENTITY, HeadSpec, NormSpec

torch.manual_seed(0)

def half(*shape):
    return torch.randn(*shape).half()

def check(got, width, asked):
    found, expected = measure.statistics_of(got, width), measure.row_statistics(got[:, :width], asked)
    assert torch.equal(found[:, :measure.PIECES].amax(1), expected[:, 0])
    squares = found[:, measure.PIECES:].sum(1)
    torch.testing.assert_close(squares, expected[:, measure.PIECES], rtol=1e-5, atol=0)

def both(kernels, name, at, width, asked, *arguments):
    for module in (kernels, layer):
        out = getattr(module, name)(*arguments, measure.PAD_COLUMNS, asked)
        check(out[at] if isinstance(out, tuple) else out, width, asked)

def factors(width):
    return measure.Measure((2.0 ** torch.randint(-3, 3, (width,))).bfloat16())

plain = measure.Measure()
x, y, spec = half(5, 96), half(5, 96), NormSpec(half(96), 1e-6)
both(norm_kernels, "norm", 0, 96, plain, x, spec)
both(norm_kernels, "norm", 0, 96, plain, x, IDENTITY)
both(norm_kernels, "add_norm", 1, 96, plain, x, y, spec)
both(norm_kernels, "post_norm_add_norm", 1, 96, plain, x, y, spec, spec)
both(norm_kernels, "norm_backward", 0, 96, factors(96), y, half(5, 100)[:, :96], x, spec)
both(norm_kernels, "norm_backward", 0, 96, plain, y, half(5, 100)[:, :96], x, spec)
both(norm_kernels, "post_norm_backward", 0, 96, factors(96), y, x, spec, 1.0)
for width in (70, 5000):  # one program and three
    gate_up, d_out = half(5, 2 * width), half(5, width)
    both(activation_kernels, "gated", 0, width, plain, gate_up, "silu")
    both(activation_kernels, "gated_backward", 0, 2 * width, factors(2 * width), gate_up, d_out, "silu")
    both(activation_kernels, "activation", 0, width, plain, d_out, "gelu")
    both(activation_kernels, "activation_backward", 0, width, factors(width), d_out, d_out, "gelu")
for dim, rotary in ((16, 16), (24, 8)):
    for total in (7, 300):  # with 300, more than 16 programs would take 18 heads each
        query, d_key = total - 4, half(5, 9, dim)[:, 3:5]
        cos, sin, parts = half(5, rotary), half(5, rotary), (half(5, query, dim), d_key, half(5, 2, dim))
        for norm in (None, NormSpec(half(total - 2, dim), 1e-6)):
            heads, x = HeadSpec(query, 2, dim, rotary, norm=norm), half(5, total, dim)
            asked = factors(total * dim)
            both(rotary_kernels, "rotate_heads_backward", 0, total * dim, asked, *parts, cos, sin, x, heads)
"""


@needs_triton
def test_kernels_store_the_statistics_of_their_rows():
    compare(COMPARE)
