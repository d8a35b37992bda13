"""Random-weight models of the measured shapes, built on the GPU, and rows of documents for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from loratune.data.examples import Example
from loratune.data.pack import Row, make_row
from loratune.ops.frozen import FrozenWeight
from loratune.precision import nf4
from loratune.precision.linear import quantise_linears
from loratune.precision.nf4 import NestedScales, Nf4Weight

SHAPES: dict[str, dict[str, object]] = {
    "l7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000},
    "l8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256},
    "l1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "q0_6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True},
    "q8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "l70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 128256},
    "g2b": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True},
}  # fmt: skip
_KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "l": (LlamaConfig, LlamaForCausalLM),
    "q": (Qwen3Config, Qwen3ForCausalLM),
    "g": (Gemma2Config, Gemma2ForCausalLM),
}


def _kind(shape: str) -> tuple[type[Any], type[Any]]:
    return _KINDS[shape[0]]


def nf4_model_of(shape: str, device: str = "cuda") -> PreTrainedModel:
    """The model with random 4-bit codes; 70 billion parameters take seconds where quantising takes minutes."""
    config, kind = _kind(shape)
    place = torch.empty(0, device=device).device
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind(config(**SHAPES[shape] | {"max_position_embeddings": 8192}))
        quantise_linears(model.model.layers, lambda weight: random_codes(weight, place))
        model.to_empty(device=place)
        model.tie_weights()
        with torch.device(place):
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        for parameter in model.parameters():
            parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(0.0, 0.02)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def random_codes(weight: Tensor, device: torch.device) -> Nf4Weight:
    """Random values for a `weight` without data; their variance is about 1 / d_in, their mean nearly zero.

    The mean of the 16 values of NF4 is 0.023. A wide weight with this mean is dominated by one direction: all tokens
    become equal, most gradients are rounding noise, and fused layers fail their check. So 0.338 replaces 0.723.
    """
    d_out, d_in = weight.shape
    blocks = -(-d_out * d_in // nf4.BLOCK)
    codes = torch.randint(256, (-(-d_out * d_in // 2),), dtype=torch.uint8, device=device)
    codes = torch.where(codes % 16 == 14, codes - 3, codes)
    codes = torch.where(codes // 16 == 14, codes - 48, codes)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    offset = torch.full((-(-blocks // nf4.GROUP),), 1.8 * d_in**-0.5, dtype=torch.float32, device=device)
    nested = NestedScales(0.2 * offset, offset, nf4.dynamic_book(device))
    return Nf4Weight(codes, absmax, nested, nf4.nf4_book(device), (d_out, d_in), weight.dtype)


def model_of(
    shape: str, device: str = "cuda", form: Callable[[Tensor], FrozenWeight] | None = None
) -> PreTrainedModel:
    """A frozen bfloat16 model with random weights; `form` quantises its layers one by one as they are made."""
    config, kind = _kind(shape)
    settings = SHAPES[shape] | {"max_position_embeddings": 8192}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if form is None:
                return kind(config(**settings)).requires_grad_(False).eval()
            model = kind(config(**settings | {"num_hidden_layers": 1, "layer_types": None}))
            model.config.num_hidden_layers = int(str(settings["num_hidden_layers"]))
            if getattr(model.config, "layer_types", None):
                model.config.layer_types *= model.config.num_hidden_layers
            layers = model.model.layers
            quantise_linears(layers, form)
            for index in range(1, model.config.num_hidden_layers):
                layer = type(layers[0])(model.config, index)
                quantise_linears(layer, form)
                layers.append(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def row_of(lengths: list[int], capacity: int, seed: int, prompt: float = 0.0) -> Row:
    """A row of documents of random tokens; the first `prompt` tokens of each are not trained."""
    rng = np.random.default_rng(seed)
    documents = [
        Example(rng.integers(0, 260, n).astype(np.int32), (np.arange(n) >= prompt * n).astype(np.float32), "random")
        for n in lengths
    ]
    return make_row(documents, capacity, 0)


def limit_tok_s(shape: str, batch: int, tokens: int, precision: str = "bf16") -> float:
    """Upper bound of tokens per second: the arithmetic of the frozen products, twice, and of attention, or reading
    every weight twice, whichever is slower.

    Rates measured on one H200: products 692 TFLOP/s, in 8 bits 1,315; memory 4.3 TB/s.
    """
    config = {name: value for name, value in SHAPES[shape].items() if isinstance(value, int)}
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    dim = config.get("head_dim", width // heads)
    query, key_value = heads * dim, config["num_key_value_heads"] * dim
    weights = layers * width * (2 * query + 2 * key_value + 3 * config["intermediate_size"])
    head = config["vocab_size"] * width
    attention = layers * query * tokens / 2 * (4 + 10)  # causal; forward 2 products, backward 5
    rate, size = (1315e12, 1) if precision == "fp8" else (692e12, 2)
    arithmetic = batch * tokens * (4 * weights / rate + (4 * head + attention) / 692e12)
    return batch * tokens / max(arithmetic, 2 * (size * weights + 2 * head) / 4.3e12)
