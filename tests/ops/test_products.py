"""Matrix layouts for BLAS, the choice of a kernel, and PyTorch's products on a CPU."""

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
    """BLAS reads the described memory in column-major order, and transposes it if asked: the matrix transposed."""
    found = blas_layout(matrix)
    in_memory = matrix.as_strided((found.rows, found.columns), (1, found.leading))
    assert torch.equal(in_memory.T if found.transposed else in_memory, matrix.T)


def test_a_matrix_without_contiguous_rows_or_columns_has_no_layout():
    assert blas_layout(WIDE[:, ::2]) is None
    assert blas_layout(WIDE.new_zeros(1, 5).expand(3, 5)) is None


class Candidate:
    """A possible kernel of cuBLASLt: correct, different in some bits, or unable to run."""

    def __init__(self, milliseconds, bits=0.0, able=True):
        self.milliseconds, self.bits, self.able = milliseconds, bits, able

    def __call__(self, a, b, out):
        if self.able:
            torch.mm(a, b, out=out)
            out[a.abs().sum(1) > 0] += self.bits
        return self.able


def chosen(monkeypatch, *candidates, idle_rows=0):
    """Number of the chosen candidate, where PyTorch's kernel takes 1 ms, or None."""
    a = torch.ones(100, 80)
    a[:idle_rows] = 0
    monkeypatch.setattr(products, "_candidates", lambda *_: list(candidates))
    monkeypatch.setattr(products, "_milliseconds", lambda work, _: getattr(work.func, "milliseconds", 1.0))
    found = products._fastest(a, torch.ones(80, 90), torch.full((100, 90), torch.nan))
    return None if found is None else candidates.index(found)


def test_the_fastest_kernel_of_the_same_bits_is_chosen(monkeypatch):
    assert chosen(monkeypatch, Candidate(0.9), Candidate(0.8), Candidate(0.85)) == 1
    assert chosen(monkeypatch, Candidate(1.2), Candidate(0.995)) is None
    assert chosen(monkeypatch) is None


@pytest.mark.parametrize("idle_rows", [0, 12, 50])
def test_other_bits_must_gain_more(monkeypatch, idle_rows):
    """Also if the first rows are zero, whose products have the same bits with every kernel."""
    assert chosen(monkeypatch, Candidate(0.97, bits=0.5), idle_rows=idle_rows) is None
    assert chosen(monkeypatch, Candidate(0.9, bits=0.5), idle_rows=idle_rows) == 0
    assert chosen(monkeypatch, Candidate(0.9, bits=0.5), Candidate(0.98), idle_rows=idle_rows) == 0
    assert chosen(monkeypatch, Candidate(0.97, bits=0.5), Candidate(0.98), idle_rows=idle_rows) == 1


def test_a_kernel_that_cannot_run_is_not_chosen(monkeypatch):
    assert chosen(monkeypatch, Candidate(0.1, able=False), Candidate(0.9)) == 1
    assert chosen(monkeypatch, Candidate(0.1, able=False)) is None


def test_on_a_cpu_products_are_pytorchs():
    a, b = torch.randn(70, 80), torch.randn(90, 80).T
    out = torch.empty(70, 90)
    products = ProductKernels()
    with products.choosing():
        assert torch.equal(products.mm(a, b), a @ b)
        assert products.mm(a, b, out) is out
    assert torch.equal(out, a @ b)
