"""Quantised layers under adapters, in every part of the package that uses a layer's weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loratune.base.forward import fuse, prepare
from loratune.config import LoraConfig
from loratune.data.pack import make_row
from loratune.lora.inject import activate, attach, detach, merge, unmerge
from loratune.ops.dropout import dropout_key, row_key
from loratune.precision import nf4
from loratune.precision.linear import (
    QuantisedLinear,
    count_parameters,
    dense_state_dict,
    frozen_of,
    mostly_dense,
    quantise_linears,
    quantised_layers,
    stack,
)
from loratune.precision.nf4 import Nf4Weight
from tests.conftest import build
from tests.fused.test_layer import FUSIBLE, loss_and_gradients, training
from tests.training.helpers import examples

TOKENS = torch.arange(2, 30)[None]


def quantised(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model with 4-bit layers, and everything else as it was."""
    model = build(name)
    quantise_linears(model, skip=[model.get_output_embeddings()])
    return model.to(dtype)


def densified(model: nn.Module) -> nn.Module:
    """The same model with ordinary layers that hold the dequantised weights."""
    other = type(model)(model.config).to(model.dtype).requires_grad_(False).eval()
    other.load_state_dict(dense_state_dict(model))
    return other


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_on_codes_is_an_adapter_on_their_values(name):
    """Same logits and the same gradients as over a dense base with the dequantised weights."""
    model = quantised(name)
    dense = densified(model)
    for base in (model, dense):
        attach(base, LoraConfig(r=4, init_lora_weights=False), name="a", seed=3)
    assert torch.equal(logits(model), logits(dense))
    gradients = []
    for base in (model, dense):
        base(TOKENS).logits.square().sum().backward()
        gradients.append({k: p.grad for k, p in base.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items())


def test_all_linear_names_quantised_layers_and_leaves_the_head():
    model = quantised("llama")
    done = attach(model, LoraConfig(r=4), name="a")
    assert len(done.ranks) == 14
    assert "lm_head" not in done.ranks
    assert done.total_parameters == count_parameters(build("llama")) + done.trainable_parameters


def test_merge_and_unmerge():
    """Merged equals base + adapter to rounding and is dense; unmerged are the very codes."""
    model = quantised("llama")
    bare = logits(model)
    before = {path: layer.frozen for path, layer in quantised_layers(model)}
    attach(model, LoraConfig(r=4, init_lora_weights=False), name="a")
    adapted = logits(model)
    merge(model, "a")
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), adapted)
    detach(model)
    assert torch.equal(logits(model), bare)
    assert all(type(layer) is QuantisedLinear and layer.frozen is before[p] for p, layer in quantised_layers(model))


@pytest.mark.parametrize(("name", "dropout"), [*((name, 0.0) for name in FUSIBLE), ("llama", 0.3)])
def test_fused_layers_take_codes(name, dropout):
    """Loss and gradients are those of the same fused layers over dense weights, in float64."""
    model = quantised(name, torch.float64)
    row = make_row(examples(7), 256, 0)
    results = []
    for base in (model, densified(model)):
        attach(base, LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False), name="a")
        forward = prepare(base)
        assert fuse(forward)
        training(base)
        with forward.state.dropout(row_key(dropout_key(0, 0))):
            results.append(loss_and_gradients(base, forward, row))
    (loss, gradients), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for path, gradient in expected.items():  # another order of summation at most, in float64
        torch.testing.assert_close(gradients[path], gradient, rtol=1e-9, atol=1e-12 * float(gradient.abs().max()))


def test_a_stack_is_made_once_and_held_once():
    """Members become parts of the stack, also those of the layers that an adapter replaces."""
    model = quantised("llama")
    attach(model, LoraConfig(r=4), name="a")
    attention = model.model.layers[0].self_attn
    members = [attention.q_proj, attention.k_proj, attention.v_proj]
    together = stack(members)
    assert stack(members) is together
    detach(model)
    storages = {attention.get_submodule(n).frozen.codes.untyped_storage().data_ptr() for n in ("q_proj", "k_proj")}
    assert storages == {together.codes.untyped_storage().data_ptr()}


def test_moving_and_copying_a_model():
    """The codes are never cast; a copy is a model of its own that shares them."""
    model = quantised("llama")
    codes = {path: layer.frozen.codes for path, layer in quantised_layers(model)}
    other = copy.deepcopy(model)
    other.to(torch.bfloat16)
    assert {layer.frozen.dtype for _, layer in quantised_layers(other)} == {torch.bfloat16}
    assert {layer.frozen.dtype for _, layer in quantised_layers(model)} == {torch.float32}
    for path, layer in quantised_layers(other):
        assert isinstance(layer.frozen, Nf4Weight)
        assert torch.equal(layer.frozen.codes, codes[path])
        assert layer.frozen.absmax.dtype == torch.uint8


def test_frozen_of_any_layer_is_what_it_multiplies_with():
    """(d_out, d_in), whatever the layer's own orientation."""
    model = build("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    assert frozen_of(layer).shape == (256, 64)
    assert torch.equal(frozen_of(layer).dense(), layer.weight.T)
    before = logits(model)
    quantise_linears(model, form=lambda weight: nf4.quantise(weight), skip=[model.get_output_embeddings()])
    assert frozen_of(model.transformer.h[0].mlp.c_fc).shape == (256, 64)
    # The nearest of 16 values is off by some 10 % of a weight; more would be another matrix.
    assert float((logits(model) - before).norm() / before.norm()) < 0.3


def test_a_model_that_stays_mostly_dense_is_reported():
    assert mostly_dense(quantised("llama")) is None
    assert mostly_dense(build("mixtral")) is None
    assert mostly_dense(quantised("mixtral")) is None
    model = quantised("llama")
    model.resize_token_embeddings(20_000)
    assert "embeddings and other tensors are not" in mostly_dense(model)


def test_switching_adapters_on_codes():
    model = quantised("llama")
    attach(model, LoraConfig(r=4, init_lora_weights=False), name="a", seed=1)
    with_a = logits(model)
    attach(model, LoraConfig(r=2, init_lora_weights=False), name="b", seed=2)
    activate(model, "a")
    assert torch.equal(logits(model), with_a)
