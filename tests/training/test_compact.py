"""AdamW with 8-bit moments: close to PyTorch's AdamW, a quarter of the memory, resumed to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loratune.config import TrainConfig
from loratune.precision.nf4 import dynamic_book
from loratune.training.compact import BLOCK, CompactAdamW, decode, encode, root_book
from loratune.training.optim import optimizer_of

CPU = torch.device("cpu")
SHAPES = [(16, 100), (300, 16), (7,), (2, 3, 5)]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients whose size differs by four decades within a parameter, with noise around a constant."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        size = torch.logspace(-4, 0, p.numel()).view(p.shape)
        p.grad = size * (1 + torch.randn(p.shape, generator=generator))


def trained(optim: str, steps: int, **settings: float) -> list[nn.Parameter]:
    params = parameters()
    optimizer = optimizer_of(params, TrainConfig(optim=optim, learning_rate=1e-2, **settings))
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return params


def test_8_bit_moments_give_nearly_the_same_updates():
    """The error of 8 bits over gradients of four decades.

    The k-th decade below a block's largest value has 64 / 2^k codes of either sign, evenly spaced over 0.9 of it. So
    a moment's error is up to 0.9 / 2 / (64 / 2^k) of its decade's top: 0.7 % in the highest, 11 % four decades below.
    Errors of many steps partly cancel, so the results differ by less than a twentieth of the path.
    """
    start, ours, theirs = (
        torch.cat([p.detach().view(-1) for p in params])
        for params in (parameters(), trained("adamw_8bit", 50), trained("adamw", 50))
    )
    apart = float((ours - theirs).norm() / (theirs - start).norm())
    assert 0 < apart < 0.05  # 0.014; above 1 if small second moments became zero


@pytest.mark.parametrize("book", [dynamic_book(CPU), root_book(CPU)], ids=["first", "root"])
def test_a_value_comes_back_as_the_nearest_of_the_book(book):
    assert book.shape == (256,)
    assert bool((book.diff() > 0).all())
    values = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1], [30], [0]]
    )
    values = values if book[0] < 0 else values.abs()
    packed = encode(values, book)
    assert packed.dtype == torch.uint8
    assert packed.shape == (4, BLOCK + 4)
    unit = values / values.abs().amax(1, keepdim=True).clamp(min=1e-38)
    nearest = (unit[..., None] - book).abs().argmin(-1)
    assert float((packed[:, :BLOCK] == nearest).float().mean()) > 0.999  # halfway points may fall to either side
    assert not decode(packed, book)[3].any()


def test_a_small_second_moment_does_not_become_zero():
    """With v = 0 beside m > 0 an update would be m / epsilon: a jump instead of a step."""
    parameter = nn.Parameter(torch.zeros(BLOCK))
    optimizer = optimizer_of([parameter], TrainConfig(optim="adamw_8bit", learning_rate=1e-3))
    for _ in range(20):
        parameter.grad = torch.full((BLOCK,), 1e-9)
        parameter.grad[0] = 1.0
        optimizer.step()
    assert float(parameter.detach().abs().max()) <= 20 * 1e-3 * 1.01


def test_8_bit_moments_take_a_quarter_of_float32s():
    params = [nn.Parameter(torch.zeros(64, 1024))]
    optimizer = optimizer_of(params, TrainConfig(learning_rate=2e-4, optim="adamw_8bit"))
    give_gradients(params, 0)
    optimizer.step()
    held = sum(t.nbytes for n, t in optimizer.state[params[0]].items() if n != "step")
    assert held == 2 * params[0].numel() * (BLOCK + 4) // BLOCK


def test_a_parameter_without_a_gradient_gets_no_state():
    params = parameters()
    optimizer = optimizer_of(params, TrainConfig(learning_rate=2e-4, optim="adamw_8bit"))
    give_gradients(params[:1], 0)
    optimizer.step()
    assert list(optimizer.state) == params[:1]


def test_a_saved_state_continues_to_the_bit():
    params = parameters()
    config = TrainConfig(optim="adamw_8bit", learning_rate=1e-2)
    optimizer = optimizer_of(params, config)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = optimizer_of(others, config)
    for p, other in zip(params, others, strict=True):
        resumed.state[other] = copy.deepcopy(optimizer.state[p])
    for values, one in ((params, optimizer), (others, resumed)):
        give_gradients(values, 3)
        one.step()
    assert all(torch.equal(p, other) for p, other in zip(params, others, strict=True))


def test_a_step_that_is_skipped_on_the_device_changes_nothing():
    """As in a recorded update: the gradients are NaN, `found_inf` is 1, and every bit stays."""
    params = parameters()
    optimizer = optimizer_of(params, TrainConfig(learning_rate=2e-4, optim="adamw_8bit"))
    give_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params], copy.deepcopy([optimizer.state[p] for p in params])
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(params, before[0], strict=True))
    for p, state in zip(params, before[1], strict=True):
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())


def test_clipping_by_grad_scale_is_dividing_the_gradients():
    results = []
    for scale in (None, 4.0):
        params = parameters()
        optimizer = optimizer_of(params, TrainConfig(learning_rate=2e-4, optim="adamw_8bit"))
        give_gradients(params, 0)
        if scale is None:
            for p in params:
                p.grad /= 4.0
        else:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        optimizer.step()
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_large_parameters_are_taken_one_by_one(monkeypatch):
    """The result does not depend on how parameters are grouped for an update."""
    whole = trained("adamw_8bit", 3)
    monkeypatch.setattr("loratune.training.compact._GROUP", 1000)
    assert all(torch.equal(a, b) for a, b in zip(trained("adamw_8bit", 3), whole, strict=True))
    assert isinstance(optimizer_of(parameters(), TrainConfig(learning_rate=2e-4, optim="adamw_8bit")), CompactAdamW)
