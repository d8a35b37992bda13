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
low, added = random(S, R, seed=4), random(E, N, R, seed=5).transpose(1, 2)
for dtype, transposed, gather, more in (
    (torch.float16, True, True, ()),
    (torch.float16, True, True, (low, added)),
    (torch.float16, False, False, (low, added)),
    (torch.float32, True, False, (low, added)),
):
    w = random(E, N, K, dtype=dtype).transpose(1, 2) if transposed else random(E, K, N, dtype=dtype)
    x, rows = random(T if gather else S, K, seed=3, dtype=dtype), routing.tokens if gather else None
    more = [t.to(dtype) for t in more]
    same(twins.grouped_product(x, w, routing.ends, rows, *more), product(x, w, routing.ends, rows, *more), dtype)
"""
    )


@needs_triton
def test_outer_products_the_sum_over_choices_and_the_stable_sort() -> None:
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
bias, index = random(E, K, seed=6), routing.experts[places]
for given in ((weights,), (weights.half(), bias, index), (None,)):
    same(twins.combine(rows, places, *given), combine(rows, places, *given), torch.float16)
from dataclasses import astuple
for experts, tokens, choices in ((3, 1100, 2), (7, 1, 3)):
    index = torch.randint(experts - 1, (tokens, choices), generator=torch.Generator().manual_seed(tokens))
    pairs = zip(astuple(twins.route(index, experts)), astuple(reference.route.__wrapped__(index, experts)))
    for got, expected in pairs:
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
"""
    )


@needs_triton
def test_gated_rows() -> None:
    compare(
        _INPUTS
        + """
from loratune.ops import gates, gates_kernels
forward, backward = gates.gated_rows.__wrapped__, gates.gated_rows_backward.__wrapped__
rows = 9
hidden, which = 4 * random(rows, 2 * N, seed=7), torch.arange(rows) % E
bias, d, factors = random(E, 2 * N, seed=8), random(rows, N, seed=9), torch.rand(rows)
for formula, given, needed in (
    (gates.GateFormula("silu"), None, True),
    (gates.GateFormula("gelu_tanh", limit=1.5), bias, False),
    (gates.GateFormula("silu", interleaved=True, alpha=1.702, limit=1.0, shift=1.0), bias, True),
):
    arguments = hidden, formula, given, which
    same(gates_kernels.gated_rows(*arguments), forward(*arguments), torch.float16)
    active = [torch.empty_like(d) if needed else None for _ in range(2)]
    got = gates_kernels.gated_rows_backward(*arguments, d, factors, active[0])
    expected = backward(*arguments, d, factors, active[1])
    same(got[0], expected[0], torch.float16)
    torch.testing.assert_close(got[1], expected[1], rtol=4e-3, atol=1e-2)
    if needed:
        same(*active, torch.float16)
broken = hidden.clone()
broken[3] = float("nan")
out = gates_kernels.gated_rows(broken, formula, bias, which)
assert out[3].isnan().all() and not out[4].isnan().any()
"""
    )
