"""The shape of the schedule, and the joint update compared with PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch

from loratune.config import TrainConfig
from loratune.training.optim import JointAdamW, adamw, learning_rate, never_updated

TOTAL = 200


def rates(**settings):
    config = TrainConfig(learning_rate=1e-3, **settings)
    return [learning_rate(step, TOTAL, config) for step in range(TOTAL)]


def test_warm_up_rises_in_equal_steps_from_above_zero():
    values = rates(warmup_ratio=0.1, lr_scheduler_type="constant")
    assert values[0] == pytest.approx(1e-3 / 20)
    assert values[19] == pytest.approx(1e-3)
    steps = [b - a for a, b in zip(values[:19], values[1:20], strict=True)]
    assert steps == pytest.approx([1e-3 / 20] * 19)
    assert set(values[20:]) == {1e-3}


def test_cosine_and_linear_meet_halfway_and_end_near_zero():
    cosine = rates(warmup_ratio=0.0, lr_scheduler_type="cosine")
    linear = rates(warmup_ratio=0.0, lr_scheduler_type="linear")
    assert cosine[0] == linear[0] == 1e-3
    assert cosine[TOTAL // 2] == pytest.approx(linear[TOTAL // 2]) == pytest.approx(0.5e-3)
    assert cosine[TOTAL // 4] == pytest.approx(1e-3 * (1 + math.cos(math.pi / 4)) / 2)
    assert 0 < linear[-1] == pytest.approx(1e-3 / TOTAL)
    assert sorted(cosine, reverse=True) == cosine


def test_a_run_of_one_step_trains_at_the_full_rate():
    assert learning_rate(0, 1, TrainConfig(learning_rate=1e-3, warmup_ratio=0.03)) == 1e-3


def test_the_joint_update_leaves_the_state_of_pytorch():
    """Equal values up to float32 rounding, equal names and shapes: each can resume the other's checkpoint."""
    start = [torch.randn(shape) for shape in ((8, 30), (30, 8), (5,))]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    settings = TrainConfig(learning_rate=1e-2, weight_decay=0.1)
    plain = adamw(theirs, settings)
    kept = {name: plain.defaults[name] for name in ("lr", "betas", "eps", "weight_decay", "fused")}
    joint = JointAdamW(ours, **kept)
    for _ in range(20):
        for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third gets no gradient
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        joint.step()
        plain.step()
    mine, other = joint.state_dict(), plain.state_dict()
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys() == {0, 1}
    for index, state in other["state"].items():
        assert mine["state"][index].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(mine["state"][index][name], value, rtol=1e-5, atol=1e-7)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [never_updated(joint, parameter) for parameter in ours] == [False, False, True]
    pieces = {joint.state[p][m].untyped_storage().data_ptr() for p in ours[:2] for m in ("exp_avg", "exp_avg_sq")}
    assert len(pieces) == 1  # many small tensors would keep the allocator from returning pages to a recording
