"""Attention with soft caps and sinks over one packed row on a GPU, as an operator of its own.

FlashAttention knows neither, and the scores written out document by document (`ops.attention.documents.explicit`)
must read the
borders on the host, so that a step could not be one CUDA graph. The kernels (`ops.attention.capped_kernels`) read
them on the device, as a table of what each position belongs to: one table for all layers, with a window or without.

    soft cap   c tanh(s / c) on each score s
    sinks      a softmax over the scores and one logit more, whose share goes nowhere

It is an operator of PyTorch's, and not a bare autograd function, so that what watches operators sees it: `selective`
keeps its output (`base.recompute`).

FlexAttention would do the same, but inductor compiles it anew for each length of row. Source: soft caps, Gemma 2,
arXiv:2408.00118; sinks, gpt-oss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DocumentSpans:
    """Where the document of each position begins and ends, worked out when first asked for.

    One instance lives as long as one forward and its backward, and all layers share it.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        """`cu_seqlens`: (documents + 1,) int32 starts of the documents and, last, T, perhaps several times."""
        self._cu_seqlens = cu_seqlens
        self._table: Tensor | None = None

    def table(self, tokens: int) -> Tensor:
        """(2, T) int32: of each position, the first of its document and the first behind it."""
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
        window, softcap, sinks: as in `ops.attention.documents.document_attention`; the sinks are frozen.
        spans: of this row.

    Returns: (1, T, heads, head_dim), contiguous.
    Memory: query, key, value, the output, and a float32 number for each position and head.
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
    ctx.set_materialize_grads(False)  # of the logsumexp


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    from loratune.ops.attention import capped_kernels

    return *capped_kernels.backward(d_out.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 5


_operator.register_autograd(_backward, setup_context=_keep)

OPERATOR = torch.ops.loratune.capped_attention.default
"""What a dispatch mode sees of it."""
