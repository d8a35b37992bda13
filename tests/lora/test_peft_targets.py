"""PEFT loads our files of mixtures and of modules with two paths as the same adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from loratune.config import LoraConfig
from loratune.lora.files import load_adapter, read_config, save
from loratune.lora.inject import attach
from loratune.lora.peft_targets import rewritten_names
from tests.conftest import SMALL
from tests.lora.helpers import make_mlp, run

_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_MORE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("Glm4Moe", {**_ROUTED, "head_dim": 16}),
    "deepseek_v3": ("DeepseekV3", {**_ROUTED, **_LATENT, "n_group": 1, "topk_group": 1}),
    "dots1": ("Dots1", {**_ROUTED, "head_dim": 16, "n_shared_experts": 1}),
    "qwen3_next": (
        "Qwen3Next",
        {**_MORE, "head_dim": 16, "shared_expert_intermediate_size": 32, "layer_types": ["full_attention"] * 2},
    ),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    "afmoe": ("Afmoe", {**_MORE, "num_dense_layers": 1, "head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {**_MORE, "head_dim": 16}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_MORE, "shared_expert_intermediate_size": 32}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "solar_open": ("SolarOpen", {**_ROUTED, "head_dim": 16}),
}

DENSE_MLPS = [
    "glm4_moe",
    "deepseek_v3",
    "dots1",
    "qwen3_next",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "afmoe",
    "solar_open",
]
"""Mixtures with a dense or shared MLP whose layers PEFT reads as experts."""


def mixture(name: str) -> tf.PreTrainedModel:
    """A random mixture of experts, frozen."""
    prefix, settings = MIXTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(tf, f"{prefix}Config")(**SMALL | settings)
        model = getattr(tf, f"{prefix}ForCausalLM")(config)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("name", DENSE_MLPS)
@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"up_proj": 7}}])
def test_peft_computes_the_same_with_our_files_of_a_mixture(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ours, loaded, theirs = mixture(name), mixture(name), mixture(name)
    bare = run(ours)
    attached = attach(ours, LoraConfig(r=1, lora_alpha=2, lora_dropout=0.1, init_lora_weights=False, **settings))
    assert rewritten_names(ours) & {path.rpartition(".")[2] for path in attached.ranks}
    save(ours, tmp_path / "a")
    expected = run(ours)
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert sum("lora_A" in key for key, _ in read.named_parameters()) == len(attached.ranks)
    torch.testing.assert_close(run(read), expected, rtol=1e-5, atol=1e-4)
    assert (expected - bare).abs().max() > 0.1
    assert load_adapter(loaded, tmp_path / "a").ranks == attached.ranks
    torch.testing.assert_close(run(loaded), expected, rtol=0, atol=0)
    config = read_config(tmp_path / "a")
    assert config.lora_dropout == 0.1
    assert config.rank_pattern == settings.get("rank_pattern", {})
    save(loaded, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj", "q_proj"], r".*layers\.0\.mlp\.(gate|down)_proj"])
def test_chosen_layers_of_a_mixture_are_read_by_peft(targets: list[str] | str, tmp_path: Path) -> None:
    ours, theirs = mixture("glm4_moe"), mixture("glm4_moe")
    attached = attach(ours, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    save(ours, tmp_path / "a")
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert sum("lora_A" in key for key, _ in read.named_parameters()) == len(attached.ranks)
    torch.testing.assert_close(run(read), run(ours), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("entry", ["shared", "again"])
def test_a_module_with_two_paths_is_saved_by_the_path_that_peft_knows(entry: str, tmp_path: Path) -> None:
    ours = make_mlp()
    theirs = copy.deepcopy(ours)
    attached = attach(ours, LoraConfig(r=2, target_modules=[entry], init_lora_weights=False))
    assert '"shared" is also "again"; adapted at both here' in str(attached)
    save(ours, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == ["shared"]
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    layer = read.base_model.model.shared
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), ours.shared(x))


def test_two_paths_through_one_parent_need_no_note() -> None:
    model = nn.Module()
    model.decoder = nn.Sequential(nn.Linear(4, 4))
    model.alias = model.decoder
    assert not attach(model, LoraConfig(r=2, target_modules=["decoder.0"])).notes
