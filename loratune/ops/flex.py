"""Attention with soft caps and sinks over one packed row on a GPU, by PyTorch's FlexAttention.

FlashAttention has neither, and writing the scores out document by document must read the borders on the host.
FlexAttention compiles a kernel, with its backward, around functions of one score:

    soft cap   c tanh(s / c)                  on each score
    mask       first(i) <= j <= i             position i sees j
    sinks      out * sigmoid(lse - sink)      a softmax over the scores and one logit more gives the scores this share

What a position sees is one interval that ends at itself and begins where its document does, or its window if that
begins later. So documents and windows together are one table, `first`, which never falls along the row, and one
kernel serves layers with and without a window. Which blocks of 128 x 128 scores are skipped, taken whole or masked
follows from the table's values at the ends of the blocks: no T x T mask is made, and nothing waits for the device.

Source: Dong et al. 2024, arXiv:2412.05496; soft caps as in Gemma 2 (arXiv:2408.00118), sinks as in gpt-oss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

_BLOCK = 128  # FlexAttention's own size; its kernels' tiles divide it


class Sights:
    """What the positions of a row see, worked out for each window when first asked for.

    One instance lives as long as one forward and its backward, and all layers share it.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        """`cu_seqlens`: (documents + 1,) int32 starts of the documents and, last, T, perhaps several times."""
        self._cu_seqlens = cu_seqlens
        self._masks: dict[tuple[int, int | None], BlockMask] = {}

    def within(self, tokens: int, window: int | None) -> BlockMask:
        """For a row of `tokens` tokens, a multiple of 128, in layers with this window."""
        key = tokens, window
        if key not in self._masks:
            self._masks[key] = _mask(_first_seen(self._cu_seqlens, tokens, window))
        return self._masks[key]


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    sights: Sights,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Causal attention inside each document of a packed row.

    Args:
        query: (1, heads, T, head_dim); key, value: (1, kv_heads, T, head_dim), kv_heads dividing heads.
        window, softcap, sinks: as in `ops.attention.document_attention`.
        sights: of this row.
        attend: `attended`, by default compiled, which takes seconds once for each shape.

    Returns: (1, T, heads, head_dim).
    Memory: query, key, value, the output and a number for each position and head; with sinks the output twice.
    """
    tokens = query.shape[2]
    whole = -(-tokens // _BLOCK) * _BLOCK
    if whole != tokens:  # the kernels are much the faster for whole blocks, and rows are so but for trials
        query, key, value = (F.pad(tensor, (0, 0, 0, whole - tokens)) for tensor in (query, key, value))
    attend = attend or _compiled()
    out = attend(query, key, value, sights.within(whole, window), scaling, softcap, sinks)
    return out[:, :, :tokens].transpose(1, 2)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What is compiled; as it is, it writes out a square of scores. (1, heads, T, head_dim) like the query."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    settings: dict[str, Any] = {"score_mod": capped, "block_mask": mask, "scale": scaling}
    settings |= {"enable_gqa": query.shape[1] != key.shape[1]}
    if sinks is None:
        plain: Tensor = flex_attention(query, key, value, **settings)
        return plain
    out, besides = flex_attention(query, key, value, **settings, return_aux=AuxRequest(lse=True))
    share = torch.sigmoid(besides.lse - sinks.to(besides.lse.dtype)[:, None])
    shared: Tensor = (out * share[..., None]).to(out.dtype)
    return shared


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """`attended` as kernels. The cache is PyTorch's: it compiles once for each shape, cap and mode of gradients."""
    return torch.compile(attended, dynamic=False)


def _first_seen(cu_seqlens: Tensor, tokens: int, window: int | None) -> Tensor:
    """(tokens,) int32: the first position that each position sees; those behind the row are a document of theirs."""
    position = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, position, right=True) - 1
    first = cu_seqlens[document]
    return first if window is None else torch.maximum(first, position - (window - 1))


def _mask(first: Tensor) -> BlockMask:
    """The mask j in [first(i), i], with the blocks that hold nothing of it left out and those inside it marked."""

    def sees(batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        return (seen <= at) & (seen >= first[at])

    block = torch.arange(len(first) // _BLOCK, dtype=torch.int32, device=first.device)
    some = (first[::_BLOCK] // _BLOCK)[:, None]  # of the block's first position, which looks back furthest
    every = ((first[_BLOCK - 1 :: _BLOCK] + _BLOCK - 1) // _BLOCK)[:, None]
    inside = (block >= every) & (block < block[:, None])
    partly = (block >= some) & (block <= block[:, None]) & ~inside
    size = len(first), len(first)
    return BlockMask.from_kv_blocks(*_listed(partly), *_listed(inside), _BLOCK, mask_mod=sees, seq_lengths=size)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(n, n) bool -> how many are true in each row, (1, 1, n), and the columns, those first, (1, 1, n, n); int32."""
    columns = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32).contiguous()[None, None]
