"""The mask of a packed row for models that neither take boundaries nor derive a mask from restarting positions.

transformers lets a program register the function that makes attention masks (`AttentionMaskInterface`), and passes it
the model's configuration. Our function combines the layer's own rule (causal, window, chunk) with "same document",
counting positions from each document's start. So the model keeps its own attention, whatever it adds to the scores.
ALiBi is exact too: its bias grows with the key's place in the row, and softmax removes the constant that a document's
start adds.

The mask holds T x T numbers, so paths without a mask come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

IMPLEMENTATION = "loratune_document_mask"
_ROW = "_loratune_row"
"""Attribute of a configuration that holds the row while it runs."""

MaskRule = Callable[[int, int, Tensor, Tensor], Tensor]
"""(sequence, head, query index, key index) -> True where the query sees the key."""


class MaskedRow(NamedTuple):
    """Documents of the running row."""

    document: Tensor
    """(T,) number of each token's document"""
    position_ids: Tensor
    """(T,) places in the documents, from 0"""


def register() -> None:
    """Registers `IMPLEMENTATION` with transformers. Repeated calls do nothing."""
    AttentionMaskInterface.register(IMPLEMENTATION, document_mask)
    AttentionInterface.register(IMPLEMENTATION, sdpa_attention_forward)


def document_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: MaskRule,
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor:
    """(1, 1, T, T) of `dtype`: 0 where a query sees a key, the smallest number elsewhere.

    Args:
        mask_function: rule of the layer, in positions.
        config: of the model, with the row that `running` put there.

    Raises: NotImplementedError: no row is running, or the shapes are not those of one packed row.
    """
    row: MaskedRow | None = getattr(config, _ROW, None)
    if row is None or not batch_size == 1 or not q_length == kv_length == len(row.document):
        raise NotImplementedError("a document mask needs one packed row")

    def inside(batch: int, head: int, query: Tensor, key: Tensor) -> Tensor:
        seen = mask_function(batch, head, row.position_ids[query], row.position_ids[key])
        return seen & (row.document[query] == row.document[key])

    return eager_mask(
        batch_size, q_length, kv_length, mask_function=inside, dtype=dtype, device=device, use_vmap=False
    )


def row_of(position_ids: Tensor, cu_seqlens: Tensor) -> MaskedRow:
    """The row of documents that start at `cu_seqlens`, (documents + 1,); waits for nothing."""
    places = torch.arange(len(position_ids), device=position_ids.device)
    starts = cu_seqlens[1:].to(places)
    return MaskedRow(torch.searchsorted(starts, places, right=True), position_ids)


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """Selects `IMPLEMENTATION` in every configuration of the model, and the earlier ones on exit.

    `model.set_attn_implementation` would not do: it leaves models alone that have one attention of their own, and
    these ask the configuration for their mask all the same.
    """
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def running(model: PreTrainedModel, row: MaskedRow) -> Iterator[None]:
    """Gives the row to every configuration of the model."""
    configs = _configs(model)
    for config in configs:
        setattr(config, _ROW, row)
    try:
        yield
    finally:
        for config in configs:
            delattr(config, _ROW)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())
