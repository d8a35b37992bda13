"""The step that a GPU records equals `train_step`; tests/gpu tests the recording itself."""

from __future__ import annotations

import pytest
import torch

from loratune.base.forward import fuse, prepare
from loratune.data.pack import make_row
from loratune.ops.dropout import dropout_key
from loratune.training.graph import GraphStep
from loratune.training.optim import JointAdamW, adamw
from loratune.training.step import train_step
from tests.training.helpers import NaN, config, examples, model_with_adapter, trainable


def run(rows_of_steps, graph, name="llama", joint=False, fused=False, **lora):
    model = model_with_adapter(name, dtype=torch.float64, **lora)
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    if joint:  # as on a GPU
        optimizer = JointAdamW(
            parameters, **{k: optimizer.defaults[k] for k in ("lr", "betas", "eps", "weight_decay")}
        )
    forward = prepare(model)
    assert not fused or fuse(forward)
    for module in model.modules():
        module.training = getattr(module, "lora_dropout", 0.0) > 0.0
    step = GraphStep(forward, parameters, optimizer, 0.05, record=False)
    with forward.installed():
        results = [
            step(rows, key=dropout_key(3, n))
            if graph
            else train_step(forward, rows, parameters, optimizer, max_grad_norm=0.05, key=dropout_key(3, n))
            for n, rows in enumerate(rows_of_steps)
        ]
    return results, [p.detach().clone() for p in parameters]


def assert_same(a, b, atol=1e-8):
    for x, y in zip(a[0], b[0], strict=True):
        assert x.loss == pytest.approx(y.loss, rel=1e-6)
        assert x.grad_norm == pytest.approx(y.grad_norm, rel=1e-6)
        assert (x.trained_tokens, x.skipped) == (y.trained_tokens, y.skipped)
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_equals_train_step(micro_steps, name):
    """Rows with different boundaries and different numbers of trained tokens, with clipping at work."""
    rows = [[make_row(examples(1 + n + m, seed=n), 256, 0) for m in range(micro_steps)] for n in range(4)]
    assert_same(run(rows, True, name), run(rows, False, name))


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_equals_train_step_in_modules_and_fused_layers(micro_steps, name):
    """One stream of dropout for all execution paths, with a separate key for each step and row."""
    rows = [[make_row(examples(3), 256, 0)] * micro_steps] * 3
    expected = run(rows, False, name, lora_dropout=0.3)
    assert_same(run(rows, True, name, lora_dropout=0.3), expected)
    if name == "llama":  # the modules' norms are in float32, and AdamW divides by the gradient; a step is 5e-3
        assert_same(run(rows, True, name, fused=True, lora_dropout=0.3), expected, atol=1e-6)
        assert_same(run(rows, False, name, fused=True, lora_dropout=0.3), expected, atol=1e-6)


def test_dropout_differs_between_steps_and_micro_steps():
    row = make_row(examples(3), 256, 0)
    model = model_with_adapter("llama", dtype=torch.float64, lora_dropout=0.3)
    forward, parameters = prepare(model), list(trainable(model).values())
    assert fuse(forward)
    for module in model.modules():
        module.training = hasattr(module, "lora_dropout")
    no_update = torch.optim.SGD(parameters, lr=0.0)

    def losses(rows, keys):
        with forward.installed():
            return [train_step(forward, rows, parameters, no_update, max_grad_norm=0.0, key=key).loss for key in keys]

    first, other, again = losses([row], (1, 2, 1))
    assert first == again != other
    assert losses([row, row], (1,))[0] != pytest.approx(first, rel=1e-9)  # the second row has its own masks


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_the_joint_update_changes_nothing(micro_steps):
    rows = [[make_row(examples(1 + n + m, seed=n), 256, 0) for m in range(micro_steps)] for n in range(4)]
    assert_same(run(rows, True, joint=True), run(rows, False))


def test_a_row_of_equal_documents():
    document = next(e for e in examples(9) if len(e) == 47)
    rows = [[make_row([document] * 3, 141, 0)], [make_row([document] * 2, 141, 0)]]
    assert_same(run(rows, True), run(rows, False))


def test_a_non_finite_gradient_changes_nothing():
    model = model_with_adapter("llama")
    parameters = list(trainable(model).values())
    optimizer = adamw(parameters, config())
    forward = prepare(model)
    bad = GraphStep(forward, parameters, optimizer, 1.0, NaN(), record=False)
    good = GraphStep(forward, parameters, optimizer, 1.0, record=False)
    rows = [make_row(examples(4), 200, 0)]
    with forward.installed():
        assert not good(rows).skipped
        before = [p.detach().clone() for p in parameters]
        state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        assert bad(rows).skipped
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
        assert all(torch.equal(optimizer.state[parameter][k], v) for k, v in state[parameter].items())


@pytest.mark.parametrize("micro_steps", [1, 2])
def test_rows_prepared_ahead_change_nothing(micro_steps):
    """Announced rows that come, that do not come, or of another length: each step computes the given rows."""
    rows = [[make_row(examples(1 + n + m, seed=n), 256, 0) for m in range(micro_steps)] for n in range(5)]
    rows.append([make_row(examples(4, seed=m), 200, 0) for m in range(micro_steps)])
    announced = [rows[1], rows[4], (), rows[4], rows[5], ()]

    def run_announcing(ahead):
        model = model_with_adapter("llama", dtype=torch.float64)
        parameters = list(trainable(model).values())
        step = GraphStep(prepare(model), parameters, adamw(parameters, config()), 0.05, record=False)
        with step._forward.installed():
            return [step(now, later) for now, later in zip(rows, ahead, strict=True)], parameters

    plain, announcing = run_announcing([()] * 6), run_announcing(announced)
    assert plain[0] == announcing[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], announcing[1], strict=True))
