"""Soft caps and sinks on a CUDA device: as exact as the scores written out, the same bits each time, recorded steps.

Tolerance throughout: twice as far from float64 as the plain path in the same precision.
"""

from __future__ import annotations

import copy
import time

import pytest
import torch

from loratune.base.forward import PackedForward, prepare
from loratune.ops.attention.documents import document_attention
from tests.gpu.test_step_gpu import BF16, ROWS, TOKENS, a_row, assert_as_good, gradients, losses, off, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DIMS = {"gemma2": 256, "gptoss": 64}


def case(heads, softcap, with_sinks, tokens=TOKENS):
    """A function of boundaries, window and precision: the output of attention and three gradients."""
    torch.manual_seed(1)
    q = torch.randn(1, heads[0], tokens, heads[2], device="cuda", dtype=BF16)
    k, v = (torch.randn(1, heads[1], tokens, heads[2], device="cuda", dtype=BF16) for _ in "kv")
    sinks = torch.randn(heads[0], device="cuda", dtype=BF16) * 2 if with_sinks else None
    d_out = torch.randn(1, tokens, heads[0], heads[2], device="cuda", dtype=BF16)

    def run(dtype, cu_seqlens, longest, window):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        asked = {"softcap": softcap, "s_aux": sinks, "sliding_window": window}
        boundaries = {"cu_seq_lens_q": cu_seqlens, "max_length_q": longest}
        out, _ = document_attention(torch.nn.Module(), *inputs, None, **asked, **boundaries)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(dtype))]

    return run


KINDS = pytest.mark.parametrize(
    ("heads", "softcap", "with_sinks"),
    [
        ((8, 4, 256), 2.0, False),
        ((8, 2, 64), None, True),
        ((4, 1, 128), 2.0, True),
        ((4, 4, 80), 2.0, False),
    ],
    ids=["256, soft cap", "64, sinks", "128, both", "80, soft cap"],
)


@KINDS
@pytest.mark.parametrize("lengths", [(300, 17, 512, 1, 194), (256,) * 4, (1024,), (1000,)], ids=str)
def test_attention(heads, softcap, with_sinks, lengths):
    """One kernel for all boundaries and windows. Rows end in empty documents, as in a recording."""
    run = case(heads, softcap, with_sinks, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    padded = torch.cat([bounds, bounds[-1:].expand(3)]).cuda()
    for window in (None, 100):
        exact, plain = run(torch.float64, bounds, None, window), run(BF16, bounds, None, window)
        fast, again = (run(BF16, padded, 1024, window) for _ in range(2))
        print([f"{off(a, c) / off(b, c):.2f}" for a, b, c in zip(fast, plain, exact, strict=True)], end=" ")
        for a, b, c, d in zip(fast, plain, exact, again, strict=True):
            assert_as_good(a, b, c, window)
            assert torch.equal(a, d)


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("lengths", [(300, 17, 512, 1, 100), (1024,)], ids=str)
def test_a_packed_row_equals_its_documents_alone(name, lengths):
    model = small(name, dim=DIMS[name])
    forward, row = prepare(model), a_row(lengths)
    assert forward.path == "packed"
    assert not forward.notes
    wide = copy.deepcopy(model).double()
    if name == "gptoss":
        wide.set_experts_implementation("eager")  # the default has no float64
    fast = gradients(model, forward, row)
    plain = gradients(model, PackedForward(model, "per document", forward.head), row)
    exact = gradients(wide, PackedForward(wide, "per document", forward.head), row)
    ratios = [off(fast[1][path], gradient) / off(plain[1][path], gradient) for path, gradient in exact[1].items()]
    print(f"{off(fast[0], exact[0]) / off(plain[0], exact[0]):.2f}, gradients {min(ratios):.2f} to {max(ratios):.2f}")
    assert_as_good(fast[0], plain[0], exact[0], "log-probabilities")
    for path, gradient in exact[1].items():
        assert_as_good(fast[1][path], plain[1][path], gradient, path)


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_the_recorded_step_equals_the_eager_one_to_the_bit(name, micro_steps, monkeypatch):
    """Different boundaries in one recording; `losses` fails if a step cannot be recorded."""
    rows = [[row for (row,) in ROWS[i : i + micro_steps]] for i in range(0, 18, micro_steps)] * (
        1 if micro_steps == 1 else 2
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=name == "gptoss")  # the comparison of bits shows a violation
    try:
        eager, adapter, _ = losses(small(name, dim=DIMS[name]), False, rows)
        recorded, same, step = losses(small(name, dim=DIMS[name]), True, rows)
    finally:
        torch.use_deterministic_algorithms(False)
    assert any(graph is not None for graph in step._graphs.values())
    assert [r.loss for r in recorded] == [r.loss for r in eager]
    assert all(torch.equal(a, b) for a, b in zip(adapter, same, strict=True))


@pytest.mark.parametrize("tokens", [2048, 8192])
@KINDS
def test_it_is_faster_than_the_scores_written_out(heads, softcap, with_sinks, tokens):
    """Forward and backward of one layer with documents of 512 tokens; the reference reads boundaries on the host."""
    run = case(heads, softcap, with_sinks, tokens)
    bounds = torch.arange(0, tokens + 1, 512, dtype=torch.int32)

    def milliseconds(bounds, longest):
        run(BF16, bounds, longest, None)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            run(BF16, bounds, longest, None)
        torch.cuda.synchronize()
        return 100 * (time.perf_counter() - start)

    fast, plain = milliseconds(bounds.cuda(), 512), milliseconds(bounds, None)
    print(f"{fast:.2f} against {plain:.2f} ms", end=" ")
    assert fast < plain
