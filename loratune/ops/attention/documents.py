"""Attention inside each document of a packed row.

A packed row holds several documents one after the other. Masking a full T x T product would be correct, but with
documents of 100 tokens in a row of 2,048, 95 % of the scores are computed and discarded. So each document attends to
itself alone. The boundaries arrive as `cu_seq_lens_q`, an argument that transformers passes on to variable-length
kernels, so no model needs a change. `register()` adds this function to transformers' public `AttentionInterface`
under the name `IMPLEMENTATION`.

On a GPU nothing here may wait for the device, because a step is recorded as one CUDA graph. The boundaries stay on
the device, and the fastest kernel that reads them there is used:

    soft caps or sinks             our own (`ops.attention.capped`)
    flash-attn-4 is installed      FlashAttention 4 (`ops.attention.flash`)
    documents of one length        cuDNN's, whose batch is a view of the row
    otherwise                      PyTorch's FlashAttention 2

Sources: sliding windows as in Mistral (a token sees itself and the `window - 1` tokens before it); soft caps as in
Gemma 2, arXiv:2408.00118; attention sinks as in gpt-oss, a learned logit per head beside the keys.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from loratune.ops.attention import flash, simulated
from loratune.ops.attention.capped import DocumentSpans, attend

IMPLEMENTATION = "loratune_documents"


class AttentionOptions(TypedDict):
    """Arguments of `document_attention` that belong to an attention layer, and not to a row."""

    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    s_aux: Tensor | None


class RowBoundaries(TypedDict, total=False):
    """Arguments of `document_attention` that belong to a row."""

    cu_seq_lens_q: Tensor
    max_length_q: int
    spans: DocumentSpans
    contained: bool


def register() -> None:
    """Registers `IMPLEMENTATION` with transformers. Repeated calls do nothing."""
    AttentionInterface.register(IMPLEMENTATION, document_attention)


def keep_soft_caps(model: PreTrainedModel) -> None:
    """Selects transformers' eager attention for a model with soft caps.

    PyTorch's attention has no caps. With it transformers 5.17 silently ignores them, and selects it for Gemma 2 by
    default; 5.23 raises an error.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


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
    max_length_q: int | None = None,
    spans: DocumentSpans | None = None,
    contained: bool = False,
    collected: dict[nn.Module, AttentionOptions] | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a packed row.

    Args:
        module: the attention layer, as transformers passes it (unused).
        query: (1, heads, T, head_dim); key, value: (1, kv_heads, T, head_dim), kv_heads dividing heads.
        attention_mask: None, because the boundaries define the mask.
        scaling: factor on the scores, 1/sqrt(head_dim) if None.
        dropout: probability on the attention weights.
        sliding_window: tokens visible to a position, itself included; None for all before it.
        softcap: bound of the scores by tanh, or None.
        s_aux: (heads,) logits of the sinks, or None.
        cu_seq_lens_q: (documents + 1,) int32 starts of the documents and, last, T.
        max_length_q: upper bound of the documents' lengths, needed by GPU kernels.
        spans: spans of the same boundaries, shared by all layers of a forward; without it each layer makes its own.
        contained: True if a document with NaN or infinite values must not change the others by a bit. This excludes
            FlashAttention 4, which reads past a document's end and multiplies the values there by zero.
        collected: receives the options that `module` passes, by module.
        position_bias: not supported.

    Returns: (1, T, heads, head_dim), and None for the attention weights.
    Raises: NotImplementedError: a position bias, a mask, or no boundaries; `base.forward` then tries another path.
    """
    if query.is_meta:
        return _on_meta(query, key, value, softcap, s_aux, cu_seq_lens_q, max_length_q), None
    if position_bias is not None or cu_seq_lens_q is None or attention_mask is not None:
        raise NotImplementedError("document_attention needs cu_seq_lens_q; it takes no mask and no position bias")
    if collected is not None:
        collected[module] = AttentionOptions(
            scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if dropout == 0.0 and max_length_q is not None and _has_kernel(query, key, value):
        if softcap is None and s_aux is None:
            trials = None if spans is None or contained else spans.flash
            run = flash.attend if trials is not None and trials.usable(query, key, _pytorch) else _pytorch
            return run(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
        if s_aux is None or not s_aux.requires_grad:
            spans = spans or DocumentSpans(cu_seq_lens_q)
            return attend(query, key, value, scaling, sliding_window, softcap, s_aux, spans), None
    return _one_by_one(query, key, value, scaling, dropout, sliding_window, softcap, s_aux, cu_seq_lens_q), None


def _on_meta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int | None,
) -> Tensor:
    """Attention on the meta device: (1, T, heads, head_dim) without values. Boundaries may be missing."""
    if query.dtype.itemsize > 2 and (softcap is not None or sinks is not None):  # no CPU kernel supports them
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return explicit(query, key, value, 1.0, 0.0, None, softcap, sinks).transpose(1, 2)
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    even = documents == 1 or documents * (longest or 0) == query.shape[2]
    return simulated.attend(query, key, value, 0 if even else documents)


def _has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    dim = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16) and query.dtype == key.dtype == value.dtype
    return query.is_cuda and half and dim == value.shape[-1] and dim % 8 == 0 and dim <= 256


def _pytorch(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, cu_seqlens: Tensor, longest: int
) -> Tensor:
    """(1, T, heads, head_dim). If `longest * documents` is T, all documents have that length."""
    # `squeeze` and not `[0]`: the backward of an index allocates zeros and copies.
    total, documents = query.shape[2], cu_seqlens.shape[0] - 1
    even, windowed = longest * documents == total, window is not None and window < longest
    if even and not windowed and query.shape[-1] <= 128:
        q, k, v = (
            tensor.squeeze(0).unflatten(1, (documents, longest)).transpose(0, 1) for tensor in (query, key, value)
        )
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.transpose(1, 2).reshape(1, total, *out.shape[1:2], out.shape[-1])
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    # The operator behind torch.nn.attention.varlen; the signature of that module differs between PyTorch versions.
    bounds = {"cum_seq_q": cu_seqlens, "cum_seq_k": cu_seqlens, "max_q": longest, "max_k": longest}
    reach = {"window_size_left": window - 1, "window_size_right": 0} if windowed and window is not None else {}
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, **bounds, dropout_p=0.0, is_causal=True, return_debug_mask=False, scale=scaling, **reach
    )[0]
    return attended[None]


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
) -> Tensor:
    """(1, T, heads, head_dim), one document at a time: the reference."""
    dtype = query.dtype
    # On a CPU, the backward in float32 takes a quarter of the time.
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    # `split` and not slices: its backward is one concatenation, the backward of a slice allocates a row of zeros.
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        length = q.shape[2]
        if softcap is not None or sinks is not None:
            out = explicit(q, k, v, scaling, dropout, window, softcap, sinks)
        elif window is not None and window < length:
            visible = _visible(length, window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scaling)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1).to(dtype)  # contiguous, because some models take a view of it


def explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one document written out, for soft caps and sinks; (1, heads, n, head_dim)."""
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
