"""FlashAttention 4 on a Hopper GPU, against float64 and PyTorch's own kernels; skipped where it is not installed."""

from __future__ import annotations

import pytest
import torch

from loratune.ops.attention import documents as attention
from loratune.ops.attention import flash
from loratune.ops.attention.capped import DocumentSpans
from loratune.ops.attention.documents import document_attention
from loratune.ops.attention.recorded import RecordedAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and flash.fits(torch.device("cuda"), 128)),
        reason="needs Hopper and flash-attn-4",
    ),
]
BF16 = torch.bfloat16
EVEN, UNEVEN = [256] * 4, [1, 700, 64, 130, 129]
"""Lengths of 1,024 tokens."""


def heads_of(heads, kv_heads, dim, dtype=BF16):
    """Query, key and value of 1,024 tokens as a fused layer has them: stacked, the row's tokens outermost."""
    torch.manual_seed(0)
    stacked = torch.randn(1024, heads + 2 * kv_heads, dim, device="cuda", dtype=dtype)
    split = stacked.split([heads, kv_heads, kv_heads], 1)
    return [tensor.transpose(0, 1)[None].detach().requires_grad_() for tensor in split]


def run(q, k, v, lengths, window, incoming, empty=0, trials=None):
    """Output and the three gradients; with FlashAttention 4 if `trials` of a forward are given."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    cu_seqlens = torch.tensor([0, *ends, *[ends[-1]] * empty], dtype=torch.int32, device="cuda")
    kernel = {} if q.dtype == torch.float64 else {"max_length_q": max(lengths)}
    kernel |= {"cu_seq_lens_q": cu_seqlens, "spans": DocumentSpans(cu_seqlens, trials)}
    out, _ = document_attention(None, q, k, v, None, sliding_window=window, **kernel)
    return [out, *torch.autograd.grad(out, (q, k, v), incoming.to(out.dtype))]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 128), (8, 2, 64), (4, 2, 256), (6, 3, 96), (3, 1, 40)])
@pytest.mark.parametrize(("lengths", "empty"), [(EVEN, 0), (UNEVEN, 0), (UNEVEN, 3), ([1024], 0)])
def test_no_farther_from_float64_than_pytorchs_kernels(heads, kv_heads, dim, lengths, empty, window):
    qkv = heads_of(heads, kv_heads, dim)
    incoming = torch.randn(1, 1024, heads, dim, device="cuda", dtype=BF16)
    exact = run(*(tensor.detach().double().requires_grad_() for tensor in qkv), lengths, window, incoming)
    got = run(*qkv, lengths, window, incoming, empty, flash.FlashTrials())
    plain = run(*qkv, lengths, window, incoming, empty)
    for fast, slow, right in zip(got, plain, exact, strict=True):
        error, allowed = ((tensor.double() - right).norm() / right.norm() for tensor in (fast, slow))
        assert error <= 1.2 * allowed, (float(error), float(allowed))


def test_deterministic_algorithms_give_the_same_bits():
    qkv = heads_of(8, 2, 128)
    incoming, trials = torch.randn(1, 1024, 8, 128, device="cuda", dtype=BF16), flash.FlashTrials()
    torch.use_deterministic_algorithms(True)
    try:
        for lengths in (EVEN, UNEVEN):
            first = run(*qkv, lengths, None, incoming, trials=trials)
            for _ in range(5):
                again = run(*qkv, lengths, None, incoming, trials=trials)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("documents", [5, 400])
def test_a_recording_is_replayed_with_other_boundaries(documents):
    """Each replay against the same row run kernel by kernel. Many documents take another path in the kernel."""
    heads = torch.randn(1024, 12, 128, device="cuda", dtype=BF16)
    incoming = torch.randn(1024, 8 * 128, device="cuda", dtype=BF16)

    def boundaries(seed):
        torch.manual_seed(seed)
        inner = torch.randperm(1023)[: documents - 1].sort().values + 1
        return torch.tensor([0, *inner.tolist(), 1024], dtype=torch.int32, device="cuda")

    def attend(q, k, v):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return flash.attend(q, k, v, 0.1, None, cu_seqlens, 1024)[0].flatten(1)

    def work():
        attended = RecordedAttention(attend, heads, [8, 2, 2])
        return [attended.out, *attended.backward(incoming)]

    cu_seqlens = boundaries(0)
    torch.use_deterministic_algorithms(True)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = work()
        found = []
        for seed in (1, 2, 3):
            cu_seqlens.copy_(boundaries(seed))
            graph.replay()
            found.append([tensor.clone() for tensor in recorded])
            assert all(torch.equal(a, b) for a, b in zip(found[-1], work(), strict=True)), seed
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (32, 8, 64), (8, 4, 256)])
def test_its_trial_passes_and_that_of_a_wrong_head_size_fails(monkeypatch, heads, kv_heads, dim):
    trials, (query, key, _) = flash.FlashTrials(), heads_of(heads, kv_heads, dim)
    assert trials.usable(query, key, attention._pytorch)
    assert not trials.why_not(query.device)
    monkeypatch.setattr(flash, "fits", lambda *_: True)
    query, key, _ = heads_of(3, 1, 40)
    assert not trials.usable(query, key, attention._pytorch)
    assert len(trials.why_not(query.device)) == 1


def test_attention_uses_it(monkeypatch):
    qkv = heads_of(4, 2, 64)
    incoming = torch.randn(1, 1024, 4, 64, device="cuda", dtype=BF16)
    trials, asked = flash.FlashTrials(), []
    first = run(*qkv, UNEVEN, None, incoming, trials=trials)  # the trial has run now
    monkeypatch.setattr(flash, "attend", lambda *given, real=flash.attend: asked.append(given[4]) or real(*given))
    run(*qkv, EVEN, 100, incoming, trials=trials)
    again = run(*qkv, UNEVEN, None, incoming, trials=trials)
    assert asked == [100, None]
    assert torch.equal(first[0], again[0])
