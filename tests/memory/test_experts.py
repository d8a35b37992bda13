"""Memory of mixtures of experts is counted on the code that a GPU runs, with and without adapters of experts."""

from __future__ import annotations

import pytest
import torch

from loratune.config import LoraConfig
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.memory.simulate import simulate
from tests.lora.test_peft_targets import mixture


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_through_experts_saves_what_their_backward_needs(dtype: torch.dtype) -> None:
    saved = {}
    for experts in (None, "all-experts"):
        for tokens in (256, 512):
            model = mixture("qwen3_moe").to(dtype)
            before = model.get_experts_implementation()
            attach(model, LoraConfig(r=8, target_parameters=experts))
            plan = ActivationPlan.uniform(Level.NONE, 2)
            saved[experts, tokens] = simulate(model.to("meta"), tokens, plan, on_gpu=True).saved
            assert model.get_experts_implementation() == before
    pairs, layers = 256 * 2, 2
    low = pairs * layers * 2 * 8 * dtype.itemsize  # x Aᵀ of both projections, for each pair of token and expert
    more = [saved["all-experts", tokens] - saved[None, tokens] for tokens in (256, 512)]
    assert more[1] - more[0] == pytest.approx(low, rel=0.05)
