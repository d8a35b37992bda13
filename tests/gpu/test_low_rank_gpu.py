"""Low-rank products on a CUDA device: the same bits in every run, and right in every place.

A race shows in few places and not in every run, so the comparison is element by element and repeated.
"""

from __future__ import annotations

import pytest
import torch

from loratune.ops import low_rank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RUNS = 20


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("tokens", [512, 2048, 8192])
@pytest.mark.parametrize(("width", "ranks"), [(2048, 16), (4096, 48), (11008, 16), (4096, 80)])
def test_the_same_bits_in_every_run(tokens, width, ranks, copied):
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    factor = torch.randn(ranks, width, device="cuda", dtype=torch.bfloat16).T * width**-0.5
    copy = torch.empty_like(x) if copied else None
    exact = x.double() @ factor.double()
    first = low_rank.down_project(x, factor, copy=copy)
    # Rounding to bfloat16 changes a number by 2^-9, and sums in float32 by less than 1e-3. A wrong step of the loop
    # would change 128 of `width` terms of a number of size 1, which is a tenth.
    assert ((first.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-3).all()
    for _ in range(RUNS):
        again = low_rank.down_project(x, factor, copy=copy)
        assert torch.equal(again, first)
        assert copy is None or torch.equal(copy, x)
