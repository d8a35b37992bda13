"""Norms and gated MLPs in one pass, in any architecture: the same numbers in less memory, all else untouched."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.activations import ACT2FN

from loratune.base import one_pass
from loratune.base.forward import prepare, take_one_pass
from loratune.base.one_pass import gated_kind
from loratune.data.pack import make_row
from loratune.fused.formulas import NormForm, norm_form
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import attach
from loratune.lora.peft_config import LoraConfig
from loratune.memory.simulate import simulate, without_data
from tests.conftest import CAUSAL, build
from tests.training.helpers import examples, loss_and_gradients, model_with_adapter

FOUND = {
    "llama": 7, "qwen3": 11, "gemma2": 11, "gemma3": 15, "mistral": 7, "gpt2": 0, "gptneox": 0, "phi3": 7,
    "cohere": 2, "granite": 7, "gptoss": 5, "mixtral": 5, "bloom": 0, "mamba": 3,
}  # fmt: skip
"""Replaced modules in two layers and the last norm."""


@pytest.mark.parametrize("name", CAUSAL)
def test_modules_are_found_by_their_formula(name):
    model = build(name)
    paths = [path for path, _ in model.named_parameters()]
    before = dict(model.named_modules())
    with one_pass.installed(model) as count:
        assert count == FOUND[name]
        assert [path for path, _ in model.named_parameters()] == paths
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("name", [name for name, count in FOUND.items() if count])
@pytest.mark.parametrize("level", [None, Level.FULL])
def test_loss_and_gradients_are_those_of_the_modules(name, level):
    experts = name in ("gptoss", "mixtral")  # whose products know no float64
    model = model_with_adapter(name, dtype=torch.float32 if experts else torch.float64)
    row = make_row(examples(5), 160, 0)
    forward = prepare(model)
    plain = loss_and_gradients(model, forward, row)
    assert take_one_pass(forward)
    forward.plan = None if level is None else ActivationPlan.uniform(level, model.config.num_hidden_layers)
    got = loss_and_gradients(model, forward, row)
    torch.testing.assert_close(got[0], plain[0], rtol=2e-6, atol=0)  # the modules' norms are in float32
    for path, gradient in plain[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[1][path], gradient, rtol=1e-4, atol=1e-5 * scale, msg=path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptoss"])
def test_norms_round_where_the_modules_do(name):
    model = build(name, dtype=torch.bfloat16)
    for path, parameter in model.named_parameters():
        if "norm" in path:
            parameter.data.normal_(0.5, 0.3)
    x = torch.randn(7, model.config.hidden_size).bfloat16()
    plain = {path: module(x) for path, module in model.named_modules() if norm_form(module) is not None}
    with one_pass.installed(model):
        assert plain
        for path, out in plain.items():
            norm = model.get_submodule(path)
            assert isinstance(norm, one_pass.OnePassNorm)
            assert torch.equal(norm(x), out)


def held(model, forward, row):
    """Bytes that autograd saves, except for weights."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with forward.installed(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = forward.hidden_states(row.tokens, row.position_ids, row.cu_seqlens)
        saved = sum(storages.values())
    del hidden
    return saved


@pytest.mark.parametrize(("name", "at_most"), [("gemma3", 0.8), ("phi3", 0.85)])
def test_less_is_saved_and_the_estimate_agrees(name, at_most):
    row = make_row(examples(7), 256, 0)
    model = build(name, dtype=torch.bfloat16)
    attach(model, LoraConfig(r=4), name="default", seed=0)
    forward = prepare(model)
    plain = held(model, forward, row)
    assert take_one_pass(forward)
    got = held(model, forward, row)
    assert got < at_most * plain
    copy = without_data(model.config, torch.bfloat16)
    attach(copy, LoraConfig(r=4), name="default", seed=0)
    simulated = [
        simulate(copy, 256, ActivationPlan.uniform(Level.NONE, 2), on_gpu=on_gpu).saved for on_gpu in (False, True)
    ]
    assert simulated[1] / simulated[0] == pytest.approx(got / plain, abs=0.1)


