"""Adam ignores the scale of a gradient, so LoRA's alpha, initial values and rate are fewer than three settings.

Adam's step is the rate times a ratio of gradient moments. Let the update be (alpha / r) B A. Then alpha / c², A
started at c A, and rate c give the same update after every step (B starts at 0). A and B are c times as large, and so
are their steps. Their gradients are 1 / c as large, and the ratio cancels that. If c is a power of two, every product
only changes its exponent, so the equality holds to the bit in float32. The exception is Adam's epsilon in the
ratio's denominator, which is set far below any gradient here.
Source: Schulman et al. 2025, "LoRA Without Regret".
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratune.base.forward import prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.data.examples import Example
from loratune.data.pack import make_row
from loratune.lora.inject import attach, trainable_parameters
from loratune.lora.state import require
from loratune.training.optim import adamw
from loratune.training.step import train_step
from tests.conftest import build

STEPS = 12


def _train(
    alpha: float, rate: float, scale_A: float = 1.0, epsilon: float = 1e-30, clip: float = 0.0
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps, and the update alpha / r · B A of each layer at the end."""
    model = build("llama")
    attach(model, LoraConfig(r=4, lora_alpha=alpha), seed=1)
    parameters = trainable_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("lora_A"):
                parameter.mul_(scale_A)
    optimizer = adamw(parameters.values(), TrainConfig(learning_rate=rate, adam_epsilon=epsilon))
    forward = prepare(model)
    generator = torch.Generator().manual_seed(0)
    losses = []
    with forward.installed():
        for _ in range(STEPS):
            ids = torch.randint(3, 300, (24,), generator=generator).int().numpy()
            row = make_row([Example(ids, torch.ones(24).numpy(), "random")], 24, 0)
            losses.append(train_step(forward, [row], list(parameters.values()), optimizer, max_grad_norm=clip).loss)
    layers = require(model).get("default").layers
    return losses, {path: w.scaling * (w.lora_B.detach() @ w.lora_A.detach()) for path, w in layers.items()}


def _same(a: tuple[list[float], dict[str, Tensor]], b: tuple[list[float], dict[str, Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(delta, b[1][path]) for path, delta in a[1].items())


@pytest.mark.parametrize("c", [2.0, 0.25, 16.0])
def test_alpha_initial_values_and_rate_trade_off_exactly(c: float) -> None:
    plain = _train(alpha=8.0, rate=2e-3)
    assert plain[0][-1] != plain[0][0]
    assert all(float(delta.abs().max()) > 0 for delta in plain[1].values())
    assert _same(plain, _train(alpha=8.0 / c**2, rate=2e-3 * c, scale_A=c))


def test_no_two_of_the_three_are_enough() -> None:
    """The rate alone does not compensate alpha: the initial A counts too."""
    plain = _train(alpha=8.0, rate=2e-3)
    assert not _same(plain, _train(alpha=2.0, rate=4e-3))
    assert not _same(plain, _train(alpha=8.0, rate=4e-3, scale_A=2.0))


def test_clipping_sees_the_scale_and_breaks_it() -> None:
    """The global norm of the gradients is 1 / c as large, so the same limit clips differently."""
    plain = _train(alpha=8.0, rate=2e-3, clip=0.1)
    assert not _same(plain, _train(alpha=2.0, rate=4e-3, scale_A=2.0, clip=0.1))
