"""Soft caps and sinks: the kernels in Triton's interpreter against one masked product, and small models of both.

Triton selects its interpreter when kernels are defined, so these programs run in a process of their own.
"""

from __future__ import annotations

import pytest
import torch

from loratune.ops.attention.capped import DocumentSpans
from loratune.ops.attention.documents import document_attention
from tests.ops.twins import compare, needs_triton

COMPARE = """
import torch
from loratune.ops.attention.documents import explicit
from loratune.ops.attention.capped import DocumentSpans, attend
from tests.ops.attention.test_documents import masked_product

torch.manual_seed(0)
SHORT = [0, 1, 7, 20, 26]
LONG = [0, 3, 66, 129, 129, 190, 190]  # a boundary just after a block; empty documents, as in recordings

def off(got, exact):
    return float((got.detach().double() - exact).norm() / exact.norm())

def results(function, inputs, d_out):
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]

def row(tokens, heads, shared, dim):
    stacked = torch.randn(tokens, heads + 2 * shared, dim)  # views of stacked heads, as fused layers pass them
    return [part.transpose(0, 1)[None] for part in stacked.split([heads, shared, shared], 1)]

def cast(inputs, dtype):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]

def compare(bounds, heads, shared, dim, window, softcap, with_sinks):
    inputs, d_out = row(bounds[-1], heads, shared, dim), torch.randn(1, bounds[-1], heads, dim)
    sinks = torch.randn(heads) if with_sinks else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

    def ours(*parts):
        return attend(*parts, 0.3, window, softcap, sinks, DocumentSpans(cu_seqlens))

    def written_out(*parts):
        wide = parts[0], *(part.repeat_interleave(heads // shared, 1) for part in parts[1:])
        lengths = cu_seqlens.diff().tolist()
        documents = zip(*(part.split(lengths, 2) for part in wide))
        return torch.cat([explicit(*d, 0.3, 0.0, window, softcap, sinks) for d in documents], 2).transpose(1, 2)

    def exactly(*parts):
        return masked_product(*parts, 0.3, window, softcap, None if sinks is None else sinks.double(), bounds)

    exact = results(exactly, cast(inputs, torch.float64), d_out.double())
    # Float32 is exact to a few hundred roundings of 6e-8, so a wrong formula shows.
    assert all(off(a, b) < 1e-5 for a, b in zip(results(ours, cast(inputs, torch.float32), d_out), exact)), locals()
    halves = cast(inputs, torch.float16)  # the interpreter has no products in bfloat16
    exact = results(exactly, cast(halves, torch.float64), d_out.half().double())
    plain, fast, again = (results(f, halves, d_out) for f in (written_out, ours, ours))
    for a, b, c, d in zip(fast, plain, exact, again):
        assert a.dtype == torch.float16 and off(a, c) <= 2 * off(b, c) + 1e-4, (off(a, c), off(b, c), locals())
        assert torch.equal(a, d)

for kind in ((1.5, False), (None, True)):
    for window in (None, 100):
        compare(LONG, 4, 2, 64, window, *kind)
compare(LONG, 4, 1, 128, 100, 2.0, False)  # the head sizes of both models, and one that is no power of two
compare(LONG, 2, 1, 256, 100, 2.0, True)
compare(SHORT, 3, 3, 24, None, 1.5, True)
compare(SHORT, 2, 1, 8, 5, None, False)
"""

MODELS = """
import torch
import transformers as tf
from loratune.base.forward import PackedForward, prepare
from loratune.config import LoraConfig
from loratune.lora.inject import attach
from loratune.ops.attention import documents as attention, capped_kernels
from loratune.fused.policy import Level, ActivationPlan
from tests.base.test_forward import packed_row
from tests.conftest import SMALL

attention._has_kernel = lambda *_: True
runs = []
kernel = capped_kernels.forward
capped_kernels.forward = lambda *given: (runs.append(0), kernel(*given))[1]

# Large weights, so that caps, sinks and windows matter; the scaling is not 1/sqrt(head_dim).
wild = SMALL | {"initializer_range": 0.2, "head_dim": 16, "sliding_window": 5, "attn_implementation": "eager"}
torch.manual_seed(0)
models = {
    "gemma2": tf.Gemma2ForCausalLM(tf.Gemma2Config(**wild, attn_logit_softcapping=0.5, query_pre_attn_scalar=64)),
    "gptoss": tf.GptOssForCausalLM(tf.GptOssConfig(**wild, num_local_experts=2, num_experts_per_tok=2)),
}
for name, model in models.items():
    model.requires_grad_(False).eval()
    attach(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), name="default", seed=0)
    for path, parameter in model.named_parameters():
        if path.endswith("lora_B"):
            parameter.data.normal_(0.0, 0.1)
        if path.endswith("sinks"):
            parameter.data.normal_(1.0, 1.0)
    adapter = {path: p for path, p in model.named_parameters() if p.requires_grad}
    tokens, position_ids, cu_seqlens = packed_row(300)
    predicting, targets = torch.arange(0, 69, 3), torch.randint(300, (23,))

    def results(forward):
        with forward.installed():
            logprobs = forward.logprobs(tokens, position_ids, cu_seqlens, predicting, targets)
            before = len(runs)
            gradients = torch.autograd.grad(logprobs.sum(), adapter.values())
        return before, len(runs) - before, [logprobs.detach(), *gradients]

    forward = prepare(model)
    assert forward.path == "packed", forward
    runs.clear()
    _, again, packed = results(forward)
    assert (len(runs), again) == (2, 0), name  # one in each layer
    runs.clear()
    alone = results(PackedForward(model, "per document", forward.head))[2]
    assert not runs
    for a, b in zip(packed, alone):
        assert float((a - b).norm() / b.norm()) < 1e-4, name  # roundings of float32 through a deep, steep function
    for level, repeated in ((Level.SELECTIVE, 0), (Level.FULL, 2)):
        forward.plan = ActivationPlan.uniform(level, 2)
        _, again, same = results(forward)
        assert again == repeated, (name, level, again)
        assert all(torch.equal(a, b) for a, b in zip(packed, same)), (name, level)
"""


@needs_triton
@pytest.mark.parametrize("program", [COMPARE, MODELS], ids=["against one masked product", "whole models"])
def test_in_the_interpreter(program):
    compare(program)


def test_spans_are_the_start_and_end_of_documents():
    bounds = torch.tensor([0, 1, 4, 4, 6, 6], dtype=torch.int32)
    spans = DocumentSpans(bounds)
    assert spans.table(6).tolist() == [[0, 1, 1, 1, 4, 4], [1, 4, 4, 4, 6, 6]]
    assert spans.table(6) is spans.table(6)  # layers share it


def test_sinks_that_train_get_their_gradient(monkeypatch):
    """The kernels compute none, so the reference runs."""
    monkeypatch.setattr("loratune.ops.attention.documents._has_kernel", lambda *_: True)
    q, sinks = torch.randn(1, 2, 5, 8), torch.zeros(2, requires_grad=True)
    boundaries = {"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32), "max_length_q": 3}
    out, _ = document_attention(None, q, q, q, None, s_aux=sinks, **boundaries)
    assert torch.autograd.grad(out.sum(), sinks)[0].ne(0).all()
