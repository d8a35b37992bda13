"""Attention with soft caps and sinks over one packed row on a GPU, as a PyTorch operator.

    soft cap   c tanh(s / c) on each score s
    sinks      a softmax over the scores and one more logit, whose share is discarded

FlashAttention supports neither. The reference (`ops.attention.documents.explicit`) reads the boundaries on the host,
so a step with it could not be a CUDA graph. The kernels (`ops.attention.capped_kernels`) read the boundaries from a
table on the device, one table for all layers, with or without a sliding window.

It is a registered operator and not a bare autograd function because selective recomputation (`base.recompute`)
recognises operators and saves their outputs. FlexAttention could compute the same, but inductor would compile it anew
for each length of row.

Sources: soft caps, Gemma 2, arXiv:2408.00118; sinks, gpt-oss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loratune.ops.attention.flash import FlashTrials


class DocumentSpans:
    """Start and end of the document of each position, computed at first use.

    All layers share one instance during one forward and its backward.
    """

    def __init__(self, cu_seqlens: Tensor, flash: FlashTrials | None = None) -> None:
        """Takes the boundaries of one row.

        Args:
            cu_seqlens: (documents + 1,) int32 starts of the documents and, last, T, perhaps several times.
            flash: trials of the current forward (`ops.state`); None excludes FlashAttention 4.
        """
        self._cu_seqlens, self.flash = cu_seqlens, flash
        self._table: Tensor | None = None

    def table(self, tokens: int) -> Tensor:
        """(2, T) int32: start and end of the document of each position."""
        if self._table is None:
            position = torch.arange(tokens, dtype=torch.int32, device=self._cu_seqlens.device)
            end = torch.searchsorted(self._cu_seqlens, position, right=True)
            self._table = self._cu_seqlens[torch.stack([end - 1, end])]
        return self._table


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    spans: DocumentSpans,
) -> Tensor:
    """Causal attention inside each document of a packed row, with a gradient for query, key and value.

    Args:
        query: (1, heads, T, head_dim); key, value: (1, kv_heads, T, head_dim), kv_heads dividing heads.
        window, softcap, sinks: as in `ops.attention.documents.document_attention`; sinks are frozen.
        spans: documents of this row.

    Returns: (1, T, heads, head_dim), contiguous.
    Memory: saves query, key, value, the output, and one float32 for each position and head.
    """
    parts = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in parts]
    out: Tensor = _operator(*parts, spans.table(query.shape[2]), sinks, scaling, window, softcap)[0]
    return out[None]


@torch.library.custom_op(
    "loratune::capped_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor spans, Tensor? sinks, float scaling, int? window, "
    "float? softcap) -> (Tensor, Tensor)",
)
def _operator(*given: Any) -> tuple[Tensor, Tensor]:
    from loratune.ops.attention import capped_kernels  # imports Triton

    return capped_kernels.forward(*given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, spans, _, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, spans, *output)
    ctx.set_materialize_grads(False)  # no zeros as the gradient of the logsumexp


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    from loratune.ops.attention import capped_kernels

    return *capped_kernels.backward(d_out.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 5


_operator.register_autograd(_backward, setup_context=_keep)

OPERATOR = torch.ops.loratune.capped_attention.default
"""The operator under the name by which a dispatch mode recognises it."""
