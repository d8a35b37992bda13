"""8-bit weights: precision of a row, one stored copy for both directions, and exact adapters beside it."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.low_rank import gradients
from loratune.ops.measure import E4M3_MAX
from loratune.ops.projection import StackedAdapters
from loratune.precision.fp8 import Fp8Weight, quantise_rows
from loratune.precision.fp8_projection import Fp8Projection
from tests.ops.twins import compare, needs_triton

HALF_STEP = 2.0**-4
"""Half of the distance between neighbours of e4m3, relative to the smaller one."""


def off(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def a_weight(d_out, d_in, seed=0):
    """A matrix whose rows differ a hundredfold in size, as those of trained models may."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, -1, d_out)[torch.randperm(d_out, generator=generator), None]
    return torch.randn(d_out, d_in, generator=generator) * sizes


def test_every_element_is_within_half_a_step_and_the_largest_is_at_the_top():
    x = a_weight(20, 96)
    rows = quantise_rows(x)
    assert torch.equal(rows.values.float().abs().amax(1), torch.full((20,), E4M3_MAX))
    smallest = 2.0**-6 * rows.scale  # below it e4m3's steps stop shrinking
    assert bool(((rows.dense(torch.float32) - x).abs() <= HALF_STEP * torch.maximum(x.abs(), smallest)).all())


def test_a_row_of_zeros_stays_zero():
    rows = quantise_rows(torch.zeros(2, 16))
    assert torch.equal(rows.dense(torch.float32), torch.zeros(2, 16))


def test_one_stored_copy_serves_forward_and_backward():
    """Against the stored numbers, either product errs by the rounding of its other operand: 2^-4 at most."""
    weight = a_weight(80, 96)
    held = Fp8Weight.quantised(weight)
    exact = held.dense().double()
    x, dy = torch.randn(30, 96), torch.randn(30, 80)
    assert off(held.forward(x), x.double() @ exact.T) < HALF_STEP
    assert off(held.d_input(dy), dy.double() @ exact) < HALF_STEP


def test_stacked_weights_give_each_members_products():
    parts = [Fp8Weight.quantised(a_weight(n, 64, seed=n)) for n in (32, 16, 48)]
    together = Fp8Weight.joined(parts, 0)
    x = torch.randn(5, 64)
    assert torch.equal(together.forward(x), torch.cat([part.forward(x) for part in parts], 1))
    again = together.rows(slice(32, 48))
    assert torch.equal(again.dense(), parts[1].dense())
    assert again.values.data_ptr() == together.values[32:].data_ptr()


def a_projection(d_out, d_in, lora_A, lora_B, hold_transposed=False):
    r = lora_A.shape[0]
    held = Fp8Weight.joined([Fp8Weight.quantised(torch.randn(d_out, d_in) * 0.02)], r)
    assert held.augmented is not None
    member = StackedAdapters([slice(0, d_out)], [slice(0, r)], [1.0])
    projection = Fp8Projection.of(held, None, (lora_A, lora_B), member, hold_transposed=hold_transposed)
    projection.refresh()
    return projection


def d_input(projection, dy):
    return projection.backward(dy).d_input()


@pytest.mark.parametrize("hold_transposed", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_adapter_columns_have_the_precision_of_bfloat16(size, hold_transposed):
    """The adapter's part of y and dx, whatever the size of B, even far above that of W.

    It can be seen alone where W is zero. Allowed: 2^-8 of that part for each of the two factors, and 2^-10 of a
    scale per term, which 8 bits below the top of a row cannot hold. The wide product's error is far larger.
    """
    torch.manual_seed(0)
    d_out, d_in, r = 1024, 1152, 6
    lora_A, lora_B = torch.randn(r, d_in) / d_in**0.5, torch.randn(d_out, r) * size
    projection = a_projection(d_out, d_in, lora_A, lora_B, hold_transposed)
    x, dy = torch.randn(9, d_in), torch.randn(9, d_out)
    y, inner = projection.forward(x)
    exact = x.double() @ projection.frozen.dense().double().T
    assert off(y, exact + (x @ lora_A.T).double() @ lora_B.double().T) < HALF_STEP
    dx = d_input(projection, dy)
    exact = dy.double() @ projection.frozen.dense().double()
    assert off(dx, exact + (dy @ lora_B).double() @ lora_A.double()) < HALF_STEP
    dA, dB = gradients(*projection.backward(dy).d_adapters(x, inner))
    torch.testing.assert_close(dA, (dy @ lora_B).T @ x)
    torch.testing.assert_close(dB, dy.T @ inner)

    projection.frozen.values.view(torch.uint8).zero_()
    if projection.transposed is not None:
        projection.transposed[:, :d_out].view(torch.uint8).zero_()
    for got, exact in (
        (projection.forward(x)[0], (x @ lora_A.T) @ lora_B.T),
        (d_input(projection, dy), (dy @ lora_B) @ lora_A),
    ):
        assert off(got, exact) < 2 * 2.0**-8 + 2.0**-10 / size * 0.02 / E4M3_MAX * r


def test_rows_of_zeros_in_the_weight_leave_the_adapter_as_exact_as_it_is():
    """B is held over the scale of its row of W; a scale of next to nothing would drive other rows out of range."""
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024) * 0.02
    weight[3], weight[5] = 0.0, 1e-30
    lora_A, lora_B = torch.randn(4, 1024) / 32, torch.randn(1024, 4) * 0.01
    held = Fp8Weight.joined([Fp8Weight.quantised(weight)], 4)
    member = StackedAdapters([slice(0, 1024)], [slice(0, 4)], [1.0])
    projection = Fp8Projection.of(held, None, (lora_A, lora_B), member, hold_transposed=False)
    projection.refresh()
    held.values.view(torch.uint8).zero_()
    x = torch.randn(9, 1024)
    assert off(projection.forward(x)[0], (x @ lora_A.T) @ lora_B.T) < 2 * 2.0**-8


