"""How BLAS is told of a matrix, and that products elsewhere than in a training step on a GPU are PyTorch's."""

import pytest
import torch

from loratune.ops.products import choosing, mm, stored

WIDE = torch.arange(12.0 * 20).view(12, 20)


@pytest.mark.parametrize(
    "matrix",
    [WIDE, WIDE[:, :16], WIDE[2:9], WIDE.T, WIDE[:, 4:16].T, WIDE[3:4]],
    ids=["whole", "columns", "rows", "transposed", "columns transposed", "one row"],
)
def test_blas_sees_the_transpose(matrix):
    """What it finds in memory under that description, and transposes if told to, is the matrix transposed."""
    found = stored(matrix)
    in_memory = matrix.as_strided((found.rows, found.columns), (1, found.leading))
    assert torch.equal(in_memory.T if found.transposed else in_memory, matrix.T)


def test_what_is_contiguous_neither_way_is_not_described():
    assert stored(WIDE[:, ::2]) is None
    assert stored(WIDE.new_zeros(1, 5).expand(3, 5)) is None


def test_on_a_cpu_it_is_the_usual_product():
    a, b = torch.randn(70, 80), torch.randn(90, 80).T
    out = torch.empty(70, 90)
    with choosing():
        assert torch.equal(mm(a, b), a @ b)
        assert mm(a, b, out) is out
    assert torch.equal(out, a @ b)
