"""Small models of many architectures, built from transformers' configurations. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_KV = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}

# Causal language models that together have every feature a packed row must respect: grouped heads, query and
# key norms, sliding windows, soft caps, sinks, logit scales, learned positions, fused projections, experts, states.
CAUSAL: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, head_dim=16)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SMALL, head_dim=16, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=3.0)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=5)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=4)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=256, bos_token_id=1, eos_token_id=2)
    ),
    "gptneox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_NO_KV)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**SMALL)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SMALL, logits_scaling=4.0)),
    "gptoss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SMALL, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=5)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=4)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=300)),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300, state_size=8, eos_token_id=2)
    ),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """A random model of `CAUSAL`, frozen and in evaluation mode, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CAUSAL[name]()
    return model.to(dtype).requires_grad_(False).eval()


@pytest.fixture
def llama() -> tf.PreTrainedModel:
    """A random two-layer Llama in float32."""
    return build("llama")


@pytest.fixture(autouse=True)
def _quiet_and_deterministic() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(1234)
