"""A mixture of experts equals a loop over tokens in float64, in values and in every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from loratune.ops.experts import (
    ExpertPair,
    combine,
    grouped_outer,
    grouped_product,
    mixture,
    route,
    torch_product_fits,
)
from loratune.ops.gates import AnyGate, ExpertGate, GateFormula

E, T, K, H, M, R = 5, 13, 2, 6, 7, 3
SCALINGS = 0.7, 1.3


@dataclass(frozen=True)
class Weights:
    """Dense weights of one projection."""

    weight: Tensor
    bias: Tensor | None
    experts: int = E

    def dense(self) -> Tensor:
        return self.weight


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _gated(rows: Tensor) -> Tensor:
    return silu(rows[:, :M]) * rows[:, M:]


def _case(bias: bool) -> tuple[Tensor, Weights, Weights, list[Tensor]]:
    """Routing in which one expert has no token and one choice is no expert; weights; x, factors, A1, B1, A2, B2."""
    index = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    index[index == 3] = 1
    index[0, 0] = E
    up = Weights(_random(E, H, 2 * M, seed=1), _random(E, 2 * M, seed=2) if bias else None)
    down = Weights(_random(E, M, H, seed=3), _random(E, H, seed=4) if bias else None)
    shapes = ((T, H), (T, K), (E * R, H), (2 * M, R * E), (E * R, M), (H, R * E))
    leaves = [_random(*shape, seed=5 + i).requires_grad_() for i, shape in enumerate(shapes)]
    return index, up, down, leaves


def _by_token(index: Tensor, up: Weights, down: Weights, leaves: list[Tensor]) -> Tensor:
    """The definition, with every expert's update added to its weight as PEFT's layout says."""
    x, factors, *masters = leaves
    full = []
    for weights, (A, B), scaling in zip((up, down), (masters[:2], masters[2:]), SCALINGS, strict=True):
        delta = torch.einsum("ore,eri->eio", B.view(len(B), R, E), A.view(E, R, -1))
        full.append(weights.weight + scaling * delta)
    rows = []
    for t in range(T):
        total = torch.zeros(H, dtype=torch.float64)
        for j, e in enumerate(index[t].tolist()):
            if e < E:
                hidden = x[t] @ full[0][e] + (0 if up.bias is None else up.bias[e])
                out = _gated(hidden[None])[0] @ full[1][e] + (0 if down.bias is None else down.bias[e])
                total = total + factors[t, j] * out
        rows.append(total)
    return torch.stack(rows)


GATES = AnyGate(_gated), GateFormula("silu")


def _ours(index: Tensor, up: Weights, down: Weights, leaves: list[Tensor], gate: ExpertGate = GATES[1]) -> Tensor:
    x, factors, A1, B1, A2, B2 = leaves
    pairs = ExpertPair(A1, B1, SCALINGS[0]), ExpertPair(A2, B2, SCALINGS[1])
    return mixture(x, index, factors, up, down, gate, pairs)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_a_loop_over_tokens(bias: bool, gate: ExpertGate) -> None:
    index, up, down, leaves = _case(bias)
    expected, got = _by_token(index, up, down, leaves), _ours(index, up, down, leaves, gate)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)
    d_out = _random(T, H, seed=20)
    pairs = zip(torch.autograd.grad(got, leaves, d_out), torch.autograd.grad(expected, leaves, d_out), strict=True)
    for ours, theirs in pairs:
        assert theirs.norm() > 1
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("which", [(True, False), (False, True), (False, False)])
def test_a_projection_without_an_adapter_is_the_frozen_one(which: tuple[bool, bool]) -> None:
    index, up, down, leaves = _case(True)
    x, factors, *masters = leaves
    pairs = [ExpertPair(*masters[2 * i : 2 * i + 2], SCALINGS[i]) if which[i] else None for i in range(2)]
    got = mixture(x, index, factors, up, down, GATES[0], (pairs[0], pairs[1]))
    kept = [m if which[i // 2] else torch.zeros_like(m) for i, m in enumerate(masters)]
    expected = _by_token(index, up, down, [x, factors, *kept])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)
    inputs = [x, factors, *[m for i, m in enumerate(masters) if which[i // 2]]]
    d_out = _random(T, H, seed=20)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, d_out), torch.autograd.grad(expected, inputs, d_out), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)


def test_a_second_derivative_is_refused() -> None:
    index, up, down, leaves = _case(False)
    (dx,) = torch.autograd.grad(_ours(index, up, down, leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_route_sorts_pairs_and_keeps_their_order() -> None:
    index = torch.tensor([[2, 0], [0, 1], [2, 0]])
    routing = route(index, 4)
    assert routing.order.tolist() == [1, 2, 5, 3, 0, 4]
    assert routing.tokens.tolist() == [0, 1, 2, 1, 0, 2]
    assert routing.experts.tolist() == [0, 0, 0, 1, 2, 2]
    assert routing.ends.tolist() == [3, 4, 6, 6]
    assert routing.order[routing.places].tolist() == list(range(6))


@pytest.mark.parametrize("call", [grouped_product, grouped_outer, combine], ids=lambda call: call.__name__)
def test_tensors_without_data_have_the_shapes_of_the_results(call: Callable[..., Tensor]) -> None:
    def arguments(device: str) -> tuple[Tensor, ...]:
        x, ends = torch.ones(6, 4, device=device), torch.tensor([2, 6], dtype=torch.int32, device=device)
        if call is grouped_product:
            return x, torch.ones(2, 4, 3, device=device), ends
        if call is grouped_outer:
            return torch.ones(6, 2, device=device), x, ends
        return x, torch.zeros(3, 2, dtype=torch.int64, device=device), torch.ones(3, 2, device=device)

    assert call(*arguments("meta")).shape == call(*arguments("cpu")).shape


def test_pytorchs_grouped_product_is_used_where_it_fits() -> None:
    def fits(
        count: int, width: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta", begin: int = 0
    ) -> bool:
        x = torch.empty(count, 64 + begin, dtype=dtype, device=device)[:, begin:]
        return torch_product_fits(x, torch.empty(4, 64, width, dtype=dtype, device=device), count)

    assert fits(256, 96)
    assert not fits(255, 96)  # few rows of each expert
    assert not fits(256, 97)  # rows of the weight are not aligned
    assert not fits(256, 96, begin=1)  # nor those of x
    assert not fits(256, 96, dtype=torch.float16)
    assert not fits(256, 96, device="cpu")
