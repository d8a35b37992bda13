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
low, added, bias = random(S, R, seed=4), random(E, N, R, seed=5).transpose(1, 2), random(E, N, seed=6)
for dtype, transposed, gather, more in (
    (torch.float16, True, True, ()),
    (torch.float16, True, True, (low, added, bias)),
    (torch.float16, False, False, (low, added)),
    (torch.float16, False, True, (None, None, bias)),
    (torch.float32, True, False, (low, added, bias)),
):
    w = random(E, N, K, dtype=dtype).transpose(1, 2) if transposed else random(E, K, N, dtype=dtype)
    x, rows = random(T if gather else S, K, seed=3, dtype=dtype), routing.tokens if gather else None
    more = [None if t is None else t.to(dtype) for t in more]
    same(twins.grouped_product(x, w, routing.ends, rows, *more), product(x, w, routing.ends, rows, *more), dtype)
"""
    )


@needs_triton
def test_grouped_outer_products_and_the_sum_over_choices() -> None:
    compare(
        _INPUTS
        + """
outer, combine = reference.grouped_outer.__wrapped__, reference.combine.__wrapped__
for dtype, gather, last in (
    (torch.float16, True, False), (torch.float16, False, True), (torch.float32, True, True),
):
    x, low = random(T if gather else S, K, seed=3, dtype=dtype), random(S, R, seed=4, dtype=dtype)
    rows = routing.tokens if gather else None
    same(twins.grouped_outer(low, x, routing.ends, rows, last, 0.7),
         outer(low, x, routing.ends, rows, last, 0.7), dtype)
rows, weights, places = random(S, K), torch.rand(T, 2), routing.places.view(T, 2)
for given in (weights, weights.half(), None):
    same(twins.combine(rows, places, given), combine(rows, places, given), torch.float16)
"""
    )
