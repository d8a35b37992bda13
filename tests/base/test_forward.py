"""Packed equals unpacked, for every architecture, on each execution path."""

from __future__ import annotations

import pytest
import torch

from loratune.base.forward import prepare
from tests.conftest import CAUSAL, build

LENGTHS = (3, 40, 1, 17, 9)  # very different, one of them a single token


def packed_row(vocabulary: int):
    tokens = torch.randint(vocabulary, (sum(LENGTHS),))
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return tokens, position_ids, cu_seqlens


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_logprobs_equal_each_document_alone(name):
    model = build(name)
    forward = prepare(model)
    tokens, position_ids, cu_seqlens = packed_row(300)
    predicting = torch.tensor([0, 1, 5, 20, 41, 44, 50, 60, 61, 68])
    targets = torch.randint(300, (len(predicting),))
    before = model.config._attn_implementation
    with forward.installed():
        got = forward.logprobs(tokens, position_ids, cu_seqlens, predicting, targets)
    assert model.config._attn_implementation == before

    logits = torch.cat([model(input_ids=d[None]).logits[0] for d in tokens.split(LENGTHS)])
    expected = logits.float().log_softmax(-1)[predicting, targets]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", "packed"), ("gemma2", "packed"), ("gptoss", "packed"), ("mamba", "packed")],
)
def test_takes_the_fastest_path_that_agrees(name, path):
    forward = prepare(build(name))
    assert forward.path == path
    assert bool(forward.notes) == (path == "padded batches")


@pytest.mark.parametrize(
    ("name", "scale", "softcap"), [("cohere", 0.0625, None), ("granite", 0.25, None), ("gemma2", 1.0, 3.0)]
)
def test_finds_scale_and_cap_behind_the_head(name, scale, softcap):
    head = prepare(build(name)).head
    assert head is not None
    assert (head.scale, head.softcap) == (scale, softcap)


def test_logits_of_another_formula_come_from_the_model(llama):
    """If logits are not head(hidden states), log-probabilities come from the model's own logits."""

    class Odd(type(llama)):
        def forward(self, **inputs):
            outputs = super().forward(**inputs)
            outputs.logits = outputs.logits + torch.linspace(0, 3, outputs.logits.shape[-1])
            return outputs

    odd = Odd(llama.config).eval().requires_grad_(False)
    forward = prepare(odd)
    assert forward.head is None
    assert "logits" in forward.notes[0]
    tokens, position_ids, cu_seqlens = packed_row(300)
    predicting, targets = torch.tensor([2, 30]), torch.tensor([7, 8])
    with forward.installed():
        got = forward.logprobs(tokens, position_ids, cu_seqlens, predicting, targets)
    logits = torch.cat([odd(input_ids=d[None]).logits[0] for d in tokens.split(LENGTHS)])
    torch.testing.assert_close(got, logits.log_softmax(-1)[predicting, targets], rtol=1e-5, atol=1e-5)


def test_capped_scores_get_an_attention_with_caps():
    """transformers 5.17 gives Gemma 2 an attention without caps. Other models are left alone."""
    model, other = build("gemma2"), build("llama")
    model.config._attn_implementation_internal = other.config._attn_implementation_internal = "sdpa"
    prepare(other)
    forward = prepare(model)
    assert other.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "eager"
    assert forward.path == "packed"


def test_two_models_in_one_process_do_not_see_each_other(llama):
    other = build("qwen3")
    forward = prepare(llama)
    tokens = torch.randint(300, (1, 12))
    expected = other(input_ids=tokens).logits
    with forward.installed():
        torch.testing.assert_close(other(input_ids=tokens).logits, expected, rtol=0, atol=0)