def test_an_adapter_of_high_rank_is_added_afterwards():
    assert not Fp8Weight.joined([Fp8Weight.quantised(torch.randn(64, 64))], 16).augmented


COMPARE = """
import torch
from loratune.precision import fp8, fp8_kernels, fp8_rows
from loratune.ops import measure
from loratune.precision.fp8_kernels import AdapterTensors, RefreshAll
from loratune.precision.fp8_projection import Fp8Projection
from loratune.ops.projection import StackedAdapters

torch.manual_seed(0)
# Triton's interpreter loses the carry when a rounding reaches the next power of two, so numbers are taken that e4m3
# (or a pair of them) holds exactly: then a twin must agree to the bit.

def grid(rows, width, least, most):
    return torch.randint(least, most, (rows, width), dtype=torch.uint8).view(fp8_rows.E4M3).float()

def same(a, b):
    assert a.shape == b.shape
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

columns = 2.0 ** torch.randint(-2, 3, (96,)).float()
x = grid(5, 96, 0, 120)
x[:, 0] = 448.0
for rows, scales in ((x, None), (x / columns, columns)):
    values, scale = fp8_kernels.quantise_rows(rows, scales)
    expected = fp8_rows.quantise_rows(rows, scales)
    assert torch.equal(scale, expected.scale)
    same(values, expected.values)

# Ranks 0 to 4 take one column of x each, the last one a sum of two that only a pair holds.
matrix = torch.zeros(96, 6)
for rank in range(5):
    matrix[4 + rank * 7, rank] = 2.0 ** (rank - 3)
matrix[1, 5] = matrix[2, 5] = 1.0
for tall in (5, 1030):  # 1030: tiles of 64 rows
    x = grid(tall, 96, 56, 100)
    x[:, 0] = 448.0
    x[:, 1] = torch.tensor([8.0, 10.0, 12.0])[torch.randint(3, (tall,))]
    x[:, 2] = torch.tensor([0.25, 0.125, 0.0])[torch.randint(3, (tall,))]
    for scales in (None, columns):
        rows = (x if scales is None else x / scales).half()
        across = (matrix if scales is None else matrix * scales[:, None]).half()
        padded = torch.nn.functional.pad(rows, (0, measure.PAD_COLUMNS))
        measure.store_statistics(padded, 96, measure.Measure(scales))
        for bound in (0.0, 3.0):
            numbers = torch.tensor([2.0, bound])
            for found in (fp8_kernels.measured_rows(rows, scales), measure.statistics_of(padded, 96)):
                expected, inner = fp8_rows.augment_rows(rows, found, across, scales, numbers)
                (values, scale), got = fp8_kernels.augment_rows(padded[:, :96], found, across, scales, numbers)
                assert torch.equal(scale, expected.scale)
                assert torch.equal(got, inner)
                assert inner[:, 5].unique().numel() > 2
                same(values, expected.values)

bytes_ = torch.randint(0, 120, (150, 330), dtype=torch.uint8).view(fp8_rows.E4M3)[:, :300]
same(fp8_kernels.transposed(bytes_, None, None), fp8_rows.transposed(bytes_))
lora_A = (torch.randint(-8, 8, (6, 300)) * 2.0**-4).half()
for factor in (torch.tensor([1.0]), torch.tensor([2.0**-6])):
    same(fp8_kernels.transposed(bytes_, lora_A, factor), fp8_rows.transposed(bytes_, lora_A, factor))

def projections(hold_transposed):
    torch.manual_seed(1)
    for d_out, d_in, r in ((1024, 1040, 6), (2064, 1024, 16)):
        weight = fp8.Fp8Weight.joined([fp8.Fp8Weight.quantised(torch.randn(d_out, d_in) * 0.02)], r)
        adapter = (torch.randint(-8, 8, (r, d_in)) / 64).half(), (torch.randint(-8, 8, (d_out, r)) / 2).half()
        member = StackedAdapters([slice(0, d_out)], [slice(0, r)], [1.0])
        yield Fp8Projection.of(weight, None, adapter, member, hold_transposed=hold_transposed)

for hold_transposed in (False, True):
    expected, got = list(projections(hold_transposed)), list(projections(hold_transposed))
    for p in expected:
        p.refresh()
    RefreshAll([
        AdapterTensors(p.lora_A, p.lora_B, p.frozen.scale, p.augmented[:, p.frozen.shape[1]:],
                p.transposed[:, p.frozen.shape[0]:] if hold_transposed else None, p.factors)
        for p in got
    ])()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.factors, b.factors, rtol=1e-6, atol=0)
        assert bool((b.factors > 0).all())
        same(a.augmented, b.augmented)
        if hold_transposed:
            same(a.transposed, b.transposed)
"""


@needs_triton
def test_every_kernel_equals_its_reference():
    compare(COMPARE)
