"""A small configuration of every causal-LM type of transformers, made from the type's default configuration.

Sizes are replaced by name, in nested configurations too. Windows, chunks and top-k become 16 tokens, so that
documents of the sweep reach behind them. A type whose sizes constrain each other has a line in `ADJUST`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 304
LONG = 16
"""Length of every window, chunk and top-k."""

_WIDTH = dict.fromkeys(
    ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim", "word_embed_proj_dim", "lru_width"), 64
) | dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "attention_hidden_size"), 64)
_MLP = dict.fromkeys(
    (
        "intermediate_size",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "d_ff",
        "dff",
        "dim_ff",
        "d_inner",
        "feed_forward_size",
        "ffn_hidden_size",
        "intermediate_size_mlp",
        "dense_intermediate_size",
    ),
    96,
) | dict.fromkeys(
    (
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
        "expert_ffn_hidden_size",
    ),
    32,
)
_DEPTH = dict.fromkeys(
    (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_layers",
        "num_decoder_layers",
        "num_blocks",
    ),
    2,
)
_HEADS = dict.fromkeys(
    (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "attention_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "num_encoder_attention_heads",
        "num_decoder_attention_heads",
        "swa_num_attention_heads",
        "linear_num_heads",
        "linear_num_value_heads",
    ),
    4,
) | dict.fromkeys(
    (
        "num_key_value_heads",
        "num_kv_heads",
        "swa_num_key_value_heads",
        "linear_num_key_heads",
        "num_query_groups",
        "kv_n_heads",
    ),
    2,
)
_HEAD_SIZE = dict.fromkeys(
    (
        "head_dim",
        "d_kv",
        "d_head",
        "dim_head",
        "v_head_dim",
        "qk_nope_head_dim",
        "index_head_dim",
        "swa_head_dim",
        "linear_head_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "attention_head_size",
        "kv_channels",
        "query_pre_attn_scalar",
    ),
    16,
) | dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8)
_RANKS = dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank", "hc_lowrank", "gated_norm_rank"), 16
)
_EXPERTS = dict.fromkeys(
    ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"), 4
) | dict.fromkeys(
    (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_k",
        "moe_topk",
        "n_group",
        "topk_group",
        "num_expert_group",
    ),
    2,
)
_STATE = dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8) | {"time_step_rank": 8, "n_groups": 1}
_LONG = dict.fromkeys(
    (
        "sliding_window",
        "window_size",
        "attention_window_size",
        "sliding_window_size",
        "local_attention",
        "local_attention_window_len",
        "attention_chunk_size",
        "chunk_size",
        "mamba_chunk_size",
        "block_size",
        "index_topk",
        "index_topk_blocks",
        "index_block_size",
        "keep_window_size",
        "rel_extent",
    ),
    LONG,
)
_TABLES = dict.fromkeys(
    (
        "vocab_size",
        "unpadded_vocab_size",
        "vocab_size_per_layer_input",
        "encoder_hash_byte_group_vocab",
        "pronunciation_vocab_size",
        "shape_vocab_size",
        "ngram_vocab_size_base",
    ),
    VOCABULARY,
) | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256)
_OTHER = {
    "index_n_heads": 16,  # with few heads many scores are exactly 0, and which of them are kept is arbitrary
    "hidden_size_per_layer_input": 16,
    "pronunciation_embed_dim": 16,
    "shape_embed_dim": 16,
    "ple_embed_dim": 16,
    "router_hidden_size": 16,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "floor_scale": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "eod_token_id": 2,
    "mask_token_id": 3,
    "start_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "boi_token_id": 5,
    "eoi_token_id": 6,
    "image_token_id": 7,
    "image_token_index": 7,
    "audio_token_id": 8,
    "video_token_id": 9,
    "boa_token_id": 10,
    "eoa_token_id": 11,
    "boa_token_index": 10,
    "eoa_token_index": 11,
}
SIZES: dict[str, float | None] = (
    {"initializer_range": 0.1, "init_std": 0.1}
    | _WIDTH
    | _MLP
    | _DEPTH
    | _HEADS
    | _HEAD_SIZE
    | _RANKS
    | _EXPERTS
    | _STATE
    | _LONG
    | _TABLES
    | _OTHER
)
_DECODER = {"is_decoder": True}
_DENSE_HEADS = {"num_key_value_heads": 4}
_HEAD_DIM = {"head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": LONG,
    "indexer_compress_ratio": 4,
}
_SHARED_LAYER = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
ADJUST: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "xlm": {"causal": True},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "ministral": _HEAD_DIM,
    "blt": {
        "hidden_size_global": 64,
        "patching_mode": "entropy",
        "encoder_hash_byte_group_size": [3, 4],
        **{part: {"hidden_size_global": 64} for part in ("encoder_config", "decoder_config")},
    },
    "dots1": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_hidden_layers": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": None, "topk_group": None},
    "xmod": _DECODER | {"default_language": "en_XX"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "dots3_note": {
        "text_config": _DENSE_HEADS,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DENSE_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "nemotron": {"num_key_value_heads": 2},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {kind: dict(_ROPE) for kind in ("full_attention", "sliding_attention")},
        "sliding_window": LONG,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_hidden_layers": 3},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": _DECODER
    | {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16), "attn_layers": ("local", "lsh")},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": _SHARED_LAYER,
    "zamba2": _SHARED_LAYER,
}


def small_config(kind: str) -> PreTrainedConfig:
    """A small configuration of a model type."""
    return shrunk(CONFIG_MAPPING[kind], ADJUST.get(kind, {}))


def shrunk(make: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    parts = {name: shrunk(part, more.get(name, {})) for name, part in _parts(make, more)}
    sizes = dict(_sizes(make))
    return make(**sizes | _layer_kinds(make) | more | parts)


def _parts(make: type[PreTrainedConfig], more: dict[str, Any]) -> Iterator[tuple[str, type[PreTrainedConfig]]]:
    """Name and class of each nested configuration; the class "auto" is found from the default configuration."""
    for name, part in make.sub_configs.items():
        if not issubclass(part, PreTrainedConfig):
            part = type(getattr(make(), name))
        if issubclass(part, PreTrainedConfig):
            yield name, part


def _sizes(make: type[PreTrainedConfig]) -> Iterator[tuple[str, float | None]]:
    names = {field.name for field in dataclasses.fields(make)}  # type: ignore[arg-type]
    for field in dataclasses.fields(make):  # type: ignore[arg-type]
        latent = field.name == "num_key_value_heads" and "kv_lora_rank" in names  # every head has keys of its own
        if field.name in SIZES and field.default not in (None, dataclasses.MISSING, 0):
            yield field.name, SIZES["num_attention_heads" if latent else field.name]


def _layer_kinds(make: type[PreTrainedConfig]) -> dict[str, Any]:
    """One layer of each kind that the default configuration has, at least two layers."""
    names = {field.name for field in dataclasses.fields(make)}  # type: ignore[arg-type]
    names &= {"layer_types", "mlp_layer_types"}
    default = make() if names else None
    kinds = {name: list(dict.fromkeys(getattr(default, name, None) or [])) for name in names}
    layers = max([2, *map(len, kinds.values())])
    several = {name: (layers * found)[:layers] for name, found in kinds.items() if len(found) > 1}
    return several | {"num_hidden_layers": layers} if several else {}
