"""The update of all slots of a bank against PyTorch's own AdamW and clipping, one slot at a time."""

from __future__ import annotations

import math

import pytest
import torch

from loratune.ops.bank.adamw import IDLE, SlotUpdate, bank_adamw

STARTS = [0, 64, 192, 200]


def test_each_slot_takes_the_steps_that_pytorch_takes():
    """Slot 1 is not due in every second step, and none of the others notices."""
    own = [
        {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.8, 0.9)},
        {"lr": 1.0, "eps": 1e-3},
    ]
    max_norms = [0.5, math.inf, 1e-3]
    master = torch.randn(200, dtype=torch.float64)
    alone = [torch.nn.Parameter(master[a:b].clone()) for a, b in zip(STARTS, STARTS[1:], strict=False)]
    optimizers = [torch.optim.AdamW([p], **o) for p, o in zip(alone, own, strict=True)]
    moments, counts = (torch.zeros_like(master), torch.zeros_like(master)), [0, 0, 0]
    for step in range(6):
        gradient, rows = torch.randn(200, dtype=torch.float64), []
        expected = []
        for slot, (parameter, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            if slot == 1 and step % 2:
                rows.append(IDLE)
                expected.append(0.0)
                continue
            counts[slot] += 1
            group = optimizer.param_groups[0]
            beta1, beta2 = group["betas"]
            corrections = 1 - beta1 ** counts[slot], math.sqrt(1 - beta2 ** counts[slot])
            decay = group["weight_decay"]
            rows.append(
                SlotUpdate(1.0, group["lr"], beta1, beta2, group["eps"], decay, max_norms[slot], *corrections)
            )
            parameter.grad = gradient[STARTS[slot] : STARTS[slot + 1]].clone()
            expected.append(float(torch.nn.utils.clip_grad_norm_([parameter], max_norms[slot])))
            optimizer.step()
        kept = gradient.clone()
        table = torch.tensor(rows, dtype=torch.float64)
        norms = bank_adamw(master, gradient, moments, torch.tensor(STARTS), 128, table, torch.zeros(3))
        assert norms.tolist() == pytest.approx(expected, rel=1e-12)
        for slot, parameter in enumerate(alone):
            part = slice(STARTS[slot], STARTS[slot + 1])
            torch.testing.assert_close(master[part], parameter.detach(), rtol=1e-10, atol=1e-12)
            assert torch.equal(gradient[part], torch.zeros_like(kept[part]) if rows[slot].due else kept[part])


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_changes_nothing_but_is_forgotten(where):
    master, gradient = torch.randn(200), torch.randn(200)
    moments, losses = (torch.zeros(200), torch.zeros(200)), torch.zeros(3)
    if where == "gradient":
        gradient[100] = float("inf")
    else:
        losses[1] = float("nan")
    due = SlotUpdate(1.0, 1e-2, 0.9, 0.999, 1e-8, 0.0, 1.0, 0.1, 0.03)
    before = master.clone()
    norms = bank_adamw(master, gradient, moments, torch.tensor(STARTS), 128, torch.tensor([due] * 3), losses)
    assert torch.equal(master[64:192], before[64:192])
    assert not moments[0][64:192].any()
    assert not gradient.any()
    assert not torch.equal(master[:64], before[:64])
    assert norms[0] > 0
