"""Fused decoder layers in the place of modules: the same numbers, the same paths, the same adapters."""

from __future__ import annotations

import pytest
import torch

from loratune.base import one_pass
from loratune.base.forward import PackedForward, fuse, prepare
from loratune.config import LoraConfig
from loratune.data.pack import make_row
from loratune.fused import attention_half
from loratune.fused import layer as fused
from loratune.fused.fit import fusible
from loratune.fused.link import LayerLink
from loratune.fused.mlp_half import evaluated
from loratune.fused.policy import ActivationPlan, Level
from loratune.lora.inject import activate, attach
from loratune.lora.linear import LoraLinear
from loratune.ops.dropout import dropout_key, row_key
from loratune.training.step import row_loss
from tests.conftest import CAUSAL, build
from tests.training.helpers import examples, loss_and_gradients, model_with_adapter, trainable

FUSIBLE = ["llama", "qwen3", "mistral"]
WITH_RECIPE = [*FUSIBLE, "gemma2", "gemma3", "gpt2", "gptneox", "phi3", "granite"]


def training(model):
    """Dropout as in a run (`training.loop`)."""
    for module in model.modules():
        module.training = hasattr(module, "lora_dropout")


@pytest.mark.parametrize("name", FUSIBLE)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"], ["up_proj"]])
@pytest.mark.parametrize(("lora_alpha", "dropout"), [(4, 0.0), (10, 0.0), (10, 0.3)])
def test_loss_and_gradients_are_those_of_the_modules(name, targets, lora_alpha, dropout):
    model = model_with_adapter(
        name, dtype=torch.float64, target_modules=targets, lora_alpha=lora_alpha, lora_dropout=dropout
    )
    row = make_row(examples(7), 256, 0)
    forward = prepare(model)
    assert fuse(forward)
    training(model)
    with forward.state.dropout(row_key(dropout_key(0, 3), 512)):
        unfused = PackedForward(model, "packed", forward.head, state=forward.state)
        plain = loss_and_gradients(model, unfused, row)
        got = loss_and_gradients(model, forward, row)
    torch.testing.assert_close(got[0], plain[0], rtol=1e-7, atol=0)  # the modules' norms are in float32
    assert got[1].keys() == plain[1].keys()
    for path, gradient in plain[1].items():
        torch.testing.assert_close(
            got[1][path], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=path
        )


