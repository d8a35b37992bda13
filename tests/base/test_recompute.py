"""Layers that are recomputed in the backward give the same bits, with dropout too, and save less."""

from __future__ import annotations

import pytest
import torch

from loratune.base.forward import prepare
from loratune.data.pack import make_row
from loratune.fused.policy import ActivationPlan, Level
from loratune.fused.recipes import decoder_layers
from loratune.training.step import row_loss
from tests.conftest import CAUSAL
from tests.training.helpers import examples, model_with_adapter, trainable


def loss_and_gradients(model, forward, level):
    layers = len(decoder_layers(model))
    forward.plan = None if level is None else ActivationPlan.uniform(level, layers)
    row = make_row(examples(7), 200, 0)
    with forward.installed():
        torch.manual_seed(5)
        loss = row_loss(forward, row)
        loss.backward()
    found = {path: p.grad for path, p in trainable(model).items() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return loss.detach(), found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_gradients_are_the_same_to_the_bit(name, dropout):
    model = model_with_adapter(name, lora_dropout=dropout)
    forward = prepare(model)
    for module in model.modules():
        module.training = getattr(module, "lora_A", None) is not None  # as the loop has it
    loss, gradients = loss_and_gradients(model, forward, None)
    assert gradients
    for level in (Level.SELECTIVE, Level.FULL, Level.OFFLOAD):
        again = loss_and_gradients(model, forward, level)
        assert torch.equal(again[0], loss), level
        assert again[1].keys() == gradients.keys()
        assert all(torch.equal(again[1][path], gradients[path]) for path in gradients), level


def test_less_is_saved_for_the_backward():
    """Counts the tensors that autograd saves outside of the recomputed layers."""
    model = model_with_adapter("gemma2")
    forward = prepare(model)
    row = make_row(examples(7), 200, 0)
    counts = {}
    for level in (Level.NONE, Level.FULL):
        forward.plan = ActivationPlan.uniform(level, 2)
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with forward.installed(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = row_loss(forward, row)
        counts[level] = sum(held.values())
        del loss
    assert counts[Level.FULL] < 0.5 * counts[Level.NONE]
