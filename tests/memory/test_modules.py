"""Estimates of models whose layers run as modules: a few layers stand for all, and the answer comes quickly."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma4TextConfig, Qwen3MoeConfig

from loratune.cli import main
from loratune.config import LoraConfig
from loratune.errors import ConfigError
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach, trainable_parameters
from loratune.memory.budget import RowSetting
from loratune.memory.devices import named
from loratune.memory.estimate import EstimateRequest, estimate
from loratune.memory.modules import ModuleRows
from loratune.memory.simulate import simulate, without_data
from loratune.memory.survey import _experts_per_token, _head_dim
from tests.campaigns.estimate_all import answer
from tests.campaigns.realistic_configs import REALISTIC
from tests.conftest import build

GIB = 1 << 30


@pytest.mark.parametrize("name", ["llama", "gptoss", "gemma2"])
@pytest.mark.parametrize("level", [Level.NONE, Level.FULL])
def test_a_few_layers_stand_for_all(name, level):
    """The bytes of twelve layers, from two or three of them."""
    config = build(name).config
    config.num_hidden_layers = 12
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * 12)[:12]
    whole = without_data(config, torch.bfloat16)
    found = ModuleRows(whole, LoraConfig(r=4), on_gpu=False)(256, level)
    attach(whole, LoraConfig(r=4), name="a", seed=0)
    expected = simulate(whole, 256, ActivationPlan.uniform(level, 12), on_gpu=False)
    assert found.saved == pytest.approx(expected.saved, rel=0.01)
    gradients = 4 * sum(p.numel() for p in trainable_parameters(whole).values())
    assert expected.peak <= found.peak * 1.01 + gradients
    assert found.peak <= expected.peak * 1.1


@pytest.mark.parametrize("name", ["DeepSeek-V3", "gpt-oss-20b"])
def test_large_models_are_answered_within_ten_seconds(name):
    """Mixtures of experts whose configuration names a quantisation; a sample of tests.campaigns.estimate_all."""
    found = answer(REALISTIC[name], "--gpu", "24GiB")
    assert found.fault == "", found
    assert json.loads(found.said)["bytes"]["base"] > 20 * GIB


def test_layers_of_different_shapes_count_by_the_largest():
    """transformers refuses to read a field from the whole configuration if layers have values of their own."""
    config = Gemma4TextConfig()
    assert config.is_heterogeneous
    assert {layer.head_dim for layer in config.per_layer_config} == {256, 512}
    assert _head_dim(config, config.hidden_size) == 512
    assert _experts_per_token(config) == 1
    assert _experts_per_token(Qwen3MoeConfig(num_experts_per_tok=6)) == 6


@pytest.mark.parametrize("kind", ["gemma4_text", "dots3_note_text"])
def test_layers_of_different_shapes_are_estimated(kind):
    found = answer({"model_type": kind}, "--gpu", "24GiB")
    assert found.fault == "", found
    assert found.status == 0


def test_a_configuration_that_transformers_refuses_has_one_line_with_the_reason():
    found = answer({"model_type": "gemma4_assistant"}, "--gpu", "24GiB")
    assert found.status == 2
    assert "hidden_size_per_layer_input must be 0, got 256" in found.said
    assert "Traceback" not in found.said


def test_unfused_models_have_a_speed_near_that_of_fused_ones():
    """The same model in float32 runs as modules. Without a card, or if the run does not fit, there is no speed."""
    model = without_data(build("llama").config, torch.bfloat16)
    setting, device = RowSetting(2048), named("H100")
    fused = estimate(model, EstimateRequest("auto", LoraConfig(r=4), setting), device, device.memory_bytes)
    wide = without_data(build("llama").config, torch.float32)
    modules = estimate(wide, EstimateRequest("auto", LoraConfig(r=4), setting), device, device.memory_bytes)
    assert fused.tokens_per_second is not None
    assert modules.tokens_per_second is not None
    assert 0.1 * fused.tokens_per_second < modules.tokens_per_second < fused.tokens_per_second
    for request, other, limit in (("auto", named("24GiB"), 24 * GIB), ("auto", device, 1 << 20)):
        found = estimate(wide, EstimateRequest(request, LoraConfig(r=4), setting), other, limit)
        assert found.tokens_per_second is None


def test_the_optimizer_counts(capsys):
    found = {}
    for optim in ("adamw", "adamw_8bit", "adamw_offload"):
        assert main(["estimate", "loratune/pocket", "--gpu", "24", "--optim", optim, "--json"]) == 0
        found[optim] = json.loads(capsys.readouterr().out)["bytes"]["optimizer"]
    assert found["adamw"] > 3 * found["adamw_8bit"] > found["adamw_offload"] == 0


def test_a_memory_limit_needs_a_gpu(capsys):
    assert main(["estimate", "loratune/pocket", "--gpu", "cpu", "--memory", "8GiB"]) == 2
    assert "name a GPU with --gpu" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="AMD"):
        named("MI300X")
