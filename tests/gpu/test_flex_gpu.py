"""Soft caps and sinks on a CUDA device: as exact as the scores written out, and steps that record.

Tolerance throughout: twice as far from float64 as the plain path in the same precision.
"""

from __future__ import annotations

import copy

import pytest
import torch

from loratune.base.forward import PackedForward, prepare
from loratune.ops.attention import document_attention
from tests.gpu.test_step_gpu import BF16, ROWS, TOKENS, a_row, assert_as_good, gradients, losses, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DIMS = {"gemma2": 256, "gptoss": 64}


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """PyTorch keeps eight compilations of one function; those of other tests must not count."""
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("heads", "softcap", "with_sinks"),
    [((4, 1, 256), 2.0, False), ((8, 2, 64), None, True)],
    ids=["soft cap", "sinks"],
)
def test_attention(heads, softcap, with_sinks):
    """One kernel for all borders and windows; rows end in empty documents, as in a recording."""
    torch.manual_seed(1)
    q = torch.randn(1, heads[0], TOKENS, heads[2], device="cuda", dtype=BF16)
    k, v = (torch.randn(1, heads[1], TOKENS, heads[2], device="cuda", dtype=BF16) for _ in "kv")
    sinks = torch.randn(heads[0], device="cuda", dtype=BF16) * 2 if with_sinks else None
    d_out = torch.randn(1, TOKENS, heads[0], heads[2], device="cuda", dtype=BF16)

    def run(dtype, borders, longest, window):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        asked = {"softcap": softcap, "s_aux": sinks, "sliding_window": window}
        borders = {"cu_seq_lens_q": borders, "max_length_q": longest}
        out, _ = document_attention(torch.nn.Module(), *inputs, None, **asked, **borders)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(dtype))]

    for lengths in ((300, 17, 512, 1, 194), (256,) * 4, (1024,)):
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        padded = torch.cat([bounds, bounds[-1:].expand(3)]).cuda()
        for window in (None, 100):
            exact, plain = run(torch.float64, bounds, None, window), run(BF16, bounds, None, window)
            fast = run(BF16, padded, 1024, window)
            for a, b, c in zip(fast, plain, exact, strict=True):
                assert_as_good(a, b, c, (lengths, window))


@pytest.mark.parametrize("name", DIMS)
def test_a_packed_row_is_its_documents_alone(name):
    model = small(name, dim=DIMS[name])
    forward = prepare(model)
    assert forward.road == "documents"
    assert not forward.notes
    wide = copy.deepcopy(model).double()
    if name == "gptoss":
        wide.set_experts_implementation("eager")  # the other kind has no float64
    for row in (a_row((300, 17, 512, 1, 100)), a_row((1024,))):
        fast = gradients(model, forward, row)
        plain = gradients(model, PackedForward(model, "one by one", forward.head), row)
        exact = gradients(wide, PackedForward(wide, "one by one", forward.head), row)
        assert_as_good(fast[0], plain[0], exact[0], "log-probabilities")
        for path, gradient in exact[1].items():
            assert_as_good(fast[1][path], plain[1][path], gradient, path)


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("micro_steps", [1, 3])
def test_the_recorded_step_is_the_eager_one(name, micro_steps):
    """Different borders in one recording; `losses` fails where a step cannot be recorded."""
    rows = [[row for (row,) in ROWS[i : i + micro_steps]] for i in range(0, 18, micro_steps)]
    eager, _, _ = losses(small(name, dim=DIMS[name]), False, rows)
    recorded, _, step = losses(small(name, dim=DIMS[name]), True, rows)
    assert any(graph is not None for graph in step._graphs.values())
    # Kernels that add in no fixed order differ in last bits; wrong borders change such a loss by 6e-4 and more.
    assert [r.loss for r in recorded] == pytest.approx([r.loss for r in eager], rel=2e-4)
    assert [r.grad_norm for r in recorded] == pytest.approx([r.grad_norm for r in eager], rel=2e-2)