class Biased(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), 1e-6

    def forward(self, x):
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.change(self.weight * unit.to(x.dtype))

    def change(self, out):
        return out + 0.01


class Deaf(Biased):
    def change(self, out):
        return out * 1.0 if self.eps == 1e-6 else out


class Gated(Biased):
    """As in state-space layers."""

    def forward(self, x, gate=None):
        return super().forward(x) if gate is None else super().forward(x * gate)

    def change(self, out):
        return out


class Clumsy(Deaf):
    def change(self, out):
        raise IndexError("only for batches")


class Mlp(nn.Module):
    def __init__(self, limit, act_fn=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.act_fn, self.limit = act_fn or nn.SiLU(), limit

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=self.limit) * self.up_proj(x))


def test_modules_with_another_formula_stay():
    weight = torch.randn(12)
    assert norm_form(Deaf(weight)) == NormForm(1e-6)
    assert norm_form(Biased(weight)) is None
    assert norm_form(nn.LayerNorm(12)) is None  # it trains
    assert norm_form(nn.LayerNorm(12).requires_grad_(False)) == NormForm(1e-5, "layer")
    assert one_pass.replacement(nn.LayerNorm(12).requires_grad_(False)) is None
    trained = Deaf(weight).requires_grad_(True)
    assert norm_form(trained) is None
    assert norm_form(Clumsy(weight)) is None
    assert gated_kind(nn.Linear(3, 3)) is None


def test_clamps_of_large_numbers_are_found():
    assert gated_kind(Mlp(float("inf"))) == "silu"
    assert gated_kind(Mlp(float("inf"), ACT2FN["gelu_pytorch_tanh"])) == "gelu_tanh"
    for limit in (1.0, 10.0, 1000.0):
        assert gated_kind(Mlp(limit)) is None
    assert gated_kind(Mlp(float("inf"), ACT2FN["gelu_10"])) is None


def test_the_original_answers_calls_with_further_arguments():
    module, x, gate = Gated(torch.randn(12)), torch.randn(3, 12), torch.randn(3, 12)
    model = nn.ModuleDict({"norm": module})
    with one_pass.installed(model) as count:
        assert count == 1
        assert torch.equal(model["norm"](x, gate), module(x, gate))
        assert torch.equal(model["norm"](x, gate=gate), module(x, gate))
        torch.testing.assert_close(model["norm"](x), module(x))


def test_models_that_run_per_document_are_simulated_as_modules():
    model = without_data(tf.BambaConfig(**BAMBA), torch.bfloat16)
    attach(model, LoraConfig(r=4), name="default", seed=0)
    rows = [simulate(model, 128, ActivationPlan.uniform(Level.NONE, 2), on_gpu=on_gpu) for on_gpu in (False, True)]
    assert rows[0] == rows[1]


BAMBA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    "mamba_n_groups": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""One of its norms also takes a gate."""


def test_an_error_leaves_the_originals_in_place(monkeypatch):
    model, asked = build("gemma2"), []

    def failing(module):
        asked.append(module)
        if len(asked) > 20:
            raise MemoryError
        return norm_form(module)

    before = dict(model.named_modules())
    monkeypatch.setattr(one_pass, "norm_form", failing)
    with pytest.raises(MemoryError), one_pass.installed(model):
        pass
    assert dict(model.named_modules()) == before


def test_random_generators_are_not_used():
    model, state = build("phi3"), torch.random.get_rng_state()
    with one_pass.installed(model):
        assert torch.equal(torch.random.get_rng_state(), state)


def test_hooked_modules_stay():
    model, heard = build("gemma2"), []
    model.model.norm.register_forward_hook(lambda *_: heard.append(1))
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: heard.append(2))
    with one_pass.installed(model) as count:
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert count == FOUND["gemma2"] - 2
    assert heard == [2, 1]


def test_a_formula_that_gives_other_hidden_states_is_not_used(monkeypatch):
    model = build("gemma2")
    forward = prepare(model)
    monkeypatch.setattr(one_pass, "norm_form", lambda module: norm_form(module) and NormForm(1e-6))
    assert not take_one_pass(forward)
    assert not forward.one_pass
