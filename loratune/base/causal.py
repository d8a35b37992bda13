"""Checks that a model can train on next tokens, and finds the part of it that gives hidden states."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from loratune.base.probe import ProbeRow
from loratune.errors import ModelError


def check_causal(model: object) -> None:
    """Raises ModelError for objects that are not causal language models of transformers, and models without data."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a {kind} is not a transformers model, which training needs; load one with lt.load")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{kind} is an encoder and a decoder; training needs a causal language model (decoder only)")
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None and not hasattr(model, "hf_device_map"):  # accelerate brings offloaded weights in time
        raise ModelError(f"{kind}: {empty} is on the meta device, so it has no values; load the model with lt.load")


def check_logits(model: PreTrainedModel, row: ProbeRow) -> None:
    """Raises ModelError for a model without a language-model head."""
    if isinstance(model.get_output_embeddings(), nn.Module):
        return
    logits = getattr(model(input_ids=row.tokens[None, : int(row.cu_seqlens[1])]), "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[-1] < model.config.get_text_config().vocab_size:
        raise ModelError(f"{type(model).__name__} has no language-model head; training needs a causal language model")


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head: the part that takes token ids and gives hidden states.

    `get_decoder` gives the output head of some models (ModernBERT's decoder) and the model itself of others
    (Llama 4), so a part counts only if it takes token ids.
    """
    head = model.get_output_embeddings()
    parts = (model.get_decoder(), getattr(model, model.base_model_prefix, None), *model.children())
    for part in parts:
        if isinstance(part, nn.Module) and part is not model and part is not head and _takes_tokens(part):
            return part
    raise ModelError(f"{type(model).__name__} does not say which of its parts gives the hidden states")


def _takes_tokens(module: nn.Module) -> bool:
    return "input_ids" in inspect.signature(module.forward).parameters
