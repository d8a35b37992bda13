"""Two models train at once in two threads of one process, and each gets the bits that it gets alone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from loratune.base.forward import PackedForward, fuse, prepare
from loratune.config import TrainConfig
from loratune.data.pack import make_row
from loratune.fused.policy import ActivationPlan, Level
from loratune.ops.dropout import dropout_key, row_key
from loratune.training.optim import adamw
from loratune.training.step import row_loss, train_step
from tests.training.helpers import examples, loss_and_gradients, model_with_adapter, trainable

SEEDS = (0, 1)
KINDS = ["modules", "fused", "recomputed"]


def forward_of(kind: str, seed: int, dropout: float = 0.3) -> PackedForward:
    """A small model in training whose adapter has dropout."""
    model = model_with_adapter("llama", seed, lora_dropout=dropout)
    forward = prepare(model)
    if kind == "fused":
        assert fuse(forward)
    if kind == "recomputed":
        forward.plan = ActivationPlan.uniform(Level.FULL, model.config.num_hidden_layers)
    for module in model.modules():
        module.training = hasattr(module, "lora_dropout")
    return forward


def trained(forward: PackedForward, seed: int, barrier: threading.Barrier | None = None) -> list[torch.Tensor]:
    """Losses of five steps, and the adapter afterwards. With a barrier, every step starts together with the other."""
    parameters = list(trainable(forward.model).values())
    optimizer = adamw(parameters, TrainConfig(learning_rate=1e-2))
    losses = []
    with forward.installed():
        for step in range(5):
            rows = [make_row(examples(5, seed=10 * seed + 2 * step + nth), 256, 0) for nth in range(2)]
            if barrier is not None:
                barrier.wait(60)
            result = train_step(forward, rows, parameters, optimizer, max_grad_norm=1.0, key=dropout_key(seed, step))
            losses.append(torch.tensor(result.loss))
    return losses + [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("kinds", [("modules", "modules"), ("fused", "fused"), ("recomputed", "fused")])
def test_two_models_in_two_threads_get_the_bits_of_each_alone(kinds):
    alone = [trained(forward_of(kind, seed), seed) for kind, seed in zip(kinds, SEEDS, strict=True)]
    barrier, together = threading.Barrier(2), [list[torch.Tensor](), list[torch.Tensor]()]
    forwards = [forward_of(kind, seed) for kind, seed in zip(kinds, SEEDS, strict=True)]
    threads = [
        threading.Thread(target=lambda nth=nth: together[nth].extend(trained(forwards[nth], SEEDS[nth], barrier)))
        for nth in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other)
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_never_draws_by_the_key_of_another(kind):
    """The key of one forward is set while the other runs: its dropout still follows its own key."""
    ours, theirs = forward_of(kind, 0), forward_of(kind, 1)
    row = make_row(examples(5), 256, 0)
    key, other = row_key(dropout_key(0, 0)), row_key(dropout_key(9, 9))
    with ours.state.dropout(key):
        expected = loss_and_gradients(ours.model, ours, row)
        with theirs.state.dropout(other):
            got = loss_and_gradients(ours.model, ours, row)
    assert torch.equal(expected[0], got[0])
    assert all(torch.equal(gradient, got[1][path]) for path, gradient in expected[1].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_behind_the_key_drops_the_same_elements(kind):
    """Layers that run again in the backward use the key of their forward, though another one is set by then."""
    forward = forward_of(kind, 0)
    row, key = make_row(examples(5), 256, 0), row_key(dropout_key(0, 0))
    with forward.state.dropout(key):
        expected = loss_and_gradients(forward.model, forward, row)
    with forward.installed():
        with forward.state.dropout(key):
            loss = row_loss(forward, row)
        with forward.state.dropout(row_key(dropout_key(7, 7))):
            loss.backward()
    assert all(torch.equal(p.grad, expected[1][path]) for path, p in trainable(forward.model).items())


def test_adapter_layers_have_a_state_of_their_own_outside_of_the_forward():
    forward = forward_of("modules", 0)
    layers = [module for module in forward.model.modules() if hasattr(module, "lora_A")]
    own = [layer.state for layer in layers]
    assert len(set(map(id, [*own, forward.state]))) == len(layers) + 1 > 1
    with forward.installed():
        assert all(layer.state is forward.state for layer in layers)
        twin = copy.deepcopy(forward.model)
    assert all(layer.state is before for layer, before in zip(layers, own, strict=True))
    states = [module.state for module in twin.modules() if hasattr(module, "lora_A")]
    assert forward.state not in states  # a copied model trains by itself
