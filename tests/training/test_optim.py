"""The schedule's shape, from its definition."""

from __future__ import annotations

import math

import pytest

from loratune.config import TrainConfig
from loratune.training.optim import learning_rate

TOTAL = 200


def rates(**settings):
    config = TrainConfig(learning_rate=1e-3, **settings)
    return [learning_rate(step, TOTAL, config) for step in range(TOTAL)]


def test_warm_up_rises_in_equal_steps_and_wastes_none():
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
