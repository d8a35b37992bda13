"""The bound that spares an irreversible merge a second computation of every sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loratune.lora.layer import LoraLayer
from loratune.lora.linear import LoraLinear


def adapted(weight: float, update: float, dtype: torch.dtype) -> LoraLayer:
    """A layer of one weight value whose update, scaling B A, has the value `update` everywhere."""
    base = nn.Linear(6, 4, bias=False)
    nn.init.constant_(base.weight, weight)
    layer = LoraLinear.from_base(base.to(dtype))
    A, B = torch.full((2, 6), 1.0), torch.full((4, 2), update / 4)
    layer.hold(nn.Parameter(A), nn.Parameter(B), 2.0, 0.0)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("weight", [0.0, 0.1, -0.1, 0.6, -0.6, 0.99])
@pytest.mark.parametrize("update", [0.0, 0.1, -0.1, 0.6, -0.6])
def test_a_bounded_sum_is_finite(dtype: torch.dtype, weight: float, update: float) -> None:
    """Values are shares of the largest number of the dtype."""
    largest = min(torch.finfo(dtype).max, 1e38)
    layer = adapted(weight * largest, update * largest, dtype)
    finite = bool(layer.merged_weight().isfinite().all())
    assert finite or not layer.sum_is_bounded()
    if abs(weight) + abs(update) < 0.1:
        assert layer.sum_is_bounded()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_number_anywhere_leaves_the_sum_unbounded(value: float) -> None:
    for name in ("weight", "lora_A", "lora_B"):
        layer = adapted(0.5, 0.5, torch.float32)
        assert layer.sum_is_bounded()
        with torch.no_grad():
            layer.get_parameter(name)[1, 1] = value
        assert not layer.sum_is_bounded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_leaves_the_bits_that_were_announced(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LoraLinear.from_base(nn.Linear(96, 64).to(dtype))
    layer.hold(nn.Parameter(torch.randn(8, 96)), nn.Parameter(torch.randn(64, 8)), 0.5, 0.0)
    announced = layer.merged_weight()
    assert torch.equal(layer.merge(), announced)
    assert layer.weight.dtype == dtype
