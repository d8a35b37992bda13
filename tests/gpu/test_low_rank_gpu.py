"""On a CUDA device, the products with a thin operand: the same bits in every run, and right in every place.

What is read or overwritten too early shows in few places and not in every run; a norm over all would not show it.
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
    # Rounding to bfloat16 is 2^-9 of a number, and sums in float32 are nearer than 1e-3; a step of the loop that went
    # wrong would be 128 of `width` terms of a number of size 1, a tenth.
    assert ((first.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-3).all()
    for _ in range(RUNS):
        again = low_rank.down_project(x, factor, copy=copy)
        assert torch.equal(again, first)
        assert copy is None or torch.equal(copy, x)
