"""Attention by document over one packed row.

A packed row holds several documents end to end. Masking a full T x T product would be right but computes mostly
what it throws away: with documents of 100 tokens in a row of 2,048, 95 % of it. So each document is attended on its
own. The boundaries come as `cu_seq_lens_q`, the argument that transformers hands through to variable-length
kernels, so a model needs no change: `register()` puts this function into transformers' public `AttentionInterface`
under the name `IMPLEMENTATION`.

Source of the variants: sliding windows as in Mistral (a token sees itself and the `window - 1` before it), soft
caps as in Gemma 2 (arXiv:2408.00118), attention sinks as in gpt-oss (a learned logit per head beside the keys).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "loratune_documents"


def register() -> None:
    """Makes `IMPLEMENTATION` known to transformers; may be called any number of times."""
    AttentionInterface.register(IMPLEMENTATION, document_attention)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        module: the attention layer, as transformers passes it (unused).
        query: (1, heads, T, head_dim); key, value: (1, kv_heads, T, head_dim), kv_heads dividing heads.
        attention_mask: None; the boundaries say it all.
        scaling: factor on the scores, 1/sqrt(head_dim) if None.
        dropout: probability on the attention weights.
        sliding_window: tokens that a position sees, itself included; None for all before it.
        softcap: bound of the scores by tanh, or None.
        s_aux: (heads,) logits of the sinks, or None.
        cu_seq_lens_q: (documents + 1,) int32 starts of the documents and, last, T.
        position_bias: not supported.

    Returns: (1, T, heads, head_dim), and None in place of the attention weights.
    Raises: NotImplementedError: a position bias, or no boundaries; `base.forward` then takes another road.
    """
    if position_bias is not None or cu_seq_lens_q is None or attention_mask is not None:
        raise NotImplementedError("document_attention needs cu_seq_lens_q and knows no mask and no position bias")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    # `split` rather than slices: its backward is one concatenation, that of a slice a row-sized tensor of zeros.
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        length = q.shape[2]
        if softcap is not None or s_aux is not None:
            out = _explicit(q, k, v, scaling, dropout, sliding_window, softcap, s_aux)
        elif sliding_window is not None and sliding_window < length:
            visible = _visible(length, sliding_window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scaling)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention written out, for what no fused kernel offers; (1, heads, n, head_dim)."""
    scores = (q @ k.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(q.shape[2], window, q.device), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.float().softmax(-1).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout, training=dropout > 0) @ v


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """(length, length) bool: position i sees j if 0 <= i - j < window."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < (window or length))
