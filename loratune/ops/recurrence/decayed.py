"""Linear attention with one decay per token and head: Mamba 2 and lightning attention.

    S[t] = exp(log_decay[t]) S[t-1] + gain[t] k[t] v[t]ᵀ        S: (state, value), zero before each document
    o[t] = S[t]ᵀ q[t]

The row is cut into chunks. Within a chunk the sum is a product of a masked (L, L) matrix, and the states between
chunks are another one, over chunks. So everything is batched products, and memory is proportional to the tokens: one
state per chunk. Long rows run in segments of 64 chunks, one after the other.

Source: Dao and Gu 2024, section 6, arXiv:2405.21060; Qin et al. 2024, arXiv:2401.04658.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratune.ops.recurrence.chunks import Chunks, decays, padded, recomputed, working_dtype

CHUNK = 64
_SEGMENT = 64 * CHUNK


def decayed_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, gain: Tensor | None, positions: Tensor
) -> Tensor:
    """Linear attention of each document, with a decaying state.

    Args:
        q, k: (batch, T, groups, state); each group serves heads / groups consecutive heads.
        v: (batch, T, heads, value).
        log_decay: (batch, T, heads), at most 0. gain: (batch, T, heads), or None for 1.
        positions: (T,) position of each token in its document.

    Returns: (batch, T, heads, value), dtype of v. Computed in float32 at least.
    """
    dtype, tokens = working_dtype(v), v.shape[1]
    state = torch.zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=dtype, device=v.device)
    gain = torch.ones_like(log_decay) if gain is None else gain
    parts = []
    for begin in range(0, tokens, _SEGMENT):
        here = slice(begin, min(begin + _SEGMENT, tokens))
        row = (*(x[:, here] for x in (q, k, v, log_decay, gain)), positions[here])
        out, state = recomputed(_segment, *row, state)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _segment(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, gain: Tensor, positions: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of some tokens that follow `state`, (batch, heads, state, value), and the state after them."""
    out_dtype, dtype, (batch, tokens, heads, width) = v.dtype, state.dtype, v.shape
    groups, share, size = q.shape[2], heads // q.shape[2], q.shape[3]
    chunks = Chunks.of(padded(positions, CHUNK, 0), CHUNK)
    C = len(chunks.through)
    # b batch, c chunk, g group, h heads of a group, l token of a chunk
    q, k = (padded(x, CHUNK, 1).to(dtype).view(batch, C, CHUNK, groups, size).transpose(2, 3) for x in (q, k))
    v = (
        padded(v * gain[..., None].to(dtype), CHUNK, 1)
        .view(batch, C, CHUNK, groups, share, width)
        .permute(0, 1, 3, 4, 2, 5)
    )
    total = (
        padded(log_decay, CHUNK, 1).double().view(batch, C, CHUNK, groups, share).permute(0, 1, 3, 4, 2).cumsum(-1)
    )
    last = total[..., -1:]

    inside = decays(total[..., :, None], total[..., None, :], chunks.pairs[:, None, None], dtype)
    out = (inside * (q @ k.mT)[:, :, :, None]) @ v
    to_end = decays(last, total, chunks.to_end[:, None, None], dtype)
    update = k.mT[:, :, :, None] @ (v * to_end[..., None])

    before, state = _states(update, last.squeeze(-1), chunks.through, state.view(batch, groups, share, size, width))
    from_start = decays(total, torch.zeros_like(total), chunks.from_start[:, None, None], dtype)
    out = out + (q[:, :, :, None] @ before) * from_start[..., None]
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(batch, C * CHUNK, heads, width)[:, :tokens]
    return out.to(out_dtype).contiguous(), state.reshape(batch, heads, size, width)


def _states(update: Tensor, log_decay: Tensor, through: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and after the last one.

    Args:
        update: (b, C, g, h, size, width), the summand of each chunk in the state after it.
        log_decay: (b, C, g, h) float64, decay over a chunk. through: (C,), False if a document starts in it.
        state: (b, g, h, size, width), before the first chunk.
    """
    C = len(through)
    stops = torch.cat([torch.zeros_like(through[:1], dtype=torch.int64), (~through).cumsum(0)])  # (C + 1,)
    total = torch.cat([torch.zeros_like(log_decay[:, :1]), log_decay.cumsum(1)], 1).movedim(1, -1)  # (b, g, h, C + 1)
    # Column 0 is the state before, column c + 1 the summand of chunk c. Row r is the state after r chunks.
    rows, columns = torch.arange(C + 1, device=through.device)[:, None], torch.arange(C + 1, device=through.device)
    allowed = (columns <= rows) & (stops[:, None] == stops)
    weights = decays(total[..., :, None], total[..., None, :], allowed, update.dtype)
    sources = torch.cat([state[:, None], update], 1).movedim(1, 3)  # (b, g, h, C + 1, size, width)
    states = (weights @ sources.flatten(-2)).unflatten(-1, sources.shape[-2:]).movedim(3, 1)
    return states[:, :-1], states[:, -1]
