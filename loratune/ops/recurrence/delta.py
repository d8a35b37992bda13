"""The gated delta rule: a linear attention that corrects its state instead of only adding to it.

    S[t] = decay[t] S[t-1] + k[t] (beta[t] (v[t] - (decay[t] S[t-1])ᵀ k[t]))ᵀ      S: (key, value)
    o[t] = S[t]ᵀ q[t]

The decay is one number per head (gated delta net) or one per key channel (Kimi delta attention). Within a chunk the
corrections form a triangular system, whose inverse turns them into products. A chunk then maps the state before it to
the state after it by S -> M S + N, and only this step runs chunk by chunk.

Source: Yang et al. 2024, arXiv:2412.06464; Kimi Team 2025, arXiv:2510.26692.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loratune.ops.recurrence.chunks import Chunks, decays, padded, recomputed, working_dtype

CHUNK = 64
_CHANNEL_CHUNK = 16
"""Chunk length with a decay per channel, which holds L numbers per token and channel."""
_SEGMENT = 4096
_CHANNEL_SEGMENT = 1024


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    positions: Tensor,
    *,
    epsilon: float | None = None,
) -> Tensor:
    """The gated delta rule in each document.

    Args:
        q, k: (batch, T, groups, key); each group serves heads / groups consecutive heads.
        v: (batch, T, heads, value).
        log_decay: (batch, T, heads) or (batch, T, heads, key), at most 0.
        beta: (batch, T, heads).
        positions: (T,) position of each token in its document.
        epsilon: if given, q and k are first divided by the root of their sum of squares plus epsilon.

    Returns: (batch, T, heads, value), dtype of v; q is not scaled here. Computed in float32 at least.
    """
    dtype, tokens = working_dtype(v), v.shape[1]
    per_channel = log_decay.dim() == 4
    segment = _CHANNEL_SEGMENT if per_channel else _SEGMENT
    state = torch.zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=v.device)
    parts = []
    for begin in range(0, tokens, segment):
        here = slice(begin, min(begin + segment, tokens))
        row = (*(x[:, here] for x in (q, k, v, log_decay, beta)), positions[here])
        out, state = recomputed(partial(_segment, epsilon), *row, state)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _segment(
    epsilon: float | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    positions: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Outputs of some tokens that follow `state`, (batch, heads, key, value), and the state after them."""
    out_dtype, dtype, (tokens, heads) = v.dtype, state.dtype, v.shape[1:3]
    per_channel = log_decay.dim() == 4
    length = _CHANNEL_CHUNK if per_channel else CHUNK
    chunks = Chunks.of(padded(positions, length, 0), length)
    share = heads // q.shape[2]
    # Each (batch, heads or groups, chunks, length, ...).
    q, k, v, beta = (_chunked(x, length, dtype) for x in (q, k, v, beta))
    if epsilon is not None:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + epsilon) for x in (q, k))
    total = _chunked(log_decay, length, torch.float64).cumsum(3)
    if not per_channel:
        total = total[..., None]
    last = total[:, :, :, -1:]

    if per_channel:
        q, k = (x.repeat_interleave(share, 1) for x in (q, k))
        inside = decays(total[:, :, :, :, None], total[:, :, :, None], chunks.pairs[..., None], dtype)
        scores = torch.einsum("bhclk,bhcmk,bhclmk->bhclm", q, k, inside)
        overlap = torch.einsum("bhclk,bhcmk,bhclmk->bhclm", k, k, inside)
    else:
        inside = decays(total, total.mT, chunks.pairs, dtype)
        scores, overlap = ((x @ k.mT).repeat_interleave(share, 1) * inside for x in (q, k))
        q, k = (x.repeat_interleave(share, 1) for x in (q, k))
    solved = unit_lower_inverse(beta[..., None] * overlap.tril(-1))
    from_start = decays(total, torch.zeros_like(total), chunks.from_start[..., None], dtype)
    to_end = k * decays(last, total, chunks.to_end[..., None], dtype)
    values = solved @ (beta[..., None] * v)
    reads = solved @ (beta[..., None] * k * from_start)

    kept = decays(last, torch.zeros_like(last), chunks.through[:, None, None], dtype)  # (b, h, c, 1, 1 or key)
    step = torch.diag_embed(kept.squeeze(3).expand(*kept.shape[:3], k.shape[-1])) - to_end.mT @ reads
    before, state = chunk_states(step, to_end.mT @ values, state)
    out = (q * from_start) @ before + scores @ (values - reads @ before)
    out = out.flatten(2, 3)[:, :, :tokens].transpose(1, 2)
    return out.to(out_dtype), state


def _chunked(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(batch, T, heads, ...) -> (batch, heads, C, length, ...), zeros behind the end."""
    out: Tensor = padded(x, length, 1).to(dtype).transpose(1, 2).unflatten(2, (-1, length))
    return out


def unit_lower_inverse(strict: Tensor) -> Tensor:
    """(1 + strict)⁻¹ of strictly lower triangular matrices, (..., L, L)."""
    out: Tensor = _UnitLowerInverse.apply(strict)  # type: ignore[no-untyped-call]
    return out


class _UnitLowerInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        identity = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device)
        inverse: Tensor = torch.linalg.solve_triangular(
            strict, identity.expand_as(strict), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        found: Tensor = -(inverse.mT @ gradient @ inverse.mT).tril(-1)
        return found


def chunk_states(step: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states S[c+1] = step[c] S[c] + update[c], one after the other.

    Args:
        step: (b, h, C, key, key). update: (b, h, C, key, value). state: (b, h, key, value), S[0].

    Returns: (b, h, C, key, value), the state before each chunk, and the state after the last one.
    """
    out: tuple[Tensor, Tensor] = _ChunkStates.apply(step, update, state)  # type: ignore[no-untyped-call]
    return out


class _ChunkStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        C = step.shape[2]
        states = torch.empty(C + 1, *state.flatten(0, 1).shape, dtype=state.dtype, device=state.device)
        states[0] = state.flatten(0, 1)
        steps, updates = (x.flatten(0, 1).transpose(0, 1).contiguous() for x in (step, update))
        for c in range(C):
            torch.baddbmm(updates[c], steps[c], states[c], out=states[c + 1])
        ctx.save_for_backward(steps, states)
        before = states[:-1].transpose(0, 1).unflatten(0, state.shape[:2])
        return before, states[-1].unflatten(0, state.shape[:2]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps, states = ctx.saved_tensors
        heads, C = d_last.shape[:2], len(steps)
        incoming = d_before.flatten(0, 1).transpose(0, 1).contiguous()
        # d_states[c] is the gradient of the state after chunk c; the first place is for the state before all.
        d_states = torch.empty_like(states)
        d_states[C] = d_last.flatten(0, 1)
        for c in reversed(range(C)):
            torch.baddbmm(incoming[c], steps[c].mT, d_states[c + 1], out=d_states[c])
        d_steps = d_states[1:] @ states[:-1].mT
        d_step, d_update = (x.transpose(0, 1).unflatten(0, heads) for x in (d_steps, d_states[1:]))
        return d_step, d_update, d_states[0].unflatten(0, heads)