def test_the_last_norm_can_train():
    model = build("llama", dtype=torch.float64)
    attach(model, LoraConfig(r=4, modules_to_save=["norm"]), name="default", seed=0)
    row, forward = make_row(examples(7), 256, 0), prepare(model)
    plain = loss_and_gradients(model, forward, row)
    assert fuse(forward)
    got = loss_and_gradients(model, forward, row)
    gradient = plain[1]["model.norm.weight"]
    assert float(gradient.norm()) > 0  # of float32, which the module's norm is in
    atol = 1e-6 * float(gradient.abs().max())
    torch.testing.assert_close(got[1]["model.norm.weight"], gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("trained", [False, True])
def test_the_last_norm_runs_in_one_pass_unless_it_trains(trained):
    model = model_with_adapter("llama")
    norm, forward = model.model.norm, prepare(model)
    assert fuse(forward)
    norm.requires_grad_(trained)
    with forward.installed():
        assert isinstance(model.model.norm, one_pass.OnePassNorm) != trained
    assert model.model.norm is norm


@pytest.mark.parametrize("name", CAUSAL)
def test_which_models_qualify(name):
    assert fuse(prepare(build(name))) == (name in WITH_RECIPE)


def test_the_right_parts_used_otherwise_do_not_qualify(monkeypatch):
    """A layer with a Llama's children that adds its output twice."""
    model = build("llama")
    forward = type(model.model.layers[0]).forward

    def doubled(self, hidden_states, **kwargs):
        return forward(self, hidden_states, **kwargs) + hidden_states

    monkeypatch.setattr(type(model.model.layers[0]), "forward", doubled)
    assert fusible(model)
    assert not fuse(prepare(model))


class Gated(LoraLinear):
    """Declares a low-rank sum and computes another one, which shows only where B is not zero."""

    def forward(self, input):
        out = super().forward(input)
        return out if self.lora_B is None else out + 0.5 * (input @ self.lora_A.T) @ self.lora_B.T

    def fusion(self):
        return super().fusion()


class Silent(LoraLinear):
    """Overrides `forward` and declares nothing."""

    def forward(self, input):
        return super().forward(input)


def with_kind(kind):
    """A Llama whose adapter has B = 0, as after `attach`, and one layer of another class."""
    model = build("llama")
    attach(model, LoraConfig(r=4), name="default", seed=0)
    model.model.layers[1].mlp.up_proj.__class__ = kind
    return model


def test_an_adapter_that_computes_another_sum_is_found_at_its_initial_values():
    model = with_kind(Gated)
    assert fusible(model)
    assert not fuse(prepare(model))
    assert fuse(prepare(with_kind(LoraLinear)))


def test_a_layer_with_a_forward_of_its_own_is_not_fused():
    model = with_kind(Silent)
    assert not fusible(model)
    assert not fuse(prepare(model))


def test_wrong_gradients_are_found(monkeypatch):
    """A backward that is wrong for one half of the layer, with the right hidden states."""
    model, real = model_with_adapter("llama"), attention_half.heads_backward

    def wrong(*args):
        below, gradients = real(*args)
        return below, [2 * gradient for gradient in evaluated([gradients])]

    monkeypatch.setattr(attention_half, "heads_backward", wrong)
    forward = prepare(model)
    assert not fuse(forward)
    assert "fused layers failed a check: gradients differ by" in forward.notes[-1]


def test_trying_leaves_no_trace():
    """Adapters, gradients and random generators are as before, whether layers are fused or not."""
    for model in (model_with_adapter("qwen3", lora_dropout=0.3), with_kind(Gated)):
        forward = prepare(model)
        training(model)
        for parameter in trainable(model).values():
            parameter.grad = torch.ones_like(parameter)
        before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
        state = torch.random.get_rng_state()
        fuse(forward)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())
        assert all(bool((p.grad == 1).all()) for p in trainable(model).values())


def test_paths_layers_and_values_are_as_before():
    """Inside, parameter paths are unchanged, so checkpoints can be written. Outside, the original layers are back."""
    model = model_with_adapter("qwen3")
    layers, values = list(model.model.layers), {k: v.clone() for k, v in model.state_dict().items()}
    forward = prepare(model)
    assert fuse(forward)
    with forward.installed():
        assert all(type(layer) is fused.FusedLayer for layer in model.model.layers)
        assert list(model.state_dict()) == list(values)
    assert list(model.model.layers) == layers
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def test_the_bare_base_and_changed_adapters_are_seen():
    """Working copies follow the masters, and with no adapter in use the layers compute the base."""
    model = model_with_adapter("llama", dtype=torch.float64)
    row = make_row(examples(5), 128, 0)
    forward = prepare(model)
    assert fuse(forward)
    plain = PackedForward(model, "packed", forward.head)

    def hidden(of):
        return of.hidden_states(row.tokens, row.position_ids, row.cu_seqlens)

    with torch.no_grad(), forward.installed():
        before = hidden(forward)
        for parameter in trainable(model).values():
            parameter.mul_(2.0)
        after = hidden(forward)
    with torch.no_grad(), plain.installed():
        expected = hidden(plain)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    activate(model, None)
    with torch.no_grad(), forward.installed():
        bare = hidden(forward)
    with torch.no_grad(), plain.installed():
        torch.testing.assert_close(bare, hidden(plain), rtol=1e-6, atol=1e-6)


def test_dropout_follows_step_and_position_and_is_for_training():
    model = model_with_adapter("llama", dtype=torch.float64, lora_dropout=0.3)
    row = make_row(examples(5), 128, 0)
    forward = prepare(model)
    assert fuse(forward)

    def loss(key, position=0):
        with forward.installed(), torch.no_grad(), forward.state.dropout(row_key(key, position)):
            return float(row_loss(forward, row))

    in_evaluation = loss(1)
    assert in_evaluation == loss(2)
    training(model)
    assert loss(1) == loss(1)
    assert len({in_evaluation, loss(1), loss(2), loss(1, 128)}) == 4


