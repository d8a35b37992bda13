"""Whether a cached step equals the whole text, tried on the model.

A few tokens show a model that gives no cache back, keeps it in its modules, or counts positions differently with one.
Other faults appear behind a length of the configuration only. Moshi's cache forgets keys that the model still reads.
Doge makes its mask from all tokens at once. Longrope changes its frequencies, so that keys of a shorter text are
wrong. So for a text that grows behind such a length (`base.lengths`), steps behind it are tried too, once per model.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from loratune.base.lengths import lengths_below, restart_rotary
from loratune.base.positions import first_position, may_hold_positions
from loratune.base.probe import probe_row
from loratune.infer.decoding import CacheLimits, Decoding, again, step

_STEPS = 16
"""Cached steps before the one that is compared: each cached token enters the later ones."""
_ATTRIBUTE = "loratune_cache_trials"
"""Attribute of the model with the results so far."""


def cache_limits(model: PreTrainedModel, reach: int) -> CacheLimits:
    """Lengths behind which cached steps of a text of up to `reach` tokens are wrong.

    Memory: a forward of at most twice the longest such length, without a backward.
    """
    lengths, _ = lengths_below(model, reach)
    restarts: list[int] = []
    first = first_position(model) if lengths else None
    for length in lengths:
        _, most = lengths_below(model, 2 * length)
        behind = 1 << max(_STEPS, reach - length).bit_length()  # few different texts while a conversation grows
        total = min(length + behind, most)
        if not _agrees_after(model, first, total, max(1, total - _STEPS)):
            return CacheLimits(tuple(restarts), length)
        if not _agrees_after(model, first, min(total, length + _STEPS), length):
            restarts.append(length)
    return CacheLimits(tuple(restarts))


def is_plain(model: PreTrainedModel, cache: object) -> bool:
    """True for a filled cache of keys and values of a model without a table of positions.

    Such a cache needs no trial on a few tokens.
    """
    if type(cache) is not DynamicCache or not all(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return False
    return cache.get_seq_length() > 0 and not may_hold_positions(model)


def cache_agrees(model: PreTrainedModel, first: int | None) -> bool:
    """True if a token after a cached prompt of a few tokens gets the logits of prompt and token run together."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = torch.tensor([[i % vocabulary for i in range(2, 9)]], device=model.device)
    return _agrees(model, first, tokens, tokens.shape[1] - 1)


def tolerance(model: PreTrainedModel) -> float:
    """Largest difference of logits that counts as rounding: far above that of a deep model, and far below the effect
    of other prompts' tokens (order 1)."""
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1


def _agrees_after(model: PreTrainedModel, first: int | None, total: int, prefix: int) -> bool:
    """`_agrees` of `total` arbitrary tokens. The model keeps the result."""
    results: dict[tuple[object, ...], bool] = vars(model).setdefault(_ATTRIBUTE, {})
    key = (total, prefix, model.dtype, model.device, model.config._attn_implementation)
    if key not in results:
        results[key] = _agrees(model, first, probe_row(model, (total,)).tokens[None], prefix)
    return results[key]


def _agrees(model: PreTrainedModel, first: int | None, tokens: Tensor, prefix: int) -> bool:
    """True if `prefix` tokens at once, and the others one by one, give the last logits of all `tokens` (1, T)."""
    count = tokens.shape[1]
    position = torch.arange(count, device=tokens.device)[None]
    state = Decoding(None, None, position[:, -1] + 1, tokens, first)
    restart_rotary(model)
    for a, b in itertools.pairwise((0, *range(prefix, count + 1))):
        got = step(model, state, tokens[:, a:b], position[:, a:b])
        if not state.cached:
            return False
    restart_rotary(model)
    expected = again(model, state).double()
    return bool((got.double() - expected).norm() <= tolerance(model) * expected.norm())
