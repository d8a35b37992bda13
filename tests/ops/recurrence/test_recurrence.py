"""Recurrences over packed rows equal a loop over tokens, in float64, with their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d

from loratune.ops.recurrence.convolution import causal_convolution
from loratune.ops.recurrence.decayed import decayed_attention
from loratune.ops.recurrence.delta import gated_delta_rule, unit_lower_inverse
from loratune.ops.recurrence.selective import selective_scan

Operator = Callable[..., Tensor]

ROWS = [(1,), (5, 1, 2), (64, 64), (63, 2, 65), (200, 3, 1, 77), (1,) * 70]
"""Document lengths: shorter and longer than a chunk, starts at, before and behind its edges."""


def positions_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decayed_by_token(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, gain: Tensor, positions: Tensor) -> Tensor:
    share = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(share, 2) for x in (q, k))
    out, state = [], torch.zeros(1)
    for t, position in enumerate(positions.tolist()):
        update = gain[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        state = update if position == 0 else log_decay[:, t, :, None, None].exp() * state + update
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


def delta_by_token(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, positions: Tensor) -> Tensor:
    share = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(share, 2) for x in (q, k))
    decay = log_decay.exp() if log_decay.dim() == 4 else log_decay.exp()[..., None]
    out, state = [], v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    for t, position in enumerate(positions.tolist()):
        state = torch.zeros_like(state) if position == 0 else decay[:, t, :, :, None] * state
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - read))[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(out, 1)


def selective_by_token(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor) -> Tensor:
    out, state = [], x.new_zeros(x.shape[0], *A.shape)
    for t, position in enumerate(positions.tolist()):
        state = state * (position > 0) * (dt[:, t, :, None] * A).exp()
        state = state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        out.append((state * C[:, t, None]).sum(-1))
    return torch.stack(out, 1)


def convolved_alone(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    K, channels = weight.shape[1], weight.shape[0]
    parts = [
        conv1d(x[..., a:b], weight[:, None], bias, padding=K - 1, groups=channels)[..., : b - a]
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(parts, -1)


def decayed_case(T: int, strength: float) -> tuple[Tensor, ...]:
    q, k = (normal(2, T, 2, 3, seed=s) for s in (0, 1))
    return q, k, normal(2, T, 4, 5, seed=2), -strength * normal(2, T, 4, seed=3).abs(), normal(2, T, 4, seed=4)


def delta_case(T: int, strength: float, channels: bool = False) -> tuple[Tensor, ...]:
    q, k = (torch.nn.functional.normalize(normal(2, T, 2, 3, seed=s), dim=-1) for s in (0, 1))
    decay = -strength * (normal(2, T, 4, 3, seed=3) if channels else normal(2, T, 4, seed=3)).abs()
    return q, k, normal(2, T, 4, 5, seed=2), decay, normal(2, T, 4, seed=4).sigmoid()


def selective_case(T: int, strength: float) -> tuple[Tensor, ...]:
    dt = strength * normal(2, T, 4, seed=1).abs()
    return normal(2, T, 4, seed=0), dt, -normal(4, 3, seed=2).abs(), normal(2, T, 3, seed=3), normal(2, T, 3, seed=4)


def convolution_case(T: int, strength: float) -> tuple[Tensor, ...]:
    return normal(2, 3, T, seed=0), strength * normal(3, 4, seed=1), normal(3, seed=2)


CASES: dict[str, tuple[Operator, Operator, Callable[[int, float], tuple[Tensor, ...]]]] = {
    "convolution": (causal_convolution, convolved_alone, convolution_case),
    "decayed": (decayed_attention, decayed_by_token, decayed_case),
    "delta": (gated_delta_rule, delta_by_token, delta_case),
    "delta per channel": (gated_delta_rule, delta_by_token, lambda T, s: delta_case(T, s, channels=True)),
    "selective": (selective_scan, selective_by_token, selective_case),
}


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_packed_documents_equal_a_loop_over_tokens_with_gradients(name: str, lengths: tuple[int, ...]) -> None:
    operator, reference, case = CASES[name]
    check(operator, reference, case(sum(lengths), 0.1), positions_of(lengths))


@pytest.mark.parametrize("name", [name for name in CASES if name != "convolution"])
def test_strong_and_vanishing_decays_keep_their_digits(name: str) -> None:
    """Running sums of logarithms reach thousands. A decay of nearly 1 behind them must not lose its digits."""
    operator, reference, case = CASES[name]
    arguments = case(150, 60.0)
    decay = arguments[3] if "selective" not in name else arguments[1]
    decay[:, 75:] *= 1e-5
    check(operator, reference, arguments, positions_of((140, 10)))
    out = operator(*(x.float() for x in arguments), positions_of((140, 10)))
    torch.testing.assert_close(out.double(), reference(*arguments, positions_of((140, 10))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["decayed", "delta", "delta per channel"])
def test_rows_longer_than_a_segment_carry_the_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, reference, case = CASES[name]
    module = operator.__module__
    monkeypatch.setattr(f"{module}._SEGMENT", 128)
    if "delta" in name:
        monkeypatch.setattr(f"{module}._CHANNEL_SEGMENT", 128)
    check(operator, reference, case(300, 0.02), positions_of((290, 10)))


def test_inverse_of_triangular_matrices_with_repeated_keys() -> None:
    """Equal keys make the matrix all ones, whose powers are binomials: a power series would lose all digits."""
    strict = torch.ones(64, 64).tril(-1)
    inverse = unit_lower_inverse(strict)
    expected = torch.eye(64) - torch.diag(torch.ones(63), -1)
    torch.testing.assert_close(inverse, expected, rtol=0, atol=1e-6)


def check(operator: Operator, reference: Operator, arguments: tuple[Tensor, ...], positions: Tensor) -> None:
    """Equal outputs and equal gradients of every argument, in float64."""
    results = []
    for function in (operator, reference):
        leaves = [x.clone().requires_grad_() for x in arguments]
        out = function(*leaves, positions)
        weights = normal(*out.shape, seed=9)
        gradients = torch.autograd.grad(out, leaves, weights, allow_unused=True, materialize_grads=True)
        results.append((out.detach(), *gradients))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_gain_of_none_is_one() -> None:
    q, k, v, decay, gain = decayed_case(70, 0.1)
    positions = positions_of((70,))
    got = decayed_attention(q, k, v, decay, None, positions)
    torch.testing.assert_close(got, decayed_attention(q, k, v, decay, torch.ones_like(gain), positions))


def test_queries_and_keys_are_normalised_with_epsilon() -> None:
    q, k, v, decay, beta = delta_case(70, 0.1)
    positions = positions_of((30, 40))

    def normalised(q: Tensor, k: Tensor, *others: Tensor) -> Tensor:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 0.01).sqrt() for x in (q, k))
        return delta_by_token(q, k, *others)

    check(lambda *a: gated_delta_rule(*a, epsilon=0.01), normalised, (3 * q, 5 * k, v, decay, beta), positions)
