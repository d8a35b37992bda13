"""Finds the formula from last hidden states to logits, so that the head runs in chunks over trained tokens only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loratune.base.probe import REFUSALS, ProbeRow, relative_error, tolerance

_SINGLE_LIMIT = 1e-4
"""Largest relative error of float32 logits: a soft cap of 30 changes small logits by less than a thousandth."""


@dataclass(frozen=True)
class HeadTail:
    """Elementwise operations after the output embeddings, as in `ops.logprobs.token_logprobs`."""

    scale: float
    softcap: float | None


def find_head(model: PreTrainedModel, hidden: Tensor, row: ProbeRow) -> HeadTail | None:
    """The tail that comes closest to the model's own logits; None if none reproduces them up to rounding.

    Args:
        hidden: last hidden states of the row's documents, (T, d).
        row: a short row, of which the first document is compared.
    """
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Module):
        return None
    end = int(row.cu_seqlens[1])
    expected = model(input_ids=row.tokens[None, :end], use_cache=False).logits[0].float()
    try:
        plain = module(hidden[:end]).float()
    except REFUSALS:  # a layer between hidden states and head (Electra)
        return None
    if plain.shape != expected.shape:
        return None
    errors = {
        tail: relative_error(_applied(tail, plain), expected) for tail in _tails(model.config.get_text_config())
    }
    best = min(errors, key=lambda tail: errors[tail])
    limit = tolerance(hidden.dtype, model)
    return best if errors[best] <= (min(limit, _SINGLE_LIMIT) if hidden.dtype.itemsize >= 4 else limit) else None


def _applied(tail: HeadTail, logits: Tensor) -> Tensor:
    scaled = logits * tail.scale
    return scaled if tail.softcap is None else tail.softcap * torch.tanh(scaled / tail.softcap)


def _tails(config: PreTrainedConfig) -> Iterator[HeadTail]:
    """Tails that the configuration's values suggest; those with a cap come first, and win if rounding hides it."""
    divisor = _number(config, "logits_scaling")
    scales = [1.0, _number(config, "logit_scale"), 1 / divisor if divisor else None]
    caps = [_number(config, name) for name in sorted(vars(config)) if _is_logit_cap(name)]
    for cap, scale in itertools.product([*(cap for cap in caps if cap), None], scales):
        if scale is not None:
            yield HeadTail(scale, cap)


def _is_logit_cap(name: str) -> bool:
    words = name.lower().replace("_", "")
    return "logit" in words and "softcap" in words and "att" not in words


def _number(config: PreTrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, float | int) and not isinstance(value, bool) else None
