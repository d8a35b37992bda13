"""Document lengths at which a model starts to compute differently, and the row that shows them.

Documents of 12 tokens do not show a sliding window of 4,096 tokens, nor a rotary embedding that changes its
frequencies after 4,096 positions. (With such an embedding, a long document also changes the short documents of its
row.) So the lengths are taken from the model's configuration, and a row with one longer document is run on each path.
Only lengths that the caller's rows can hold count, so the cost is at most that of two training steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SHORT = (7, 12, 4)
"""Lengths of the documents in the short row, which every model runs."""
UNKNOWN_ROW = 8192
"""Longest document that is probed if the caller does not know the length of its rows."""
_BEHIND = 256
"""Tokens behind the largest length: enough to miss a share of the keys, few enough to be quick."""

_LENGTH = re.compile(
    r"window|chunk|top_?k|original_max|block_(size|length)|span|local_attention|seq_?len|max_len|lsh"
)
# Integers behind which there are no positions.
_LIMIT = re.compile(r"^max_\w*positions?(_embeddings)?$|^n_positions$|^n_ctx$|^max_seq")
# Names of integers that are sizes of tensors, ids or counts.
_OTHER = re.compile(
    r"vocab|hidden|embed|_dim|dim_|d_model|d_ff|d_kv|d_inner|head|layer|rank|inner|interm|expert|group|num_|^n_|_id$|ids|"
    r"width|channel|size|kernel|conv|image|audio|vision|patch|position|state|seed|year|version|bits|dim$|token|"
    r"heads|pad|length$|bins|factor|max_pixels|min_pixels|period|step"
)
_NOT_TEXT = re.compile(r"vision|audio|image|generation|quantization|id2label|label2id|speech")


class LongRow(NamedTuple):
    """Lengths of the documents of a row, and the parts of the row to compare."""

    documents: tuple[int, ...]
    parts: tuple[slice, ...]
    """Slices of the row: each short document, and in the long document the positions after each length."""


def long_row(model: PreTrainedModel, longest: int | None, also: Sequence[int] = ()) -> LongRow | None:
    """A row whose second document is longer than every length of `model` that is below `longest`.

    `also` adds lengths that are not in the configuration. None if there is no length beyond the short row.
    """
    lengths, limit = lengths_below(model, longest or UNKNOWN_ROW, also)
    if not lengths:
        return None
    last = lengths[-1]
    total = min(limit, last + max(16, min(last, _BEHIND)))
    first, _, third = SHORT
    starts = [first + n for n in lengths]
    ends = [*starts[1:], first + total]
    behind = [slice((a + b) // 2, b) for a, b in zip(starts, ends, strict=True)]
    return LongRow((first, total, third), (slice(0, first), *behind, slice(first + total, first + total + third)))


def lengths_below(model: PreTrainedModel, limit: int, also: Sequence[int] = ()) -> tuple[list[int], int]:
    """Lengths below `limit` behind which the configuration of `model` changes its computation, in order.

    Returns: the lengths, and the most tokens of a document: `limit`, or fewer if positions end before.
    """
    values = model.config.get_text_config(decoder=True).to_dict()
    own = {
        name: value for name, value in values.items() if not isinstance(value, Mapping)
    }  # not those of other parts
    positions = [n for name, n in _integers(own) if _LIMIT.search(name) and n > 0]
    found = {n for name, n in _integers(values) if _counts(name, n)} | {*also}
    if "dynamic" in _rope_types(values):  # frequencies that change behind the last position
        found |= {*positions}
    else:
        limit = min([limit, *positions])
    return sorted(n for n in found if max(SHORT) <= n < limit), limit


def _counts(name: str, value: int) -> bool:
    if "layer" in name or _LIMIT.search(name):
        return False
    return _LENGTH.search(name) is not None or (_OTHER.search(name) is None and value >= max(SHORT))


def _integers(values: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, int]]:
    """Name and value of every integer of a configuration, in nested tables and lists too."""
    for key, value in values.items():
        name = str(key).lower()
        if _NOT_TEXT.search(name):
            continue
        if isinstance(value, Mapping):
            yield from _integers(value, name)
        for entry in value if isinstance(value, list | tuple) else [value]:
            if isinstance(entry, int) and not isinstance(entry, bool):
                yield name, entry


def _rope_types(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value)
        elif key in ("rope_type", "type") and isinstance(value, str):
            yield value


def restart_rotary(model: nn.Module) -> None:
    """Restores the first frequencies of rotary embeddings that adapt to the longest document so far ("dynamic" NTK).

    Otherwise results would depend on earlier documents.
    """
    for module in model.modules():
        first = getattr(module, "original_max_seq_len", None)
        for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")] if first is not None else []:
            prefix = name.removesuffix("max_seq_len_cached")
            original = getattr(module, f"{prefix}original_inv_freq", None)
            current = module._buffers.get(f"{prefix}inv_freq")
            if isinstance(original, Tensor) and isinstance(current, Tensor) and getattr(module, name) != first:
                with torch.no_grad():
                    module._buffers[f"{prefix}inv_freq"] = original.to(current.device)
                setattr(module, name, first)
