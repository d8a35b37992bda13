"""One step of a model while it writes text: with its cache, or with all tokens again.

Legend for the suffixes: B sequences in the batch, T columns so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

# Errors of models that have no cache under the usual names, or do not take the usual one.
_NO_CACHE = (KeyError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError, IndexError)


class CacheLimits(NamedTuple):
    """Lengths of a text behind which its cache is of no use; see `infer.cache_trial`."""

    restarts: tuple[int, ...] = ()
    """Behind each, the cache of a shorter text is wrong, and one made from the whole text is right."""
    end: int | None = None
    """Behind it, every step runs the whole text."""

    def __bool__(self) -> bool:
        return bool(self.restarts) or self.end is not None


NO_LIMITS = CacheLimits()


@dataclass(slots=True)
class Decoding:
    """State of a batch between two steps of the model; knows nothing of texts or stop tokens."""

    cache: Any
    """The model's own cache (keys and values, or states)."""
    mask_BT: Tensor | None
    """1 on tokens, 0 on padding; None while no sequence is padded."""
    position_B: Tensor
    """Position of the next token of each sequence, from 0 at its own first token."""
    columns_BT: Tensor
    """All tokens so far."""
    first: int | None = 0
    """Position of a text's first token; None if the model takes no positions."""
    cached: bool = True
    """False for a model without a usable cache: every step runs all tokens again."""
    limits: CacheLimits = NO_LIMITS


def step(model: PreTrainedModel, state: Decoding, tokens_BT: Tensor, position_BT: Tensor) -> Tensor:
    """Runs new columns with the cache, or all columns if the model has no usable cache; logits (B, V)."""
    count = state.columns_BT.shape[1]
    if state.limits.end is not None and count > state.limits.end:
        state.cached, state.cache = False, None
    if state.cached:
        if state.cache is not None and any(count - tokens_BT.shape[1] <= n < count for n in state.limits.restarts):
            state.cache, tokens_BT, position_BT = None, state.columns_BT, _all_positions(state)
        try:
            return _cached(model, state, tokens_BT, position_BT)
        except _NO_CACHE as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
        state.cached, state.cache = False, None
    return again(model, state)


def again(model: PreTrainedModel, state: Decoding) -> Tensor:
    """Runs all columns without a cache; returns the last column's logits (B, V)."""
    accepted = inspect.signature(model.forward).parameters
    wanted: dict[str, Any] = {"attention_mask": state.mask_BT, "use_cache": False, "logits_to_keep": 1}
    wanted |= _positions(state, _all_positions(state))
    given = {name: value for name, value in wanted.items() if name in accepted}
    logits_BV: Tensor = model(input_ids=state.columns_BT, **given).logits[:, -1]
    return logits_BV


def _all_positions(state: Decoding) -> Tensor:
    """Positions of all columns from 0, (B, T); `state.position_B` follows the last one."""
    count = state.columns_BT.shape[1]
    ahead_T = torch.arange(count, device=state.columns_BT.device) - count
    return (state.position_B[:, None] + ahead_T).clamp_min_(0)


def _cached(model: PreTrainedModel, state: Decoding, tokens_BT: Tensor, position_BT: Tensor) -> Tensor:
    """Runs new columns with the cache of the earlier ones; returns the last column's logits (B, V)."""
    accepted = inspect.signature(model.forward).parameters
    cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
    if state.cache is None and cache_name == "past_key_values":
        state.cache = DynamicCache(config=model.config)
    wanted: dict[str, Any] = {"attention_mask": state.mask_BT, "logits_to_keep": 1} | _positions(state, position_BT)
    given = {name: value for name, value in wanted.items() if name in accepted}
    output = model(input_ids=tokens_BT, use_cache=True, **{cache_name: state.cache}, **given)
    state.cache = output[cache_name]
    logits_BV: Tensor = output.logits[:, -1]
    return logits_BV


def _positions(state: Decoding, position_BT: Tensor) -> dict[str, Tensor]:
    """The argument for positions from 0."""
    return {} if state.first is None else {"position_ids": position_BT + state.first}
