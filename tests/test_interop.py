"""Adapters move between PEFT and loratune in both directions, and a model gives the same logits with them.

Tolerance: 1e-5 of the largest logit in float32, where one product of a hundred terms rounds to about 1e-6. Every
adapter here changes the logits by at least a hundred times the tolerance, so an ignored adapter fails the test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from loratune.config import LoraConfig
from loratune.lora.files import load_adapter, read_config, save
from loratune.lora.inject import attach, trainable_parameters
from tests.lora.helpers import fill, make, run

# Per model: two configurations that between them use every field, and the layers each has.
_DECODER: list[dict[str, Any]] = [
    {
        "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
        "alpha_pattern": {"q_proj": 32, "embed_tokens": 3},
        "modules_to_save": ["model.norm"],
    },
    {
        "target_modules": r"model\.layers\.\d+\.(self_attn\.[qko]_proj|mlp\.\w+_proj)",
        "exclude_modules": ["layers.0.mlp.up_proj"],
        "bias": "lora_only",  # a decoder has none of these; PEFT accepts that
    },
    {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
]
_ENCODER: list[dict[str, Any]] = [
    {
        "target_modules": ["query", "value", "dense"],
        "bias": "lora_only",
        "use_rslora": True,
        "rank_pattern": {"query": 2},
    },
    {"target_modules": ["query", "word_embeddings"], "bias": "all", "alpha_pattern": {"query": 5}},
    {"target_modules": ["query", "key"], "layers_to_transform": [1]},
]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma3": _DECODER,
    "gpt2": [
        {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "rank_pattern": {"c_fc": 2}},
        {"target_modules": ["c_attn", "c_proj"], "bias": "all", "use_rslora": True, "modules_to_save": ["ln_f"]},
        {"target_modules": "all-linear", "alpha_pattern": {"mlp.c_proj": 2}},
    ],
    "bert": [*_ENCODER, {"target_modules": ["query", "value"], "bias": "all", "modules_to_save": ["classifier"]}],
    "bert-mlm": [{"target_modules": ["query", "dense"], "bias": "all"}],
    "t5": [
        {"target_modules": ["q", "v", "wo"], "use_rslora": True, "rank_pattern": {"q": 2}},
        {"target_modules": "all-linear", "modules_to_save": ["final_layer_norm"], "alpha_pattern": {"wi": 5}},
    ],
    "minilm": [*_ENCODER, {"target_modules": "all-linear", "modules_to_save": ["pooler"]}],
}
CASES = [(name, i) for name, variants in VARIANTS.items() for i in range(len(variants))]


def _assert_same(ours: Tensor, theirs: Tensor, base: Tensor) -> None:
    tolerance = 1e-5 * float(base.abs().max().clamp(min=1.0))
    assert float((theirs - base).abs().max()) > 100 * tolerance, "the adapter does nothing"
    assert float((ours - theirs).abs().max()) <= tolerance


def _settings(name: str, variant: int) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, **VARIANTS[name][variant]}


def _ours(name: str, variant: int) -> nn.Module:
    settings = _settings(name, variant)
    if VARIANTS[name] is _DECODER:
        settings["bias"] = "none"
    model = make(name)
    attach(model, LoraConfig(**settings))
    fill(trainable_parameters(model).values())
    return model


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.filterwarnings("ignore")  # PEFT's warnings about saved embeddings and fan_in_fan_out
def test_adapter_of_peft_computes_the_same_here(name: str, variant: int, tmp_path: Path) -> None:
    base = run(make(name))
    theirs = peft.get_peft_model(make(name), peft.LoraConfig(**_settings(name, variant))).eval()
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = make(name)
    load_adapter(ours, tmp_path)
    _assert_same(run(ours), run(theirs), base)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_adapter_of_ours_computes_the_same_in_peft(name: str, variant: int, tmp_path: Path) -> None:
    ours = _ours(name, variant)
    save(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(name), tmp_path / "adapter").eval()
    _assert_same(run(ours), run(theirs), run(make(name)))


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_adapter_of_ours_comes_back_the_same(name: str, variant: int, tmp_path: Path) -> None:
    ours = _ours(name, variant)
    save(ours, tmp_path / "adapter")
    again = make(name)
    load_adapter(again, tmp_path / "adapter", name="other")
    assert torch.equal(run(again), run(ours))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_an_adapter_of_ours(name: str, tmp_path: Path) -> None:
    ours = make(name)
    attach(ours, LoraConfig(r=4, use_rslora=True, init_lora_weights=False))
    save(ours, tmp_path / "adapter")
    theirs = make(name)
    theirs.load_adapter(str(tmp_path / "adapter"))
    _assert_same(run(ours), run(theirs), run(make(name)))


def test_config_has_every_field_that_peft_writes(tmp_path: Path) -> None:
    model = make("llama")
    attach(model, LoraConfig(r=4))
    save(model, tmp_path / "ours")
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    ours = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(theirs) - set(ours) == {"peft_version"}  # PEFT fills in its own version
    assert ours["task_type"] == "CAUSAL_LM"
    assert ours["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_fields_missing_in_a_file_have_the_defaults_of_peft(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    ours, theirs = read_config(tmp_path), peft.LoraConfig.from_pretrained(tmp_path)
    for field in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert getattr(ours, field) == getattr(theirs, field), field


def test_adapter_that_peft_saved_under_another_name_is_found(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="sql")
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    ours = make("llama")
    load_adapter(ours, tmp_path, name="sql")
    _assert_same(run(ours), run(theirs), run(make("llama")))


def test_modules_that_peft_took_by_any_ending_are_all_taken_in(tmp_path: Path) -> None:
    """PEFT's "norm" also trains every input_layernorm; the file has them, so they belong to the adapter."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(make("qwen3"), config).eval()
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = make("qwen3")
    report = load_adapter(ours, tmp_path / "theirs")
    assert "model.layers.0.input_layernorm" in report.modules_to_save
    _assert_same(run(ours), run(theirs), run(make("qwen3")))
    save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make("qwen3"), tmp_path / "ours").eval()
    _assert_same(run(again), run(theirs), run(make("qwen3")))


@pytest.mark.filterwarnings("ignore")
def test_classification_adapter_of_peft_with_its_automatic_head_is_taken_in(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")  # adds "classifier" and "score"
    theirs = peft.get_peft_model(make("bert"), config).eval()
    fill(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = make("bert")
    assert load_adapter(ours, tmp_path).modules_to_save == ("classifier",)
    _assert_same(run(ours), run(theirs), run(make("bert")))
