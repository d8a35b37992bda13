"""Cached steps behind windows, masks and frequencies that change with the length of a text."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from loratune.infer import cache_trial
from loratune.infer.decoding import CacheLimits
from loratune.infer.engine import generate, stream

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.8,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}
CONFIGS = {
    "doge": lambda: tf.DogeConfig(**HEADS, keep_window_size=16),
    "moshi": lambda: tf.MoshiConfig(**HEADS | {"ffn_dim": 96}, sliding_window=16),
    "phi3": lambda: tf.Phi3Config(
        **HEADS, pad_token_id=0, eos_token_id=1, original_max_position_embeddings=20, rope_parameters=LONGROPE
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **HEADS, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "llama": lambda: tf.LlamaConfig(**HEADS),
}
EXPECTED = {
    "doge": CacheLimits((), 16),
    "moshi": CacheLimits((), 16),
    "phi3": CacheLimits((20,), None),
    "gemma3": CacheLimits((), None),
    "llama": CacheLimits((), None),
}


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[kind]()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.35)
    return model


def likeliest(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The answer without a cache: each token after a forward of a new copy on the whole text."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = copy.deepcopy(model)(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_behind_a_length_equal_those_without_a_cache(kind: str) -> None:
    model = build(kind)
    prompts = [[5 + 7 * i % 90 for i in range(n)] for n in (11, 30, 6)]
    expected = [likeliest(model, prompt, 20) for prompt in prompts]
    assert [list(stream(model, p, max_new_tokens=20, stop_ids=())) for p in prompts] == expected
    assert generate(model, prompts, max_new_tokens=20, stop_ids=()) == expected


@pytest.mark.parametrize("kind", CONFIGS)
def test_limits_are_those_that_the_model_needs(kind: str) -> None:
    model = build(kind)
    with torch.inference_mode():
        assert cache_trial.cache_limits(model, 12) == CacheLimits()
        assert cache_trial.cache_limits(model, 40) == EXPECTED[kind]


def test_a_model_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma3")
    prompt = list(range(5, 25))
    first = list(stream(model, prompt, max_new_tokens=6, stop_ids=()))
    calls = []
    monkeypatch.setattr(cache_trial, "again", lambda *given: calls.append(given))
    assert list(stream(model, prompt, max_new_tokens=6, stop_ids=())) == first
    assert not calls
