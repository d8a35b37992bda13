"""The selective scan of Mamba 1: every channel has states with decays of their own.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]       h: (channels, states), zero before each document
    y[t] = h[t] C[t]

There is no product of matrices in it. Blocks of tokens run one after the other. Within a block the states are found
by doubling (Hillis and Steele 1986), and they are computed again in the backward. So memory is one block of states,
and not one state per token.

Source: Gu and Dao 2023, arXiv:2312.00752.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratune.ops.recurrence.chunks import recomputed, working_dtype

_BLOCK = 128
"""Tokens whose states are held at once."""


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, positions: Tensor) -> Tensor:
    """The selective scan in each document.

    Args:
        x, dt: (batch, T, channels); dt is positive.
        A: (channels, states), negative.
        B, C: (batch, T, states).
        positions: (T,) position of each token in its document.

    Returns: (batch, T, channels), float32, or float64 if x is.
    """
    dtype, tokens = working_dtype(x), x.shape[1]
    state = torch.zeros(x.shape[0], *A.shape, dtype=dtype, device=x.device)
    A = A.to(dtype)
    parts = []
    for begin in range(0, tokens, _BLOCK):
        here = slice(begin, begin + _BLOCK)
        out, state = recomputed(_scan_block, *(t[:, here] for t in (x, dt, B, C)), A, positions[here], state)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _scan_block(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, positions: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs of some tokens that follow `state`, (batch, channels, states), and the state after them."""
    dtype, tokens = state.dtype, len(positions)
    x, dt, B, C = (t.to(dtype) for t in (x, dt, B, C))
    decay = (dt[..., None] * A).exp() * (positions > 0)[:, None, None]  # (batch, T, channels, states)
    states = (dt * x)[..., None] * B[:, :, None]
    states = torch.cat([states[:, :1] + decay[:, :1] * state[:, None], states[:, 1:]], 1)
    reach = 1
    while reach < tokens:  # states[t] sums over the last `reach` tokens, decay[t] is the decay over them
        states = torch.cat([states[:, :reach], states[:, reach:] + decay[:, reach:] * states[:, :-reach]], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], 1)
        reach *= 2
    return (states @ C[..., None]).squeeze(-1), states[:, -1]
