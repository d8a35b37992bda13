"""Attention by document against one explicit masked product over the whole row."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.attention.documents import document_attention

HEADS, KV_HEADS, DIM = 4, 2, 8
BOUNDS = [0, 1, 7, 20, 26]


def masked_product(q, k, v, scaling, window, softcap, sinks, bounds=BOUNDS):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    position = torch.arange(q.shape[2])
    document = torch.bucketize(position, torch.tensor(bounds[1:]), right=True)
    distance = position[:, None] - position[None, :]
    visible = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_equals_one_masked_product(window, softcap, with_sinks):
    q = torch.randn(1, HEADS, BOUNDS[-1], DIM, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, KV_HEADS, BOUNDS[-1], DIM, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, KV_HEADS, BOUNDS[-1], DIM, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(HEADS, dtype=torch.float64) if with_sinks else None
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    got, weights = document_attention(
        None,
        q,
        k,
        v,
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
        cu_seq_lens_q=cu_seqlens,
    )
    expected = masked_product(q, k, v, 0.3, window, softcap, sinks)
    assert weights is None
    # Explicit attention has its softmax in float32, hence 1e-6; PyTorch's kernel stays in float64.
    tolerance = 1e-6 if softcap or with_sinks else 1e-12
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    incoming = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), incoming), torch.autograd.grad(expected, (q, k, v), incoming), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_unsupported_arguments_are_refused():
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(NotImplementedError):
        document_attention(None, x, x, x, None)
    with pytest.raises(NotImplementedError):
        document_attention(
            None, x, x, x, None, cu_seq_lens_q=torch.tensor([0, 3]), position_bias=torch.zeros(1, 1, 3, 3)
        )
