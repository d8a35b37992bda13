"""Exact match counts as a person would, and stores every answer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loratune.errors import DataError
from loratune.infer.evaluate import Evaluation, Loss, exact_match, normalised


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def parrot(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Repeats the last letter of the prompt forever: attention and MLP add nothing, and the head is the embedding."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(256))
        model.lm_head.weight.copy_(torch.eye(256))
    return model


def test_answers_are_compared_and_kept(tokenizer: PreTrainedTokenizerFast, parrot: LlamaForCausalLM) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in ("ab", "say c", "d")]
    result = exact_match(
        parrot, tokenizer, prompts, ["bbb", "ccx", " ddd\n"], stop_ids=(), max_new_tokens=3, batch_size=2
    )
    assert [(a.prompt, a.answer, a.ok) for a in result.answers] == [
        ("ab", "bbb", True),
        ("say c", "ccc", False),
        ("d", "ddd", True),
    ]
    assert (result.correct, result.share, result.new_tokens) == (2, 2 / 3, 9)
    assert [a.reference for a in result.wrong] == ["ccx"]


def test_a_right_answer_always_fits(tokenizer: PreTrainedTokenizerFast, parrot: LlamaForCausalLM) -> None:
    """Without max_new_tokens the limit allows the longest reference; an answer that never stops is wrong."""
    stop = tokenizer("z")["input_ids"]
    result = exact_match(parrot, tokenizer, [tokenizer("a")["input_ids"]], ["a" * 40], stop_ids=stop)
    assert len(result.answers[0].answer) >= 40


def test_only_white_space_is_forgiven() -> None:
    assert normalised("  a\tb \n\n c ") == normalised("a b c")
    for other in ("A b c", "a b c.", "ab c", "a b"):
        assert normalised(other) != normalised("a b c")


def test_mismatched_or_missing_references_are_refused(
    tokenizer: PreTrainedTokenizerFast, parrot: LlamaForCausalLM
) -> None:
    for prompts, references in (([], []), ([[1]], ["a", "b"])):
        with pytest.raises(DataError, match="reference for each prompt"):
            exact_match(parrot, tokenizer, prompts, references, stop_ids=())


def test_evaluation_as_json_is_json_for_any_loss() -> None:
    assert Loss(math.log(8), 10).perplexity == pytest.approx(8)
    diverged = Evaluation("x", Loss(1e4, 10), None).as_json()
    assert json.loads(json.dumps(diverged, allow_nan=False)) == {
        "name": "x", "loss": 1e4, "perplexity": None, "tokens": 10
    }  # fmt: skip
