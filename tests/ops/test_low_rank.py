"""Low-rank products: the references against the formulas, and the Triton twins in the interpreter."""

from __future__ import annotations

import torch

from loratune.ops.low_rank import AdapterSlices, down_project, gradients
from tests.ops.twins import compare, needs_triton

MEMBERS = AdapterSlices([slice(0, 96), slice(128, 168)], [slice(0, 5), slice(5, 21)], [1.0, 0.5])

COMPARE = """
import torch
from loratune.ops import low_rank, low_rank_gradient_kernels, low_rank_kernels
from loratune.ops.buffers import KernelBuffers
from loratune.ops.low_rank import GradientOperands
from loratune.ops.dropout import dropout_key, row_key
from tests.ops.test_low_rank import MEMBERS

torch.manual_seed(0)
buffers = KernelBuffers()

def half(*shape):
    return torch.randn(*shape).to(torch.float16)

def close(got, exact, what):
    error = float((got.double() - exact.double()).norm() / exact.double().norm())
    assert error < 1e-3, (what, error)  # one rounding to float16 at most: sums are in float32

for rows, terms, ranks in ((1, 40, 3), (35, 900, 21), (1030, 260, 70)):
    wide, transposed_factor = half(rows, terms + 9)[:, :terms], half(ranks, terms).T
    for factor in (transposed_factor, half(terms, ranks + 5)[:, :ranks]):
        whole = half(rows, ranks + 17)
        tail, behind = whole[:, : ranks + 5], whole[:, ranks + 5 :].clone()
        exact = wide.double() @ factor.double()
        for keep in (True, False):
            copy = torch.zeros(rows, terms + 3, dtype=torch.float16)
            kept = low_rank_kernels.down_project(wide, factor, tail, keep, copy[:, :terms], buffers=buffers)
            assert torch.equal(copy[:, :terms], wide) and not copy[:, terms:].any()
            close(tail[:, :ranks], exact, "tail")
            close(kept, exact, "kept")
            assert (kept.data_ptr() == tail.data_ptr()) != keep
        assert not tail[:, ranks:].any() and torch.equal(whole[:, ranks + 5 :], behind)
        close(low_rank_kernels.down_project(wide, factor, buffers=buffers), exact, "alone")
assert not buffers.counters(torch.device("cpu")).any()

for rows in (1, 130, 1100):
    x, dy = half(rows, 170 + 3)[:, :170], half(rows, 170)
    d_inner, inner = half(rows, 64), half(rows, 64)
    exact = low_rank.gradients.__wrapped__(*(t.double() for t in (x, d_inner, dy, inner)), MEMBERS)
    got = low_rank_gradient_kernels.gradients(x, d_inner, dy, inner, MEMBERS, buffers=buffers)
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape and a.is_contiguous() and a.dtype == torch.float32
        close(a, b, "gradient")
assert not buffers.counters(torch.device("cpu")).any()

of_one = low_rank.AdapterSlices([slice(0, 48)], [slice(0, 16)], [1.0])
for count in (2, 3, 4):  # one launch, and one projection too many for it
    works = []
    for nth in range(count):
        of = MEMBERS if nth == 1 else of_one
        d_in, d_out, total = 33 + 16 * nth, of.rows[-1].stop, of.ranks[-1].stop
        x = half(130, d_in + 3)[:, :d_in]
        works.append(GradientOperands(x, half(130, total), half(130, d_out), half(130, 64), of, None, buffers))
    together = low_rank_gradient_kernels.gradients_of(works)
    assert len({gradients[0].untyped_storage().data_ptr() for gradients in together}) == (2 if count > 3 else 1)
    for got, work in zip(together, works, strict=True):
        exact = low_rank.gradients.__wrapped__(*(t.double() for t in work[:4]), work.members)
        for a, b in zip(got, exact, strict=True):
            assert a.shape == b.shape and a.is_contiguous() and a.dtype == torch.float32
            close(a, b, "gradient beside others")
assert not buffers.counters(torch.device("cpu")).any()

places = [slice(0, 5), slice(5, 21), slice(21, 91)]  # one has more ranks than a program computes
of_two = low_rank.AdapterSlices([slice(0, 96), slice(128, 168)], [slice(0, 5), slice(5, 75)], [1.0, 0.5])
for rows, first in ((35, 3), (130, 64)):
    drops = low_rank.AdapterDropout(row_key(dropout_key(1, 2), 1000), 0.3, [-7, 99, 1 << 30], places, first)
    wide, factor = half(rows, 260 + 9)[:, :260], half(91, 260 + 5)[:, :260]
    exact = low_rank.down_project.__wrapped__(wide.double(), factor.double().T, drops=drops)
    tail, copy = half(rows, 128), torch.zeros(rows, 260, dtype=torch.float16)
    kept = low_rank_kernels.down_project(wide, factor.T, tail, copy=copy, drops=drops, buffers=buffers)
    close(kept, exact, "dropped")
    assert torch.equal(copy, wide) and torch.equal(tail[:, :91], kept) and not tail[:, 91:].any()

    inner = half(rows, 128)[:, :91]
    exact = low_rank.up_project.__wrapped__(inner.double(), factor.double(), drops)
    close(low_rank_kernels.up_project(inner, factor, drops, buffers), exact, "up_project")

    two = low_rank.AdapterDropout(drops.row, 0.3, [5, -5], of_two.ranks, first)
    x, dy, d_inner, inner = half(rows, 170), half(rows, 170), half(rows, 75), half(rows, 75)
    exact = low_rank.gradients.__wrapped__(*(t.double() for t in (x, d_inner, dy, inner)), of_two, two)
    for a, b in zip(low_rank_gradient_kernels.gradients(x, d_inner, dy, inner, of_two, two), exact, strict=True):
        assert a.shape == b.shape
        close(a, b, "gradient with dropout")
    works = [GradientOperands(x, d_inner, dy, inner, of_two, d, buffers) for d in (two, None)]
    for got, work in zip(low_rank_gradient_kernels.gradients_of(works), works, strict=True):
        for a, b in zip(got, low_rank_gradient_kernels.gradients(*work), strict=True):
            assert torch.equal(a, b)
works = [GradientOperands(half(5000, 32), half(5000, 16), half(5000, 48), half(5000, 16), of_one, None, buffers)] * 2
apart = low_rank_gradient_kernels.gradients_of(works)  # each of so many rows fills a GPU
assert torch.equal(apart[0][1], apart[1][1])
assert apart[0][0].untyped_storage().data_ptr() != apart[1][0].untyped_storage().data_ptr()
assert not buffers.counters(torch.device("cpu")).any()
"""


