"""The Triton twins of the grouped products equal their references."""

from __future__ import annotations

from tests.ops.twins import compare, needs_triton

_INPUTS = """
import torch
from loratune.ops import experts as reference, experts_kernels as twins
def random(*shape, seed=0, dtype=torch.float16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3).to(dtype)
E, S, T, K, N, R = 5, 150, 75, 72, 40, 3
routing = reference.route(torch.randint(4, (T, 2), generator=torch.Generator().manual_seed(1)), E)
def same(got, expected, dtype):
    most = 4e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(got.double(), expected.double(), rtol=most, atol=most)
"""


@needs_triton
def test_grouped_products() -> None:
    compare(
        _INPUTS
        + """
product = reference.grouped_product.__wrapped__
for dtype in (torch.float16, torch.float32):
    for transposed in (False, True):
        w = random(E, N, K, dtype=dtype).transpose(1, 2) if transposed else random(E, K, N, dtype=dtype)
        for gather in (False, True):
            x = random(T if gather else S, K, seed=3, dtype=dtype)
            rows = routing.tokens if gather else None
            low, added = random(S, R, seed=4, dtype=dtype), random(E, N, R, seed=5, dtype=dtype).transpose(1, 2)
            bias = random(E, N, seed=6, dtype=dtype)
            for more in ((), (low, added), (low, added, bias), (None, None, bias)):
                same(twins.grouped_product(x, w, routing.ends, rows, *more),
                     product(x, w, routing.ends, rows, *more), dtype)
"""
    )


@needs_triton
def test_grouped_outer_products_and_the_sum_over_choices() -> None:
    compare(
        _INPUTS
        + """
outer, combine = reference.grouped_outer.__wrapped__, reference.combine.__wrapped__
for dtype in (torch.float16, torch.float32):
    for gather in (False, True):
        x, low = random(T if gather else S, K, seed=3, dtype=dtype), random(S, R, seed=4, dtype=dtype)
        rows = routing.tokens if gather else None
        for last in (False, True):
            same(twins.grouped_outer(low, x, routing.ends, rows, last, 0.7),
                 outer(low, x, routing.ends, rows, last, 0.7), dtype)
    rows, weights = random(S, K, dtype=dtype), torch.rand(T, 2)
    places = routing.places.view(T, 2)
    for given in (weights, weights.to(dtype), None):
        same(twins.combine(rows, places, given), combine(rows, places, given), dtype)
"""
    )
