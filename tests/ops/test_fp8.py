"""8-bit weights: what a row keeps, one stored copy for both directions, and adapters that stay exact beside it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from loratune.ops.fp8 import MOST, Fp8Weight, quantise_rows

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
    assert torch.equal(rows.values.float().abs().amax(1), torch.full((20,), MOST))
    smallest = 2.0**-6 * rows.scale  # below it e4m3's steps stop shrinking
    assert bool(((rows.dense(torch.float32) - x).abs() <= HALF_STEP * torch.maximum(x.abs(), smallest)).all())


def test_a_row_of_zeros_stays_zero():
    rows = quantise_rows(torch.zeros(2, 16))
    assert torch.equal(rows.dense(torch.float32), torch.zeros(2, 16))


def test_one_stored_copy_serves_forward_and_backward():
    """Against the very numbers that are stored, either product errs by what its other operand loses: 2^-4 at most."""
    weight = a_weight(80, 96)
    held = Fp8Weight.quantised(weight)
    exact = held.dense().double()
    x, dy = torch.randn(30, 96), torch.randn(30, 80)
    assert off(held.forward(x), x.double() @ exact.T) < HALF_STEP
    assert off(held.d_input(dy), dy.double() @ exact) < HALF_STEP


def test_stacked_weights_give_each_members_products():
    parts = [Fp8Weight.quantised(a_weight(n, 64, seed=n)) for n in (32, 16, 48)]
    together = Fp8Weight.stacked(parts, 0)
    x = torch.randn(5, 64)
    assert torch.equal(together.forward(x), torch.cat([part.forward(x) for part in parts], 1))
    again = together.rows(slice(32, 48))
    assert torch.equal(again.dense(), parts[1].dense())
    assert again.values.data_ptr() == together.values[32:].data_ptr()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
def test_the_low_rank_part_rides_along_with_the_precision_of_bfloat16(size):
    """The adapter's part of y and dx, whatever the size of B, even far above that of W.

    Allowed: 2^-8 of that part for each of the two factors, and what 8 bits below the top of a row cannot show,
    2^-10 of a scale a term, which next to the error of the wide product is nothing.
    """
    torch.manual_seed(0)
    d_out, d_in, r = 1024, 1152, 6
    held = Fp8Weight.stacked([Fp8Weight.quantised(torch.randn(d_out, d_in) * 0.02)], r)
    assert held.carries
    lora_A, lora_B = torch.randn(r, d_in) / d_in**0.5, torch.randn(d_out, r) * size
    x, dy = torch.zeros(9, d_in), torch.zeros(9, d_out)  # the wide part is zero, so the rest can be seen alone
    inner, d_inner = torch.randn(9, r), torch.randn(9, r)
    for got, exact in (
        (held.forward_carrying(x, None, inner, lora_B), inner @ lora_B.T),
        (held.d_input_carrying(dy, d_inner, lora_A), d_inner @ lora_A),
    ):
        assert off(got, exact) < 2 * 2.0**-8 + 2.0**-10 / size * 0.02 / MOST * r
    x, dy = torch.randn(9, d_in), torch.randn(9, d_out)
    y = held.forward_carrying(x, None, x @ lora_A.T, lora_B)
    exact = x.double() @ held.dense().double().T + (x @ lora_A.T).double() @ lora_B.double().T
    assert off(y, exact) < HALF_STEP
    dx = held.d_input_carrying(dy, dy @ lora_B, lora_A)
    exact = dy.double() @ held.dense().double() + (dy @ lora_B).double() @ lora_A.double()
    assert off(dx, exact) < HALF_STEP


def test_an_adapter_of_high_rank_is_added_afterwards():
    assert not Fp8Weight.stacked([Fp8Weight.quantised(torch.randn(64, 64))], 16).carries


COMPARE = """
import torch
from loratune.ops import fp8, fp8_kernels

torch.manual_seed(0)
# Triton's interpreter loses the carry when a rounding reaches the next power of two, so numbers are taken that e4m3
# (or a pair of them) holds exactly: then a twin must agree to the bit.
grid = torch.randint(0, 120, (5, 96), dtype=torch.uint8).view(fp8.E4M3).float()
grid[:, 0] = 448.0
hi = torch.tensor([8.0, 10.0, 12.0])[torch.randint(3, (5, 6))]
pairs = hi + torch.tensor([0.25, 0.125, 0.0])[torch.randint(3, (5, 6))]

def same(a, b):
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

columns = 2.0 ** torch.randint(-2, 3, (96,)).float()
for x, scales in ((grid, None), (grid / columns, columns)):
    for inner in (None, fp8.Inner(pairs / 4, torch.tensor([4.0]))):
        values, scale = fp8_kernels.quantise_rows(x, scales, inner)
        expected = fp8.quantise_rows(x, scales, inner)
        assert torch.equal(scale, expected.scale)
        same(values, expected.values)
for matrix, divisor in ((pairs, torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0])), (pairs.T.contiguous().T, None)):
    for least in (1e-12, 1.0):
        factor = fp8_kernels.factor_of(matrix, divisor, least)
        assert torch.equal(factor, fp8.factor_of(matrix, divisor, least))
    one = torch.ones(1)
    places = [torch.zeros(5, 150, dtype=torch.uint8).view(fp8.E4M3) for _ in range(2)]
    fp8_kernels.lay_border(matrix, divisor, one, places[0][:, 7:135])
    fp8.lay_border(matrix, divisor, one, places[1][:, 7:135])
    same(*places)
bytes_ = torch.randint(0, 120, (150, 330), dtype=torch.uint8).view(fp8.E4M3)[:, :300]
same(fp8_kernels.transposed(bytes_, 16)[:, :150].contiguous(), fp8.transposed(bytes_, 16)[:, :150].contiguous())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
def test_every_kernel_equals_its_reference():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
