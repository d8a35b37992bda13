"""Adapters of experts equal PEFT's, merge and switch exactly, and every other Parameter is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from loratune.adapters.updates import read_updates
from loratune.config import LoraConfig
from loratune.errors import AdapterError, ConfigError
from loratune.lora.files import load_adapter, save
from loratune.lora.inject import activate, attach, detach, merge, unmerge
from loratune.many.bank import Bank
from tests.lora.helpers import fill, run
from tests.lora.test_peft_targets import MIXTURES, mixture

ALL = "all-experts"


def _config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "init_lora_weights": False, "target_parameters": ALL} | settings)


def _biased(name: str) -> nn.Module:
    """A mixture whose biases are not zero."""
    model = mixture(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("name", MIXTURES)
def test_peft_computes_the_same_with_our_file(name: str, tmp_path: Path) -> None:
    ours, theirs, again = (_biased(name) for _ in range(3))
    bare = run(ours)
    attached = attach(
        ours, _config(use_rslora=True, rank_pattern={"gate_up_proj": 3}, alpha_pattern={"down_proj": 5})
    )
    assert any("experts" in path for path in attached.ranks)
    assert "experts in " in attached.notes[-1]
    save(ours, tmp_path / "a")
    expected = run(ours)
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    torch.testing.assert_close(run(read), expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 0.1
    assert load_adapter(again, tmp_path / "a").ranks == attached.ranks
    assert torch.equal(run(again), expected)
    save(again, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "glm4_moe"])
@pytest.mark.parametrize(
    "parameters", [["experts.gate_up_proj"], ["down_proj"], ["experts.down_proj", "experts.gate_up_proj"]]
)
def test_we_compute_the_same_with_a_file_of_peft(name: str, parameters: list[str], tmp_path: Path) -> None:
    ours, base = _biased(name), _biased(name)
    settings = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj"], "target_parameters": parameters}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings, init_lora_weights=False, use_rslora=True))
    theirs.save_pretrained(tmp_path / "a")
    bare = run(ours)
    load_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(run(ours), run(theirs.eval()), rtol=1e-5, atol=1e-5)
    assert (run(ours) - bare).abs().max() > 0.1


def test_experts_alone_need_no_target_modules(tmp_path: Path) -> None:
    ours, theirs = _biased("qwen3_moe"), _biased("qwen3_moe")
    attached = attach(ours, _config(target_modules=[], target_parameters=["0.mlp.experts.down_proj"]))
    assert list(attached.ranks) == ["model.layers.0.mlp.experts"]
    save(ours, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == []
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    torch.testing.assert_close(run(read), run(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merge_unmerge_switch_and_detach(name: str) -> None:
    model = _biased(name)
    classes = [type(module) for module in model.modules()]
    bare = run(model)
    attach(model, _config(), name="a")
    first = run(model)
    attach(model, _config(r=3, target_parameters=["experts.down_proj"]), name="b", seed=1)
    second = run(model)
    assert (first - second).abs().max() > 0.1
    activate(model, "a")
    assert torch.equal(run(model), first)
    merge(model, "a")
    torch.testing.assert_close(run(model), first, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(run(model), first)
    activate(model, None)
    assert torch.equal(run(model), bare)
    activate(model, "b")
    assert torch.equal(run(model), second)
    with pytest.raises(AdapterError, match="ExpertPairs, which is not a low-rank sum"):
        activate(model, ["a", "b"])
    detach(model)
    assert torch.equal(run(model), bare)
    assert [type(module) for module in model.modules()] == classes


def test_a_merge_that_overflows_is_refused_and_changes_nothing() -> None:
    model = _biased("qwen3_moe").half()
    attach(model, _config())
    layer = model.model.layers[1].mlp.experts
    before = copy.deepcopy(layer._parameters)
    with torch.no_grad():
        layer.lora_A.fill_(300.0)
        layer.lora_B.fill_(300.0)
    with pytest.raises(AdapterError, match="infinity"):
        merge(model)
    assert all(torch.equal(layer._parameters[n], before[n]) for n in ("gate_up_proj", "down_proj"))


def test_new_pairs_are_kaiming_uniform_and_zero_for_each_expert() -> None:
    model = mixture("gpt_oss")
    attach(model, _config(init_lora_weights=True))
    experts = model.model.layers[0].mlp.experts
    for name, d_in in (("lora_A", 96), ("gate_up_proj_lora_A", 64)):
        A = experts.get_parameter(name)
        assert A.shape == (4 * 2, d_in)
        assert 0.8 / d_in**0.5 < A.abs().max() <= 1 / d_in**0.5
        assert A.unique().numel() > 0.99 * A.numel()
    assert not experts.lora_B.any()
    torch.testing.assert_close(run(model), run(mixture("gpt_oss")), rtol=1e-5, atol=1e-5)


def test_all_linear_says_that_experts_stay_frozen() -> None:
    attached = attach(mixture("qwen3_moe"), LoraConfig(r=2))
    (note,) = [note for note in attached.notes if "experts" in note]
    values = 2 * 4 * 2 * ((64 + 2 * 32) + (32 + 64))
    assert "experts in 2 modules (gate_up_proj, down_proj) stay frozen" in note
    assert f"{values:,} more values" in note


def test_all_linear_leaves_routers_out_and_says_so() -> None:
    model = mixture("hunyuan_v1_moe")
    attached = attach(model, LoraConfig(r=2))
    assert not any(path.endswith("wg") for path in attached.ranks)
    assert '2 routers of experts, the first "model.layers.0.mlp.gate.wg"' in attached.left_out[-1]
    attach(model, LoraConfig(r=2, target_modules=["wg"]), name="named")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_parameters": ["experts.gate_up"]}, AdapterError, 'Did you mean "experts.gate_up_proj"'),
        ({"target_parameters": ["gate.weight"]}, AdapterError, "no expert weight"),
        (
            {"target_parameters": ["q_proj.weight"]},
            AdapterError,
            'in target_modules: "model.layers.0.self_attn.q_proj"',
        ),
        ({"target_parameters": "experts.down_proj"}, ConfigError, 'give a list of names, or "all-experts"'),
        ({"lora_dropout": 0.1}, ConfigError, "lora_dropout is 0.1"),
        ({"layers_to_transform": [0]}, ConfigError, "layers_to_transform does not go with target_parameters"),
        ({"target_modules": ["experts"]}, AdapterError, "name them in target_parameters"),
        ({"rank_pattern": {"gate_up": 2}}, AdapterError, "fits none of the adapted layers"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mixture("qwen3_moe")
    with pytest.raises(error, match=message):
        attach(model, _config(**settings))
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(AdapterError, match="no experts that can be adapted"):
        attach(nn.Sequential(nn.Linear(8, 8)), _config())


def test_excluded_experts_stay_frozen() -> None:
    attached = attach(mixture("qwen3_moe"), _config(exclude_modules=["0.mlp.experts"]))
    assert [path for path in attached.ranks if "experts" in path] == ["model.layers.1.mlp.experts"]


def test_another_formula_is_refused() -> None:
    model = mixture("qwen3_moe")
    kind = type(model.model.layers[0].mlp.experts)

    class Doubled(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            return 2 * super().forward(*args)

    model.model.layers[0].mlp.experts.__class__ = Doubled
    attached = attach(model, _config())
    assert '"model.layers.0.mlp.experts" cannot be adapted: Doubled computes another formula' in attached.left_out


def test_a_bank_refuses_experts() -> None:
    with pytest.raises(AdapterError, match="train it by itself"):
        Bank.attach(mixture("qwen3_moe"), [_config()], 1)


def test_combining_refuses_experts(tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    attach(model, _config())
    save(model, tmp_path / "a")
    with pytest.raises(AdapterError, match="adapts experts"):
        read_updates(tmp_path / "a")


def test_every_tensor_gets_a_gradient() -> None:
    model = mixture("gpt_oss")
    attach(model, _config(init_lora_weights=True))
    experts = model.model.layers[0].mlp.experts
    fill([experts.lora_B], 3)
    model(input_ids=torch.arange(3, 20)[None]).logits.square().sum().backward()
    for name in ("lora_A", "lora_B", "gate_up_proj_lora_B"):
        assert experts.get_parameter(name).grad.norm() > 0, name
    assert experts.gate_up_proj.grad is None
