"""Small models of every kind of decoder layer that has a recipe, with random norms and biases."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf

from loratune.config import LoraConfig
from loratune.lora.inject import attach
from tests.conftest import SMALL

_NO_KV = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
_HEADS = SMALL | {"head_dim": 16}

MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SMALL)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_HEADS)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_HEADS, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=3.0)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_HEADS, sliding_window=5)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**SMALL)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL, partial_rotary_factor=0.5)),
    "granite": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(
            **SMALL, logits_scaling=4.0, residual_multiplier=0.22, attention_multiplier=0.3, embedding_multiplier=3.0
        )
    ),
    "glm4": lambda: tf.Glm4ForCausalLM(tf.Glm4Config(**_HEADS, attention_bias=True)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_NO_KV)),
    "gpt_neox sequential": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_NO_KV, use_parallel_residual=False)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=256, bos_token_id=1, eos_token_id=2)
    ),
}


def recipe_model(name: str, dtype: torch.dtype = torch.float64, **lora: object) -> tf.PreTrainedModel:
    """A model with an adapter; every norm, bias and B is random, so that each shows in the result."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]().to(dtype).requires_grad_(False).eval()
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data.normal_(0.5, 0.3) if path.endswith("weight") else parameter.data.normal_(0.0, 0.1)
        attach(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)), name="default", seed=0)
        for path, parameter in model.named_parameters():
            if path.endswith("lora_B"):
                parameter.data.normal_(0.0, 0.05)
    return model
