"""Log-probabilities of given tokens from hidden states, without a tensor of tokens x vocabulary.

The output head is the widest product of a language model. The logits of 8,192 tokens over a vocabulary of 152,000 are
2.3 GiB in bfloat16, and their softmax takes several such buffers. So the head runs in chunks of tokens. The
log-probability of a token depends on its own hidden state alone, so its whole gradient is known in the forward:

    d logp / d h = Jᵀ (W[target] - softmax(z) W)        J: derivative of the elementwise tail of the head

The forward saves this gradient, which has the size of the hidden states. The backward multiplies it by the incoming
gradient. Every objective on log-probabilities therefore costs the head two products, as a fused cross-entropy does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loratune.ops.dispatch import at_least_float32, on_gpu, with_kernel
from loratune.ops.products import MatrixProduct, mm

MAX_CHUNK_ELEMENTS = 1 << 22  # logits of one chunk; 16 MiB in float32, which fits a CPU's cache
MAX_CHUNK_ELEMENTS_GPU = 1 << 26  # 128 MiB in bfloat16, or `MIN_CHUNK_ROWS` where a vocabulary is very large
MIN_CHUNK_ROWS = 512  # enough to fill a product that is as wide as a vocabulary


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        scale: float,
        softcap: float | None,
        mm: MatrixProduct,
    ) -> Tensor:
        logprobs = torch.empty(hidden.shape[0], dtype=_accurate(hidden.dtype), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        if hidden.is_cuda or (hidden.is_meta and hidden.dtype.itemsize == 2):
            _on_gpu(hidden, weight, bias, targets, scale, softcap, mm, logprobs, gradient)
            ctx.save_for_backward(gradient)
            return logprobs
        step = max(1, MAX_CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows = slice(start, start + step)
            logits = _tail(nn.functional.linear(hidden[rows], weight, bias).to(logprobs.dtype), scale, softcap)
            log_p = logits.log_softmax(-1)
            chosen = targets[rows]
            logprobs[rows] = log_p.gather(1, chosen[:, None]).squeeze(1)
            if gradient is None:
                continue
            p = log_p.exp_()
            if softcap is None:
                torch.addmm(weight[chosen], p.to(weight.dtype), weight, beta=scale, alpha=-scale, out=gradient[rows])
            else:
                d_logits = p.neg_().scatter_add_(1, chosen[:, None], p.new_ones(p.shape[0], 1))
                d_logits.mul_(1 - (logits / softcap).square_())
                torch.mm(d_logits.mul_(scale).to(weight.dtype), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return logprobs

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        d_hidden = None if gradient is None else gradient * d_logprobs[:, None].to(gradient.dtype)
        return d_hidden, None, None, None, None, None, None


def _half_on_gpu(logits: Tensor, *_: object) -> bool:
    return on_gpu(logits) and logits.dtype in (torch.bfloat16, torch.float16)


@with_kernel(_half_on_gpu, "ops.logprobs_kernels")
def logprobs_of(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """log p(target), (n,), and d log p / d logits, (n, V) in the dtype of the logits, which it may overwrite."""
    tail = _tail(at_least_float32(logits), scale, softcap)
    chosen = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    log_normaliser = tail.logsumexp(-1, keepdim=True)
    logprobs = torch.where(chosen, tail, 0.0).sum(-1) - log_normaliser[:, 0]
    gradient = (chosen.to(tail.dtype) - (tail - log_normaliser).exp()) * scale
    if softcap is not None:
        gradient = gradient * (1 - (tail / softcap).square())
    return logprobs, gradient.to(logits.dtype)


def _on_gpu(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    mm: MatrixProduct,
    logprobs: Tensor,
    gradient: Tensor | None,
) -> None:
    """Fills `logprobs` and `gradient` in chunks of equal size, each one kernel between two products."""
    step = chunk_rows(hidden.shape[0], weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        logits = mm(hidden[rows], weight.T) if bias is None else nn.functional.linear(hidden[rows], weight, bias)
        logprobs[rows], slope = logprobs_of(logits, targets[rows], scale, softcap)
        if gradient is not None:
            mm(slope, weight, out=gradient[rows])
        del logits, slope  # before the next chunk allocates its own


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk on a GPU. All chunks of a step have one size, except the last."""
    most = max(MIN_CHUNK_ROWS, MAX_CHUNK_ELEMENTS_GPU // vocabulary)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index.clamp(max=x.shape[0] - 1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dx = dy.new_zeros(ctx.rows + 1, dy.shape[1])
        return dx.index_copy_(0, index, dy)[: ctx.rows], None


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for unique indices. Its gradient is then a copy, without the sort that repeated indices need.

    Args:
        x: (T, d).
        index: (N,) int64 from 0 to T. T marks padding and may repeat; it selects some row, which gets no gradient.
    """
    taken: Tensor = _TakeRows.apply(x, index)  # type: ignore[no-untyped-call]
    return taken


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    mm: MatrixProduct = mm,
) -> Tensor:
    """log p(target | hidden state) for each token: log_softmax(tail(head(h)))[target].

    `tail(z)` is `scale * z`, and with a soft cap `softcap * tanh(scale * z / softcap)` (Gemma 2).

    Args:
        hidden: (N, d), hidden states of trained positions only.
        head: the output head, (..., d) -> (..., V). A frozen `nn.Linear` takes the path of two products. Other heads,
            such as one with an adapter, run chunk by chunk under activation checkpointing.
        targets: (N,) int64, 0 <= target < V.
        scale: factor of the logits, dimensionless.
        softcap: bound of the logits, or None.
        mm: the product of matrices; a forward passes its chosen kernels (`ops.products`).

    Returns: (N,) float32 (float64 for float64 input), natural logarithms.
    Memory: one chunk of logits, `MAX_CHUNK_ELEMENTS`, and the gradient (N, d) until the backward.
    """
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        result: Tensor = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, scale, softcap, mm
        )
        return result

    def chunk_logprobs(rows: Tensor, chosen: Tensor) -> Tensor:
        logits = head(rows)
        logits = _tail(logits.to(_accurate(logits.dtype)), scale, softcap)
        return logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)

    width = getattr(head, "out_features", None) or 1 << 15
    step = max(1, MAX_CHUNK_ELEMENTS // width)
    parts = [
        checkpoint(chunk_logprobs, rows, chosen, use_reentrant=False)
        for rows, chosen in zip(hidden.split(step), targets.split(step), strict=True)
    ]
    return torch.cat(parts)


def _tail(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The elementwise tail of a head."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
