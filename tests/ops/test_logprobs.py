"""Log-probabilities in chunks against the textbook formula, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loratune.ops import logprobs as module
from loratune.ops.logprobs import token_logprobs

N, D, V = 23, 12, 41


def textbook(hidden, head, targets, scale, softcap):
    logits = head(hidden) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.fixture
def case():
    head = nn.Linear(D, V, bias=True, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return hidden, head, torch.randint(V, (N,))


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (0.5, 0.7)])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_equals_the_textbook(case, monkeypatch, chunk_tokens, scale, softcap, trainable_head):
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS", chunk_tokens * V)
    hidden, head, targets = case
    head.requires_grad_(trainable_head)
    incoming = torch.randn(N, dtype=torch.float64)  # any objective: an arbitrary gradient per token

    got = token_logprobs(hidden, head, targets, scale=scale, softcap=softcap)
    expected = textbook(hidden, head, targets, scale, softcap)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    wanted = [hidden, *(head.parameters() if trainable_head else ())]
    got_grads = torch.autograd.grad(got, wanted, incoming)
    expected_grads = torch.autograd.grad(expected, wanted, incoming)
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bf16_is_as_good_as_autograd_in_bf16(case):
    """The error against float64 is at most twice that of the plain formula in the same precision."""
    hidden, head, targets = case
    expected = textbook(hidden, head, targets, 1.0, None)
    (exact,) = torch.autograd.grad(expected.sum(), hidden)

    low_head = nn.Linear(D, V, dtype=torch.bfloat16).requires_grad_(False)
    low_head.load_state_dict(head.state_dict())
    errors = []
    for function in (
        lambda h: token_logprobs(h, low_head, targets),
        lambda h: textbook(h, low_head, targets, 1.0, None),
    ):
        low = hidden.detach().bfloat16().requires_grad_()
        (grad,) = torch.autograd.grad(function(low).sum(), low)
        errors.append(float((grad.double() - exact).norm() / exact.norm()))
    assert errors[0] <= 2 * errors[1]


def test_without_autograd_no_gradient_is_computed(case):
    hidden, head, targets = case
    with torch.no_grad():
        got = token_logprobs(hidden, head, targets)
    assert not got.requires_grad
