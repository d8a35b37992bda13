"""Experts in 4 and 8 bits: quantised while loading, with adapters, merged and moved as dense ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from loratune.base.load import load
from loratune.config import LoraConfig
from loratune.lora.inject import attach, detach, merge, unmerge
from loratune.ops.gates import AnyGate, GateFormula
from loratune.precision.contract import weight_format
from loratune.precision.experts import QuantisedExperts, form_of, gate_of
from loratune.precision.linear import count_parameters, dense_state_dict, formats_in, mostly_dense, quantise_linears
from tests.lora.helpers import fill, run
from tests.lora.test_peft_targets import mixture

CONFIG = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_parameters="all-experts")


def _experts(model: nn.Module) -> list[QuantisedExperts]:
    return [module for module in model.modules() if isinstance(module, QuantisedExperts)]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_a_model_in_4_bits_equals_the_dense_model_of_its_values(name: str, tmp_path: Path) -> None:
    dense = mixture(name)
    dense.save_pretrained(tmp_path)
    model = load(str(tmp_path), "nf4", "cpu")
    assert len(_experts(model)) == sum(hasattr(module, "num_experts") and "Experts" in type(module).__name__
                                       for module in dense.modules())  # fmt: skip
    assert count_parameters(model) == count_parameters(dense)
    assert mostly_dense(model) is None
    assert [form.name for form in formats_in(model)] == ["nf4"]
    held = _experts(model)[0].held["down_proj"]
    original = dict(dense.named_parameters())
    path = next(path for path in original if path.endswith("experts.down_proj"))
    error = (getattr(_experts(model)[0], "down_proj") - original[path]).norm() / original[path].norm()  # noqa: B009
    assert 0.05 < error < 0.12  # of NF4 on normal values
    assert held.frozen.nbytes < 0.6 * original[path].numel()
    dense.load_state_dict(dense_state_dict(model))
    torch.testing.assert_close(run(model), run(dense), rtol=1e-5, atol=1e-5)
    bare = run(model)
    attach(model, CONFIG)
    attach(dense, CONFIG)
    torch.testing.assert_close(run(model), run(dense), rtol=1e-5, atol=1e-5)
    assert (run(model) - bare).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_gradients_equal_those_of_the_dense_model(name: str) -> None:
    model, dense = mixture(name), mixture(name)
    quantise_linears(model.model, weight_format("nf4").quantise)
    dense.load_state_dict(dense_state_dict(model))
    found = []
    for each in (model, dense):
        attach(each, CONFIG)
        parameters = [p for p in each.parameters() if p.requires_grad]
        fill(parameters)
        each(input_ids=torch.arange(3, 20)[None]).logits.square().sum().backward()
        found.append([p.grad for p in parameters])
    assert len(found[0]) == len(found[1]) > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.norm()))


@pytest.mark.parametrize("precision", ["nf4", "fp8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_merge_unmerge_detach_and_moves(name: str, precision: str) -> None:
    model = mixture(name)
    for layer in model.model.layers:
        quantise_linears(layer.mlp, weight_format(precision).quantise)
    bare = run(model)
    attach(model, replace(CONFIG, target_modules=[]))
    with_adapter = run(model)
    merge(model)
    torch.testing.assert_close(run(model), with_adapter, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(run(model), with_adapter)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied), with_adapter)
    detach(model)
    assert torch.equal(run(model), bare)
    assert {type(module) for module in _experts(model)} == {QuantisedExperts}
    model.to(torch.bfloat16)
    assert {held.frozen.dtype for module in _experts(model) for held in module.held.values()} == {torch.bfloat16}
    assert run(copied).dtype == torch.float32


def test_the_formula_of_a_gate_follows_the_settings_of_its_module() -> None:
    def first(kind: str) -> nn.Module:
        modules = mixture(kind).modules()
        return next(module for module in modules if not isinstance(form_of(module), str))

    experts = first("gpt_oss")
    assert gate_of(experts) == GateFormula("silu", True, experts.alpha, experts.limit, 1.0)
    experts.limit = 0.5
    assert gate_of(experts).limit == 0.5
    experts = first("qwen3_moe")
    assert gate_of(experts) == GateFormula("silu")
    experts.act_fn = torch.nn.GELU()
    assert gate_of(experts) == GateFormula("gelu")
    experts.act_fn.register_forward_hook(lambda module, given, out: 2 * out)
    assert isinstance(gate_of(experts), AnyGate)
