"""The scale of a row before its low-rank part is known: never too small, exact where it can be, and free."""

from __future__ import annotations

import pytest
import torch

from loratune.ops import layer
from loratune.ops.measure import LEAST, MOST, PAD_COLUMNS, PIECES, Measure, behind, measured, scales, upward
from loratune.precision.fp8 import Fp8Weight
from loratune.precision.fp8_rows import E4M3, adapter_factors, quantise_augmented


def off(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def test_upward_gives_the_next_power_of_two():
    v = torch.tensor([1.0, 1.0000001, 1.5, 2.0, 448.0, 2.0**-40, 3e-9])
    assert torch.equal(upward(v), v.double().log2().ceil().exp2().float())


def test_the_largest_element_is_one_that_8_bits_hold():
    x = torch.randn(50, 64) * torch.logspace(-8, 8, 50)[:, None]
    found = measured(x, Measure())
    for bound in (0.0, 0.3, 20.0):
        t = scales(found, bound)
        assert bool((x.norm(dim=1, keepdim=True) * bound <= MOST * t * (1 + 1e-6)).all())
        top = (x / t).abs().amax(1).to(E4M3).float()
        assert torch.equal(top, MOST / upward(MOST / top))
    assert torch.equal(scales(measured(torch.zeros(2, 8), Measure()), 5.0), torch.full((2, 1), LEAST))


@pytest.mark.parametrize("grown", [1.0, 30.0, 1e4])
def test_nothing_saturates_even_where_x_points_along_a_row_of_A(grown):
    """The worst there is, by Cauchy and Schwarz: x parallel to A_r. And both sides agree on it to 2^-8."""
    torch.manual_seed(0)
    lora_A, lora_B = torch.randn(4, 1024) * grown / 32, torch.randn(1024, 4) * grown
    weight = Fp8Weight.quantised(torch.randn(1024, 1024) * 0.02)
    numbers = adapter_factors(lora_A, lora_B, weight.scale)
    ratio = lora_B / weight.scale
    for x, thin, columns, two in (
        (lora_A * 3, lora_A.T, None, numbers[:2]),
        ((ratio / weight.scale).T.contiguous(), lora_B, weight.scale[:, 0], numbers[2:]),
    ):
        rows, inner = quantise_augmented(x, thin, columns, two)
        hi, lo = rows.values.float()[:, 1024:1028], rows.values.float()[:, 1028:1032]
        assert bool((rows.values.float().abs() < MOST * 1.001).all())
        held = (hi + lo) * rows.scale / two[0]
        torch.testing.assert_close(held.diagonal(), inner.diagonal(), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("size", [0.0, 1e-2, 1.0])
def test_the_bound_costs_the_products_nothing(outlier, size):
    """Within a tenth of the error with the scale from the exact maximum of all that goes into the row; B of up to ten
    times W's largest element, rows with and without outliers."""
    torch.manual_seed(0)
    weight = Fp8Weight.quantised(torch.randn(1024, 4096) * 0.02)
    x = torch.randn(64, 4096)
    x[:, :4] *= outlier
    lora_A, lora_B = (torch.rand(16, 4096) * 2 - 1) / 64, torch.randn(1024, 16) * size
    numbers = adapter_factors(lora_A, lora_B, weight.scale)
    rows, inner = quantise_augmented(x, lora_A.T, None, numbers[:2])
    largest = torch.maximum(x.abs().amax(1), (inner * numbers[0]).abs().amax(1))[:, None] / MOST
    exact = x.double() @ weight.dense().double().T
    ours = (rows.values[:, :4096].float() * rows.scale) @ weight.dense().T
    theirs = ((x / largest).to(E4M3).float() * largest) @ weight.dense().T
    assert off(ours, exact) <= 1.1 * off(theirs, exact)


def test_passes_leave_what_measured_finds():
    torch.manual_seed(0)
    x, y, weight, scale = torch.randn(5, 96), torch.randn(5, 96), torch.rand(96), 2.0 ** torch.randint(-3, 3, (96,))
    cos, sin, heads = torch.rand(5, 16), torch.rand(5, 16), torch.randn(5, 6, 16)
    plain, scaled = Measure(), Measure(scale)
    for padded, width, measure in (
        (layer.rms_norm(x, weight, 1e-6, PAD_COLUMNS, plain), 96, plain),
        (layer.add_rms_norm(x, y, weight, 1e-6, PAD_COLUMNS, plain)[1], 96, plain),
        (layer.rms_norm_backward(y, x, x, weight, 1e-6, PAD_COLUMNS, scaled)[0], 96, scaled),
        (layer.swiglu(x, PAD_COLUMNS, plain), 48, plain),
        (layer.swiglu_backward(x, y[:, :48], PAD_COLUMNS, scaled)[0], 96, scaled),
        (
            layer.rotate_backward(*heads.split(2, 1), cos, sin, None, None, 0.0, PAD_COLUMNS, Measure(scale)),
            96,
            scaled,
        ),
    ):
        assert padded.shape[1] == width + PAD_COLUMNS
        found = behind(padded, width)
        assert found.shape[1] == 2 * PIECES
        assert torch.equal(found, measured(padded[:, :width].contiguous(), measure))
