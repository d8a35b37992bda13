"""Small models of every kind of decoder layer that has a recipe, with random norms and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

from loratune.config import LoraConfig
from loratune.lora.inject import attach
from tests.conftest import SMALL

Sizes = dict[str, Any]


def _neox(sizes: Sizes, parallel: bool) -> tf.PreTrainedModel:
    sizes = {name: size for name, size in sizes.items() if name != "num_key_value_heads"}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**sizes, use_parallel_residual=parallel))


def _gpt2(sizes: Sizes) -> tf.PreTrainedModel:
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names |= {"vocab_size": "vocab_size", "max_position_embeddings": "n_positions", "eos_token_id": "eos_token_id"}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**{new: sizes[old] for old, new in names.items()}, bos_token_id=1))


def _headed(sizes: Sizes) -> Sizes:
    return sizes | {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]}


MODELS: dict[str, Callable[[Sizes], tf.PreTrainedModel]] = {
    "llama": lambda sizes: tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)),
    "mistral": lambda sizes: tf.MistralForCausalLM(tf.MistralConfig(**sizes, sliding_window=4)),
    "qwen2": lambda sizes: tf.Qwen2ForCausalLM(tf.Qwen2Config(**sizes)),
    "qwen3": lambda sizes: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_headed(sizes))),
    "gemma2": lambda sizes: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_headed(sizes), sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=3.0)
    ),
    "gemma3": lambda sizes: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_headed(sizes), sliding_window=5)),
    "olmo2": lambda sizes: tf.Olmo2ForCausalLM(tf.Olmo2Config(**sizes)),
    "phi3": lambda sizes: tf.Phi3ForCausalLM(tf.Phi3Config(**sizes, partial_rotary_factor=0.5)),
    "granite": lambda sizes: tf.GraniteForCausalLM(
        tf.GraniteConfig(
            **sizes, logits_scaling=4.0, residual_multiplier=0.22, attention_multiplier=0.3, embedding_multiplier=3.0
        )
    ),
    "glm4": lambda sizes: tf.Glm4ForCausalLM(tf.Glm4Config(**_headed(sizes), attention_bias=True)),
    "gpt_neox": lambda sizes: _neox(sizes, True),
    "gpt_neox sequential": lambda sizes: _neox(sizes, False),
    "gpt2": _gpt2,
}


def recipe_model(
    name: str, dtype: torch.dtype = torch.float64, sizes: Sizes = SMALL, **lora: object
) -> tf.PreTrainedModel:
    """A model with an adapter; every norm, bias and B is random, so that each shows in the result."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name](sizes).to(dtype).requires_grad_(False).eval()
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data.normal_(0.5, 0.3) if path.endswith("weight") else parameter.data.normal_(0.0, 0.1)
        attach(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | lora)), name="default", seed=0)
        for path, parameter in model.named_parameters():
            if path.endswith("lora_B"):
                parameter.data.normal_(0.0, 0.05)
    return model
