"""One optimizer step: packed = unpacked, k micro-steps = one step, and a bad gradient changes nothing."""

from __future__ import annotations

import pytest
import torch

from loratune.base.forward import prepare
from loratune.data.pack import make_row
from loratune.training.optim import adamw
from loratune.training.step import evaluate_loss, row_loss, train_step
from tests.conftest import CAUSAL
from tests.training.helpers import NaN, config, examples, model_with_adapter, trainable


def gradients(model, rows):
    """Loss and gradients of one step, before the update."""
    parameters = trainable(model)
    forward = prepare(model)
    seen = {}

    class Recorder:
        def clipped_step(self, max_norm, outcome):
            seen.update({path: p.grad.clone() for path, p in parameters.items() if p.grad is not None})

    with forward.installed():
        result = train_step(forward, rows, list(parameters.values()), Recorder(), max_grad_norm=0)
    return result, seen


def assert_same(a, b, tolerance=1e-5):
    (result_a, grads_a), (result_b, grads_b) = a, b
    assert result_a.loss == pytest.approx(result_b.loss, rel=tolerance)
    assert result_a.trained_tokens == result_b.trained_tokens
    assert grads_a.keys() == grads_b.keys()
    scale = max(float(g.abs().max()) for g in grads_b.values())
    for path, grad in grads_a.items():
        torch.testing.assert_close(grad, grads_b[path], rtol=tolerance, atol=tolerance * scale, msg=path)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "gptoss", "mamba"])
def test_packed_equals_unpacked(name):
    """One row of many documents, and one row for each document: the same loss and gradients."""
    targets = {"gptoss": ["q_proj", "v_proj"]}.get(name, "all-linear")
    model = model_with_adapter(name, target_modules=targets)
    documents = examples(9)
    packed = [make_row(documents, sum(map(len, documents)) + 5, 0)]
    alone = [make_row([document], len(document), 0) for document in documents]
    assert_same(gradients(model, packed), gradients(model, alone))


def test_packed_equals_a_loop_with_transformers_alone():
    """Against transformers' own loss, document by document, with labels masked the usual way."""
    model = model_with_adapter("llama")
    documents = examples(6)
    _, got = gradients(model, [make_row(documents, 256, 0)])
    total, weight = 0.0, 0.0
    for document in documents:
        tokens = torch.from_numpy(document.token_ids).long()[None]
        labels = tokens.masked_fill(torch.from_numpy(document.weights)[None] == 0, -100)
        count = int((labels[:, 1:] != -100).sum())
        if count:
            total = total + model(input_ids=tokens, labels=labels).loss * count
            weight += count
    (total / weight).backward()
    for path, parameter in trainable(model).items():
        torch.testing.assert_close(got[path], parameter.grad, rtol=1e-4, atol=1e-6, msg=path)


def test_micro_steps_equal_one_step():
    """Even if trained tokens are spread unevenly over the rows."""
    model = model_with_adapter("llama")
    documents = examples(12)
    one = [make_row(documents, sum(map(len, documents)), 0)]
    thirds = [make_row(documents[:1], 64, 0), make_row(documents[1:4], 200, 0), make_row(documents[4:], 600, 0)]
    assert_same(gradients(model, one), gradients(model, thirds))


def test_weights_scale_the_loss_of_their_tokens():
    """A token of weight 2 counts like the same document given twice; weight 0 like leaving the token out."""
    model = model_with_adapter("llama")
    first, second = examples(2, seed=5)
    double = type(first)(first.token_ids, first.weights * 2, "x")
    a = gradients(model, [make_row([double, second], 128, 0)])
    b = gradients(model, [make_row([first, first, second], 128, 0)])
    assert a[0].loss == pytest.approx(b[0].loss, rel=1e-5)
    for path in a[1]:
        torch.testing.assert_close(a[1][path], b[1][path], rtol=1e-4, atol=1e-6)


def test_clipping_is_by_global_norm():
    model = model_with_adapter("llama")
    row = make_row(examples(4), 200, 0)
    parameters = trainable(model)
    forward = prepare(model)
    settings = config()
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    before = {path: p.detach().clone() for path, p in parameters.items()}
    with forward.installed():
        result = train_step(forward, [row], list(parameters.values()), optimizer, max_grad_norm=1e-3)
    moved = torch.cat([(p.detach() - before[path]).flatten() for path, p in parameters.items()])
    assert result.grad_norm > 1e-3
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert settings.max_grad_norm == 1.0


def test_a_non_finite_gradient_changes_nothing():
    model = model_with_adapter("llama")
    parameters = trainable(model)
    optimizer = adamw(parameters.values(), config())
    forward = prepare(model)
    row = make_row(examples(4), 200, 0)
    with forward.installed():
        train_step(forward, [row], list(parameters.values()), optimizer, max_grad_norm=1.0)
        before = {path: p.detach().clone() for path, p in parameters.items()}
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        result = train_step(
            forward,
            [row],
            list(parameters.values()),
            optimizer,
            max_grad_norm=1.0,
            objective=NaN(),
        )
    assert result.skipped
    for path, p in parameters.items():
        assert torch.equal(p, before[path])
        assert p.grad is None
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state[p].items())


def test_nothing_below_the_first_adapter_gets_a_gradient():
    """With adapters in the last layer only, the autograd graph begins there."""
    model = model_with_adapter("llama", layers_to_transform=[1])
    forward, reached = prepare(model), []
    model.model.layers[0].register_full_backward_hook(lambda *_: reached.append(0))
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: reached.append(1))
    with forward.installed():
        row_loss(forward, make_row(examples(4), 200, 0)).backward()
    assert reached == [1]


def test_evaluate_loss_is_the_mean_over_trained_tokens():
    model = model_with_adapter("llama")
    forward = prepare(model)
    documents = examples(7)
    with forward.installed():
        packed, tokens, metrics = evaluate_loss(forward, [make_row(documents, 400, 0)])
        alone = [evaluate_loss(forward, [make_row([d], 64, 0)]) for d in documents]
    assert tokens == sum(n for _, n, _ in alone)
    assert packed == pytest.approx(sum(loss * n for loss, n, _ in alone if n) / tokens, rel=1e-5)
    assert metrics == {}


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_every_architecture_trains(name):
    """A few steps on a repeating pattern lower the loss, for every architecture."""
    model = model_with_adapter(name, target_modules="all-linear")
    parameters = trainable(model)
    optimizer = adamw(parameters.values(), config(learning_rate=5e-3))
    forward = prepare(model)
    documents = examples(5, seed=1)
    row = make_row(documents, sum(map(len, documents)), 0)
    with forward.installed():
        trained = list(parameters.values())
        losses = [train_step(forward, [row], trained, optimizer, max_grad_norm=1.0).loss for _ in range(10)]
    assert losses[-1] < losses[0] - 0.05