def test_without_a_key_dropout_is_random_and_the_same_in_the_backward():
    """The derivative of the loss along a direction must equal the sum of gradients times that direction."""
    model = model_with_adapter("llama", dtype=torch.float64, lora_dropout=0.3)
    row = make_row(examples(5), 128, 0)
    forward = prepare(model)
    assert fuse(forward)
    training(model)
    parameters = list(trainable(model).values())
    directions = [torch.randn_like(p) for p in parameters]

    def loss(seed, along=0.0):
        torch.manual_seed(seed)
        with forward.installed(), torch.no_grad():
            for p, direction in zip(parameters, directions, strict=True):
                p.add_(direction, alpha=along)
            found = float(row_loss(forward, row))
            for p, direction in zip(parameters, directions, strict=True):
                p.add_(direction, alpha=-along)
        return found

    assert loss(1) == loss(1) != loss(2)
    torch.manual_seed(1)
    _, gradients = loss_and_gradients(model, forward, row)
    expected = sum(float((g * d).sum()) for g, d in zip(gradients.values(), directions, strict=True))
    step = 1e-4  # the modules' norms are in float32: noise of 6e-8 of the loss, over the step
    assert (loss(1, step) - loss(1, -step)) / (2 * step) == pytest.approx(expected, rel=1e-2)


def test_adapters_that_differ_in_dropout_do_not_qualify():
    model = model_with_adapter("llama", lora_dropout=0.1)
    assert fusible(model)
    model.model.layers[1].self_attn.q_proj.lora_dropout = 0.2
    assert not fusible(model)


def ahead_and_not(monkeypatch, model, forward, row):
    """Loss and gradients with operands made by the layer below, and without; and how often they were used."""
    taken = []

    def counting(self, stream, real=LayerLink.take_operand):
        normed = real(self, stream)
        taken.append(normed is not None)
        return normed

    with monkeypatch.context() as patch:
        patch.setattr(LayerLink, "take_operand", counting)
        got = loss_and_gradients(model, forward, row)
    with monkeypatch.context() as patch:
        patch.setattr(LayerLink, "join", lambda self, stream, y, branch: branch.join(stream, y))
        plain = loss_and_gradients(model, forward, row)
    return got, plain, taken


def assert_same_bits(got, plain):
    assert torch.equal(got[0], plain[0])
    assert all(torch.equal(got[1][path], gradient) for path, gradient in plain[1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [Level.NONE, Level.WIDE, Level.FULL])
def test_an_operand_made_by_the_layer_below_has_the_same_bits(monkeypatch, level, dtype):
    model = model_with_adapter("qwen3", dtype=dtype)
    layers = model.config.num_hidden_layers
    forward = prepare(model)
    assert fuse(forward)
    forward.plan = ActivationPlan.uniform(level, layers)
    got, plain, taken = ahead_and_not(monkeypatch, model, forward, make_row(examples(7), 256, 0))
    assert_same_bits(got, plain)
    assert taken.count(True) == layers - 1


@pytest.mark.parametrize(
    "change",
    [lambda out: out.mul_(1.5), lambda out: out * 1.5, lambda out: out.clone()],
    ids=["in place", "new", "copy"],
)
def test_an_operand_of_a_changed_stream_is_not_used(monkeypatch, change):
    model = model_with_adapter("llama")
    forward = prepare(model)
    assert fuse(forward)
    row = make_row(examples(7), 256, 0)
    with monkeypatch.context() as patch:
        real = fused.FusedLayer.forward
        patch.setattr(fused.FusedLayer, "forward", lambda self, *given, **more: change(real(self, *given, **more)))
        got, plain, taken = ahead_and_not(monkeypatch, model, forward, row)
    assert_same_bits(got, plain)
    assert not any(taken)
