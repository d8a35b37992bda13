"""A toy decoder with odd names, norms behind both halves only and a plain MLP, and the recipe that fuses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from loratune.fused.recipes import LayerRecipe

RECIPE = LayerRecipe(
    query_key_value=("mix.ask", "mix.index", "mix.content"),
    output="mix.answer",
    up=("grow",),
    down="shrink",
    activation="bend",
    attention_norm=None,
    attention_post_norm="calm",
    mlp_norm=None,
    mlp_post_norm="settle",
    head_dim="mix.size",
)


class ToyMix(nn.Module):
    """Attention with grouped heads."""

    is_causal = True

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.size = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        query, key_value = config.num_attention_heads * self.size, config.num_key_value_heads * self.size
        self.ask = nn.Linear(config.hidden_size, query)
        self.index = nn.Linear(config.hidden_size, key_value, bias=False)
        self.content = nn.Linear(config.hidden_size, key_value)
        self.answer = nn.Linear(query, config.hidden_size)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: Tensor | None, **row) -> Tensor:
        projected = (self.ask(x), self.index(x), self.content(x))
        query, key, value = (y.unflatten(-1, (-1, self.size)).transpose(1, 2) for y in projected)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return self.answer(attend(self, query, key, value, mask, scaling=0.3, dropout=0.0, **row)[0].flatten(2))


class ToyLayer(nn.Module):
    """h = x + calm(mix(x)), then h + settle(shrink(bend(grow(h))))."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.mix = ToyMix(config, layer_idx)
        self.calm, self.settle = (LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.grow = nn.Linear(config.hidden_size, config.intermediate_size)
        self.shrink = nn.Linear(config.intermediate_size, config.hidden_size)
        self.bend = nn.GELU()

    def forward(self, hidden_states: Tensor, attention_mask=None, position_embeddings=None, **row) -> Tensor:
        row.pop("past_key_values", None)
        h = hidden_states + self.calm(self.mix(hidden_states, position_embeddings, attention_mask, **row))
        return h + self.settle(self.shrink(self.bend(self.grow(h))))


class ToyForCausalLM(LlamaForCausalLM):
    """A Llama with other decoder layers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(ToyLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


def toy_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> ToyForCausalLM:
    """Random weights, frozen, in evaluation mode; the same at every call."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return ToyForCausalLM(config).to(dtype).requires_grad_(False).eval()
