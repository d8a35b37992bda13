"""Recipes of decoder layers: the role of each child of a layer.

A recipe fits a layer that has the named children and no others, except dropout. Heads, ranks, formulas of norms and
activations are read from the modules, so one recipe serves every model of its kind. The names alone do not prove how
a layer uses its children. So `base.forward.fuse` compares hidden states and gradients of the fused layers with the
model's own, and takes the first recipe that fits and agrees.

A new kind of layer is one recipe, in any file, and one line in `tables.RECIPES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from loratune import tables


@dataclass(frozen=True)
class LayerRecipe:
    """Paths of a layer's children, by role. None: the layer has no such child."""

    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three projections, or one with all query columns, then all key columns, then all value columns."""
    output: str = "self_attn.o_proj"
    head_norms: tuple[str, str] | None = None
    """Norms of query and key. The size of their weights shows whether they normalise each head or all columns."""
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate and up, or one projection. It holds both gate and up if it has twice the columns that `down` reads."""
    down: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    head_dim: str = "self_attn.head_dim"
    """Path of the attribute with the size of a head, an int."""
    residual_multiplier: str | None = "residual_multiplier"
    """Path of the attribute with the factor of both residual branches, a float; 1 if a layer has no such
    attribute."""
    parallel: str | None = None
    """Path of the attribute that is True if both halves read the layer's input."""
    interleaved: bool = False
    """True if rotation pairs neighbouring elements of a head; False if it pairs the halves."""
    grouped: bool = False
    """True if the single projection of query, key and value orders its columns head by head."""

    @property
    def attention(self) -> str:
        """Path of the module that calls the attention function: the parent of the output projection."""
        return self.output.rpartition(".")[0]

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all projections."""
        return (*self.query_key_value, self.output, *self.up, self.down)

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of all norms."""
        of_stream = self.attention_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm
        return (*(name for name in of_stream if name is not None), *(self.head_norms or ()))

    def fits(self, layer: nn.Module) -> bool:
        """True if the layer has exactly these children, not counting dropout."""
        named = {*self.linears, *self.norms, self.activation}
        found = {path for path, module in _leaves(layer) if not isinstance(module, nn.Dropout)}
        return named == found


LLAMA = LayerRecipe()
"""Also Mistral, Qwen 2 and Granite."""
QWEN3 = replace(LLAMA, head_norms=("self_attn.q_norm", "self_attn.k_norm"))
GEMMA2 = LayerRecipe(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
GEMMA3 = replace(GEMMA2, head_norms=QWEN3.head_norms)
OLMO2 = replace(GEMMA3, attention_norm=None, mlp_norm=None)
PHI3 = LayerRecipe(query_key_value=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",), activation="mlp.activation_fn")
GLM4 = LayerRecipe(
    up=("mlp.gate_up_proj",),
    activation="mlp.activation_fn",
    attention_post_norm="post_self_attn_layernorm",
    mlp_post_norm="post_mlp_layernorm",
    interleaved=True,
)
GPT_NEOX = LayerRecipe(
    query_key_value=("attention.query_key_value",),
    output="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    activation="mlp.act",
    head_dim="attention.head_size",
    parallel="use_parallel_residual",
    grouped=True,
)
GPT2 = LayerRecipe(
    query_key_value=("attn.c_attn",),
    output="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    activation="mlp.act",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    head_dim="attn.head_dim",
)


def recipes_for(model: PreTrainedModel) -> Iterator[LayerRecipe]:
    """Recipes of the table that fit every decoder layer of the model."""
    layers = decoder_layers(model)
    for entry in tables.RECIPES.values():
        recipe: LayerRecipe = tables.load_entry(entry)
        if len(layers) and all(recipe.fits(layer) for layer in layers):
            yield recipe


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's decoder layers: the longest list of modules in its backbone.

    `get_decoder` gives the output head of ModernBERT's decoder, and Llama 4 itself.
    """
    decoder = model.get_decoder()
    backbone = model.base_model if decoder in (model, model.get_output_embeddings()) else decoder
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _leaves(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in layer.named_modules() if path and not list(module.children()))
