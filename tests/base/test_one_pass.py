"""Stand-ins for norms and gated MLPs of any architecture: the same numbers, less kept, and nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loratune.base import one_pass
from loratune.base.forward import prepare, take_one_pass
from loratune.base.one_pass import Form, gated_kind, norm_form
from loratune.data.pack import make_row
from loratune.lora.inject import attach
from loratune.lora.peft_config import LoraConfig
from loratune.ops.policy import Level, Plan
from loratune.training.imagine import imagine, without_data
from loratune.training.objectives import sft
from loratune.training.step import _row_objective
from tests.conftest import CAUSAL, build
from tests.training.helpers import examples, model_with_adapter, trainable

FOUND = {
    "llama": 7, "qwen3": 11, "gemma2": 11, "gemma3": 15, "mistral": 7, "gpt2": 0, "gptneox": 0, "phi3": 7,
    "cohere": 2, "granite": 7, "gptoss": 5, "mixtral": 5, "bloom": 0, "mamba": 3,
}  # fmt: skip
"""Stand-ins in two layers and the last norm."""


def loss_and_gradients(model, forward, row):
    with forward.installed():
        loss = _row_objective(forward, row, sft)
        loss.backward()
    found = {path: p.grad for path, p in trainable(model).items()}
    for p in model.parameters():
        p.grad = None
    return loss.detach(), found


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_found_by_what_it_computes(name):
    model = build(name)
    paths = [path for path, _ in model.named_parameters()]
    before = dict(model.named_modules())
    with one_pass.installed(model) as count:
        assert count == FOUND[name]
        assert [path for path, _ in model.named_parameters()] == paths
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("name", [name for name, count in FOUND.items() if count and name != "mamba"])
@pytest.mark.parametrize("level", [None, Level.FULL])
def test_loss_and_gradients_are_those_of_the_modules(name, level):
    experts = name in ("gptoss", "mixtral")  # whose products know no float64
    model = model_with_adapter(name, dtype=torch.float32 if experts else torch.float64)
    row = make_row(examples(5), 160, 0)
    forward = prepare(model)
    plain = loss_and_gradients(model, forward, row)
    assert take_one_pass(forward)
    forward.plan = None if level is None else Plan.uniform(level, model.config.num_hidden_layers)
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
            stand_in = model.get_submodule(path)
            assert isinstance(stand_in, one_pass.Norm)
            assert torch.equal(stand_in(x), out)


def held(model, forward, row):
    """Bytes that autograd keeps, weights aside."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with forward.installed(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = forward.hidden_states(row.tokens, row.position_ids, row.cu_seqlens)
        kept = sum(storages.values())
    del hidden
    return kept


@pytest.mark.parametrize(("name", "at_most"), [("gemma3", 0.8), ("phi3", 0.85)])
def test_less_is_kept_and_the_estimate_knows(name, at_most):
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
    kept = [imagine(copy, 256, Plan.uniform(Level.NONE, 2), on_gpu=on_gpu).kept for on_gpu in (False, True)]
    assert kept[1] / kept[0] == pytest.approx(got / plain, abs=0.1)


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


class Mlp(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.act_fn, self.limit = nn.SiLU(), limit

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=self.limit) * self.up_proj(x))


def test_what_does_more_or_else_stays():
    weight = torch.randn(12)
    assert norm_form(Deaf(weight)) == Form(1e-6, plus_one=False, rounded=True)
    assert norm_form(Biased(weight)) is None
    assert norm_form(nn.LayerNorm(12)) is None
    trained = Deaf(weight).requires_grad_(True)
    assert norm_form(trained) is None
    assert gated_kind(Mlp(1e9)) == "silu"
    assert gated_kind(Mlp(1.0)) is None
    assert gated_kind(nn.Linear(3, 3)) is None


def test_hooks_are_heard():
    model, heard = build("gemma2"), []
    model.model.norm.register_forward_hook(lambda *_: heard.append(1))
    with one_pass.installed(model) as count:
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert count == FOUND["gemma2"] - 1
    assert heard == [1]


def test_a_form_that_does_not_give_the_model_s_own_states_is_not_taken(monkeypatch):
    model = build("gemma2")
    forward = prepare(model)
    monkeypatch.setattr(one_pass, "norm_form", lambda module: norm_form(module) and Form(1e-6, False, rounded=True))
    assert not take_one_pass(forward)
    assert not forward.one_pass
