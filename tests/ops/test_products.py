"""How BLAS is told of a matrix, which kernel is taken, and that products on a CPU are PyTorch's."""

import pytest
import torch

from loratune.ops import products
from loratune.ops.products import ProductKernels, blas_layout

WIDE = torch.arange(12.0 * 20).view(12, 20)


@pytest.mark.parametrize(
    "matrix",
    [WIDE, WIDE[:, :16], WIDE[2:9], WIDE.T, WIDE[:, 4:16].T, WIDE[3:4]],
    ids=["whole", "columns", "rows", "transposed", "columns transposed", "one row"],
)
def test_blas_sees_the_transpose(matrix):
    """What it finds in memory under that description, and transposes if told to, is the matrix transposed."""
    found = blas_layout(matrix)
    in_memory = matrix.as_strided((found.rows, found.columns), (1, found.leading))
    assert torch.equal(in_memory.T if found.transposed else in_memory, matrix.T)


def test_what_is_contiguous_neither_way_is_not_described():
    assert blas_layout(WIDE[:, ::2]) is None
    assert blas_layout(WIDE.new_zeros(1, 5).expand(3, 5)) is None


class Candidate:
    """What cuBLASLt might name: right, with other bits in some places, or unable."""

    def __init__(self, milliseconds, bits=0.0, able=True):
        self.milliseconds, self.bits, self.able = milliseconds, bits, able

    def __call__(self, a, b, out):
        if self.able:
            torch.mm(a, b, out=out)
            out[a.abs().sum(1) > 0] += self.bits
        return self.able


def taken(monkeypatch, *candidates, idle_rows=0):
    """Number of the candidate that is taken beside PyTorch's 1 ms, or None."""
    a = torch.ones(100, 80)
    a[:idle_rows] = 0
    monkeypatch.setattr(products, "_candidates", lambda *_: list(candidates))
    monkeypatch.setattr(products, "_milliseconds", lambda work, _: getattr(work.func, "milliseconds", 1.0))
    found = products._fastest(a, torch.ones(80, 90), torch.full((100, 90), torch.nan))
    return None if found is None else candidates.index(found)


def test_the_fastest_of_the_same_bits_is_taken(monkeypatch):
    assert taken(monkeypatch, Candidate(0.9), Candidate(0.8), Candidate(0.85)) == 1
    assert taken(monkeypatch, Candidate(1.2), Candidate(0.995)) is None
    assert taken(monkeypatch) is None


@pytest.mark.parametrize("idle_rows", [0, 12, 50])
def test_other_bits_must_gain_more(monkeypatch, idle_rows):
    """Also where the row begins with tokens whose gradients are zero, which are the same with any kernel."""
    assert taken(monkeypatch, Candidate(0.97, bits=0.5), idle_rows=idle_rows) is None
    assert taken(monkeypatch, Candidate(0.9, bits=0.5), idle_rows=idle_rows) == 0
    assert taken(monkeypatch, Candidate(0.9, bits=0.5), Candidate(0.98), idle_rows=idle_rows) == 0
    assert taken(monkeypatch, Candidate(0.97, bits=0.5), Candidate(0.98), idle_rows=idle_rows) == 1


def test_what_cannot_is_not_taken(monkeypatch):
    assert taken(monkeypatch, Candidate(0.1, able=False), Candidate(0.9)) == 1
    assert taken(monkeypatch, Candidate(0.1, able=False)) is None


def test_on_a_cpu_it_is_the_usual_product():
    a, b = torch.randn(70, 80), torch.randn(90, 80).T
    out = torch.empty(70, 90)
    products = ProductKernels()
    with products.choosing():
        assert torch.equal(products.mm(a, b), a @ b)
        assert products.mm(a, b, out) is out
    assert torch.equal(out, a @ b)
