"""Every recipe against the modules of its models, in float64: hidden states, loss and gradients, at every level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from loratune import tables
from loratune.base.forward import PackedForward, fuse, prepare
from loratune.config import LoraConfig
from loratune.data.pack import make_row
from loratune.fused.fit import fusible, recipe_fits
from loratune.fused.policy import ActivationPlan, Level
from loratune.fused.recipes import LLAMA, recipes_for
from loratune.lora.inject import attach, detach
from loratune.many.bank import Bank
from loratune.ops.bank.projection import Segment
from loratune.ops.dropout import dropout_key, row_key
from loratune.precision.contract import weight_format
from loratune.precision.linear import dense_state_dict, quantise_linears
from tests.base.float64 import float64_throughout
from tests.fused.models import MODELS, recipe_model
from tests.training.helpers import examples, loss_and_gradients

LAYERS = 2
KIND = {"mistral": "llama", "qwen2": "llama", "granite": "llama", "gpt_neox sequential": "gpt_neox"}


def fused_forward(model) -> PackedForward:
    forward = prepare(model)
    assert fuse(forward)
    return forward


def unfused(forward: PackedForward) -> PackedForward:
    return PackedForward(forward.model, "packed", forward.head, state=forward.state)


def assert_close(got, expected, most=1e-9):
    """Relative to the norm of each tensor: sums in another order round by 1e-15 of their largest term."""
    torch.testing.assert_close(got[0], expected[0], rtol=most, atol=0)
    assert got[1].keys() == expected[1].keys()
    for path, gradient in expected[1].items():
        assert float(gradient.norm()) > 0, path
        assert float((got[1][path] - gradient).norm() / gradient.norm()) < most, path


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_modules_at_every_level(name, monkeypatch):
    model = recipe_model(name)
    row, forward = make_row(examples(7), 256, 0), fused_forward(model)
    float64_throughout(monkeypatch)
    expected = loss_and_gradients(model, unfused(forward), row)
    for level in Level:
        forward.plan = ActivationPlan.uniform(level, LAYERS)
        assert_close(loss_and_gradients(model, forward, row), expected)
    forward.plan = ActivationPlan.uniform(Level.FULL, LAYERS, tile=64)
    assert_close(loss_and_gradients(model, forward, row), expected)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_adapters_is_that_of_the_modules(name, monkeypatch):
    model = recipe_model(name, lora_dropout=0.3)
    row, forward = make_row(examples(7), 256, 0), fused_forward(model)
    float64_throughout(monkeypatch)
    for module in model.modules():
        module.training = hasattr(module, "lora_dropout")
    with forward.state.dropout(row_key(dropout_key(0, 3), 512)):
        assert_close(loss_and_gradients(model, forward, row), loss_and_gradients(model, unfused(forward), row))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama", "mistral")])
@pytest.mark.parametrize("level", [Level.WIDE, Level.FULL])
def test_levels_give_the_same_bits(name, level):
    """Recomputed activations come from the same calls as saved ones."""
    model = recipe_model(name, torch.bfloat16)
    row, forward = make_row(examples(7), 256, 0), prepare(model)
    assert fuse(forward)
    expected = loss_and_gradients(model, forward, row)
    forward.plan = ActivationPlan.uniform(level, LAYERS)
    got = loss_and_gradients(model, forward, row)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][path], gradient) for path, gradient in expected[1].items())


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_is_chosen_by_the_modules(name):
    fits = list(recipe_fits(recipe_model(name)))
    assert len(fits) == 1
    assert fits[0].recipe == tables.load_entry(tables.RECIPES[name if name in tables.RECIPES else KIND[name]])


def test_models_without_a_recipe_run_as_modules():
    model = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300, state_size=8))
    assert not fusible(model)


PAIRS = replace(LLAMA, interleaved=True)


def test_of_two_recipes_that_fit_the_one_that_agrees_is_taken(monkeypatch):
    """Which elements a rotation pairs cannot be seen in the children's names."""
    halves = tables.RECIPES["llama"]
    monkeypatch.setattr(tables, "RECIPES", {"pairs": f"{__name__}:PAIRS", "halves": halves})
    model = recipe_model("llama")
    assert len(list(recipes_for(model))) == 2
    forward = fused_forward(model)
    assert forward.fused is not None
    assert forward.fused.recipe == LLAMA


def test_a_layer_with_one_more_child_does_not_fit():
    model = recipe_model("llama")
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    assert not fusible(model)


@pytest.mark.parametrize("path", ["input_layernorm", "self_attn.q_proj", "mlp.act_fn", "mlp"])
def test_hooks_are_not_passed_over(path):
    """Fused layers call no child, so a hook on one would never run."""
    model = recipe_model("llama")
    forward = fused_forward(model)
    handle = model.model.layers[1].get_submodule(path).register_forward_hook(lambda *_: None)
    assert forward.fused is not None
    assert "hook" in (forward.fused.why_not(model) or "")
    handle.remove()
    assert forward.fused.why_not(model) is None


def test_dropout_of_the_base_model_is_not_left_out():
    model = recipe_model("gpt2" if fusible(recipe_model("gpt2")) else "gpt_neox")
    dropout = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    dropout.p = 0.1
    assert fusible(model)
    model.train()
    assert not fusible(model)


def quantised_and_dense(name, precision):
    """A model with weights in few bits, and one that holds their values in floating point."""
    model, dense = recipe_model(name, torch.float32), recipe_model(name)
    detach(model)
    detach(dense)
    quantise_linears(model, weight_format(precision).quantise, skip=[model.get_output_embeddings()])
    model.to(torch.float64)
    dense.load_state_dict(dense_state_dict(model))
    for base in (model, dense):
        attach(base, LoraConfig(r=4, init_lora_weights=False), name="default", seed=0)
    return model, dense


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_4_bits_compute_as_their_dense_values(name):
    row = make_row(examples(7), 256, 0)
    results = []
    for model in quantised_and_dense(name, "nf4"):
        results.append(loss_and_gradients(model, fused_forward(model), row))
    assert_close(*results)


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_8_bits_are_as_near_as_in_modules(name):
    """Rows in 8 bits round by some percent, once more or once less in each product than as modules."""
    row = make_row(examples(7), 256, 0)
    model, dense = quantised_and_dense(name, "fp8")
    forward = fused_forward(model)
    runs = (dense, unfused(fused_forward(dense))), (model, unfused(forward)), (model, forward)
    found = [loss_and_gradients(base, run, row)[1] for base, run in runs]
    exact, modules, fused = (torch.cat([gradient.flatten() for gradient in result.values()]) for result in found)
    assert float((fused - exact).norm()) < 1.5 * float((modules - exact).norm())


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gpt2"}))  # a bank has no Conv1D
def test_a_bank_computes_as_its_modules(name, monkeypatch):
    model = recipe_model(name)
    detach(model)
    configs = [LoraConfig(r=r, init_lora_weights=False) for r in (4, 2)]
    bank = Bank.attach(model, configs, 2)
    for slot, config in enumerate(configs):
        bank.place(slot, config, seed=slot)
    row, forward = make_row(examples(7), 256, 0), fused_forward(model)
    segments = [Segment(0, 0, 100), Segment(1, 100, 256)]
    float64_throughout(monkeypatch)
    results = []
    for run in (unfused(forward), forward):
        bank.pool.gradient.zero_()
        with bank.row(segments):
            loss, _ = loss_and_gradients(model, run, row)
        results.append((loss, {"all slots": bank.pool.gradient.clone()}))
    assert_close(results[1], results[0])
