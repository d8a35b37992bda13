"""Tables of extension points: name -> "module:object", imported on first use.

`config` reads the names, because settings accept them. The package that owns the concept imports the objects. Nothing
is imported here, so help and argument errors stay fast. An extension is one file and one line in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

FORMATS: dict[str, str] = {
    "messages": "loratune.data.formats.messages:FORMAT",
    "sharegpt": "loratune.data.formats.sharegpt:FORMAT",
    "alpaca": "loratune.data.formats.alpaca:FORMAT",
    "prompt_completion": "loratune.data.formats.prompt_completion:FORMAT",
    "text": "loratune.data.formats.text:FORMAT",
}
"""Record formats (`loratune.data.record.RecordFormat`). If a record fits several, the first one counts."""

OBJECTIVES: dict[str, str] = {
    "sft": "loratune.training.objectives.sft:sft",
}
"""Training objectives (`loratune.training.objectives.Objective`)."""

PRECISIONS: dict[str, str] = {
    "nf4": "loratune.precision.nf4_format:Nf4Format",
    "fp8": "loratune.precision.fp8_format:Fp8Format",
}
"""Precisions that quantise the base (`loratune.precision.contract.WeightFormat`)."""

RECIPES: dict[str, str] = {
    "llama": "loratune.fused.recipes:LLAMA",
    "qwen3": "loratune.fused.recipes:QWEN3",
    "gemma2": "loratune.fused.recipes:GEMMA2",
    "gemma3": "loratune.fused.recipes:GEMMA3",
    "olmo2": "loratune.fused.recipes:OLMO2",
    "phi3": "loratune.fused.recipes:PHI3",
    "glm4": "loratune.fused.recipes:GLM4",
    "gpt_neox": "loratune.fused.recipes:GPT_NEOX",
    "gpt2": "loratune.fused.recipes:GPT2",
}
"""Kinds of decoder layers that run fused (`loratune.fused.recipes.LayerRecipe`), in the order they are tried. The
name is for readers: a recipe is chosen by the modules of a layer."""

ROW_OPERATORS: dict[str, str] = {
    "causal_conv1d_fn": "loratune.base.row_operators:convolution",
    "torch_chunk_gated_delta_rule": "loratune.base.row_operators:delta_rule",
    "chunk_kimi_delta_attention": "loratune.base.row_operators:delta_rule",
    "mamba2_chunk_scan": "loratune.base.row_operators:mamba2_scan",
    "mamba_selective_scan": "loratune.base.row_operators:mamba_scan",
    "mamba2_split_conv1d_scan_combined": "loratune.base.row_operators:unfused",
    "mamba_inner_fn": "loratune.base.row_operators:unfused",
}
"""Functions that transformers' recurrent layers call by these names, and ours for packed rows."""

ROW_LAYERS: dict[str, str] = {
    "short convolution": "loratune.base.row_layers:short_convolution",
    "token shift": "loratune.base.row_layers:token_shift",
    "lightning attention": "loratune.base.row_layers:lightning_attention",
}
"""Other layers that carry state along a row (`loratune.base.row_layers.RowLayer`), found by their structure. The name
is for readers."""

VARIANTS: dict[str, str] = {
    "use_dora": "loratune.lora.variants.dora:DORA",
}
"""Variants of LoRA (`loratune.lora.layer.LoraVariant`). The name is the configuration field that chooses the variant
when it is true, for example "use_dora", or a field and its value, for example "init_lora_weights=pissa"."""


def chosen_variants(values: Mapping[str, object]) -> list[str]:
    """Names in `VARIANTS` that the values of a configuration's fields choose."""
    chosen = []
    for name in VARIANTS:
        field, _, value = name.partition("=")
        if values.get(field) == value if value else values.get(field):
            chosen.append(name)
    return chosen


def load_entry(location: str) -> Any:
    """Imports the object at "module:object"."""
    module, _, name = location.partition(":")
    return getattr(import_module(module), name)
