"""The model that is pretrained: Llama in a few lines, with one attention call over packed documents.

Parameters have transformers' names, so that `to_transformers` is a plain `load_state_dict`; pretrain.py checks that
both models give the same logits. The model is written here instead of imported, because one compiled graph with flex
attention trains several times faster than the general-purpose class.

Shapes: B rows, T tokens a row, H heads, d the head width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HEAD_WIDTH = 64
ROTARY_BASE = 10_000.0

Mask = BlockMask | Tensor  # block mask on a GPU, dense boolean (B, 1, T, T) elsewhere


def config(size: str = "pocket") -> LlamaConfig:
    """The shape of a model of this family.

    "pocket", 5.2 million parameters, is narrow enough for two CPU cores and deep enough to find, copy and rewrite.
    "middle", 37 million, and "larger", 79 million, are not shipped: measurements on quantised bases, fast paths and
    default settings want a trained model whose products are of a width that GPUs are made for.
    """
    width, mlp, layers, heads, key_value_heads = {
        "pocket": (256, 640, 6, 4, 2),
        "middle": (512, 1408, 12, 8, 4),
        "larger": (768, 2048, 12, 12, 4),
    }[size]
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        dtype="bfloat16",
    )


def rotary(n_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embedding, each (T, d), in the half-split layout of transformers."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
    angles = torch.outer(torch.arange(n_tokens), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x, (B, H, T, d), by the positions."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention inside each document of a packed row."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.d = c.num_attention_heads, c.num_key_value_heads, HEAD_WIDTH
        self.q_proj = nn.Linear(c.hidden_size, self.n_heads * self.d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.n_kv * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.n_kv * self.d, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.d, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        rows, n_tokens, _ = x.shape
        q = self.q_proj(x).view(rows, n_tokens, self.n_heads, self.d).transpose(1, 2)
        k = self.k_proj(x).view(rows, n_tokens, self.n_kv, self.d).transpose(1, 2)
        v = self.v_proj(x).view(rows, n_tokens, self.n_kv, self.d).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if isinstance(mask, BlockMask):
            out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, n_tokens, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm block."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
        """(B, T, hidden) -> (B, T, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Embedding, layers and final norm; `model` in transformers."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)


class Pocket(nn.Module):
    """The decoder with its tied head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.config = c
        self.model = Backbone(c)
        cos, sin = rotary(c.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(_initialize)
        for module in self.modules():  # every block starts as the identity
            if isinstance(module, Layer):
                nn.init.zeros_(module.self_attn.o_proj.weight)
                nn.init.zeros_(module.mlp.down_proj.weight)

    def forward(self, tokens: Tensor, mask: Mask) -> Tensor:
        """(B, T) token ids -> (B, T, vocabulary) logits."""
        n_tokens = tokens.shape[1]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, self.cos[:n_tokens], self.sin[:n_tokens], mask)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def losses(self, tokens: Tensor, mask: Mask, targets: Tensor) -> Tensor:
        """Cross-entropy of every target, (B, T), float32."""
        logits = self(tokens, mask).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.6 * module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def document_mask(documents: Tensor, make_block_mask: Callable[..., BlockMask] | None) -> Mask:
    """Causal attention inside each document.

    Args:
        documents: (B, T) number of the document each token belongs to.
        make_block_mask: (compiled) `create_block_mask` for flex attention, or None for a dense mask.
    """
    rows, n_tokens = documents.shape
    if make_block_mask is None:
        same = documents[:, :, None] == documents[:, None, :]
        return (same & torch.ones_like(same[0]).tril()).unsqueeze(1)

    def visible(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    return make_block_mask(visible, rows, None, n_tokens, n_tokens, device=documents.device)


def to_transformers(model: Pocket) -> LlamaForCausalLM:
    """The same weights as a bfloat16 transformers model with its generation settings."""
    exported: LlamaForCausalLM = LlamaForCausalLM(model.config)
    state = {name: value.detach().cpu().float() for name, value in model.state_dict().items()}
    exported.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    exported.tie_weights()
    exported.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=5, do_sample=False, max_new_tokens=128
    )
    for parameter in exported.parameters():  # not .to(): that would round the rotary frequencies as well
        parameter.data = parameter.data.bfloat16()
    exported.eval()
    return exported
