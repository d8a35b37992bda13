"""A portable adapter means the same to a reader that only multiplies lora_alpha / r with B A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import loratune as lt
from loratune.errors import AdapterError
from loratune.lora.inject import trainable_parameters
from tests.lora.helpers import fill, make, run

_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"q_proj": 32},
        "modules_to_save": ["model.norm"],
    },
    "gpt2": {"target_modules": ["c_attn", "wpe"], "alpha_pattern": {"wpe": 3}, "rank_pattern": {"c_attn": 7}},
    "bert": {"target_modules": ["query", "value"], "use_rslora": True, "bias": "lora_only"},
}


@pytest.mark.parametrize("name", _SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_every_reader_computes_the_same(name: str, tmp_path: Path) -> None:
    model = make(name)
    lt.attach(model, lt.LoraConfig(r=4, lora_alpha=8, **_SETTINGS[name]))
    fill(trainable_parameters(model).values())
    expected = run(model)
    lt.save(model, tmp_path / "a", portable=True)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(4, *_SETTINGS[name].get("rank_pattern", {}).values(), 0)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert torch.equal(run(model), expected)
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "a").eval()
    again = make(name)
    lt.load_adapter(again, tmp_path / "a")
    for other in (theirs, again):
        torch.testing.assert_close(run(other), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    # A reader that knows nothing but r and lora_alpha, as vLLM and llama.cpp.
    lt.merge(model)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    pairs = [key for key in tensors if key.endswith(".lora_A.weight")]
    assert pairs
    for key in pairs:
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = config["lora_alpha"] / config["r"] * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        change = _weight(model, path) - _weight(make(name), path)
        torch.testing.assert_close(change, update.T if name == "gpt2" else update, rtol=1e-5, atol=1e-5)


def _weight(model: nn.Module, path: str) -> Tensor:
    return model.get_parameter(f"{path}.weight").detach()


def test_convolutions_and_attention_keep_their_layouts(tmp_path: Path) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, 4, 3),
                "attention": nn.MultiheadAttention(8, 2),
                "groups": nn.Conv1d(4, 4, 1, groups=2),
            }
        )

    model, x, rows = layers(), torch.randn(1, 3, 6, 6), torch.randn(5, 1, 8)
    lt.attach(model, lt.LoraConfig(r=4, target_modules=["conv", "attention"], rank_pattern={"conv": 2}))
    fill(trainable_parameters(model).values())
    lt.save(model, tmp_path / "a", portable=True)
    again = layers()
    lt.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again["conv"](x), model["conv"](x))
    torch.testing.assert_close(again["attention"](rows, rows, rows), model["attention"](rows, rows, rows))
    lt.attach(model, lt.LoraConfig(r=4, target_modules=["conv", "groups"], rank_pattern={"groups": 2}), name="b")
    with pytest.raises(AdapterError, match="groups of rank 2, which cannot be padded to rank 4"):
        lt.save(model, tmp_path / "b", "b", portable=True)
    assert not (tmp_path / "b").exists()