@needs_triton
def test_every_kernel_equals_its_reference():
    compare(COMPARE)


def test_down_project_fills_the_padding_columns():
    wide, factor, padded = torch.randn(6, 40), torch.randn(40, 3), torch.ones(6, 9)
    copy = torch.zeros(6, 40)
    kept = down_project(wide, factor, padded[:, 5:], copy=copy)
    assert torch.equal(copy, wide)
    assert torch.equal(kept, wide @ factor)
    assert torch.equal(padded[:, 5:8], kept)
    assert padded[:, :5].all()
    assert not padded[:, 8:].any()
    assert down_project(wide, factor, padded[:, 5:], keep=False).data_ptr() == padded[:, 5:].data_ptr()


def test_gradients_equal_autograds():
    torch.manual_seed(0)
    x, dy = torch.randn(30, 50).double(), torch.randn(30, 170).double()
    lora_A = torch.randn(21, 50).double().requires_grad_()
    lora_B = [
        torch.randn(r.stop - r.start, k.stop - k.start).double()
        for r, k in zip(MEMBERS.rows, MEMBERS.ranks, strict=True)
    ]
    lora_B = [B.requires_grad_() for B in lora_B]
    scaled = [s * B for s, B in zip(MEMBERS.scalings, lora_B, strict=True)]
    y = torch.zeros(30, 170).double()
    for rows, ranks, B in zip(MEMBERS.rows, MEMBERS.ranks, scaled, strict=True):
        y = y + torch.nn.functional.pad((x @ lora_A[ranks].T) @ B.T, (rows.start, 170 - rows.stop))
    d_A, *d_B = torch.autograd.grad(y, [lora_A, *lora_B], dy)
    stacked = torch.zeros(170, 21).double()
    for rows, ranks, B in zip(MEMBERS.rows, MEMBERS.ranks, scaled, strict=True):
        stacked[rows, ranks] = B.detach()
    got = gradients(x, dy @ stacked, dy, x @ lora_A.detach().T, MEMBERS)
    for index, (ranks, B) in enumerate(zip(MEMBERS.ranks, d_B, strict=True)):
        torch.testing.assert_close(got[2 * index], d_A[ranks])
        torch.testing.assert_close(got[2 * index + 1], B)
